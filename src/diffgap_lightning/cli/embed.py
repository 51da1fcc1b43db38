"""`diffgap embed`: a catalog or tars of raw media through any encoder into block shards.

    diffgap embed --encoder hashing --catalog audiocaps/train.csv --media audiocaps/wav --out shards/train
    diffgap embed --encoder my_package.MyEncoder --encoder.checkpoint x.pt --shards 'raw/{000..099}.tar' --out shards/x
    torchrun --nproc-per-node 8 -m diffgap_lightning.cli.main embed ...        ranks share the work

A run that was stopped goes on with the same command. What was embedded and what was skipped, and why, is printed at the
end and lies beside the shards in `summary.json` and `skipped.jsonl`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgap_lightning.cli.arguments import ArgumentParser, one_line
from diffgap_lightning.cli.encoder_arguments import build_encoder, print_encoder_help, split_encoder_arguments

if TYPE_CHECKING:
    from diffgap_lightning.embedding.corpus import Corpus
    from diffgap_lightning.encoders.base import ContrastiveEncoder


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="diffgap embed",
        description="Embed a catalog or tars of raw media into block shards; the same command goes on after a stop.",
        epilog="--encoder.KEY VALUE sets an argument of the encoder's class; --encoder.help lists them.",
    )
    parser.add_argument(
        "--encoder", required=True, metavar="NAME", help="a short name (`diffgap encoders list`) or a class path"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the shards; unfinished work in DIR.parts"
    )
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--catalog", metavar="FILE", help="AudioCaps or VGGSound CSV, or CSV/JSONL with id,audio,video,text"
    )
    corpus.add_argument("--media", metavar="DIR", help="folder of downloaded media")
    corpus.add_argument("--format", default="auto", help="of the catalog: auto, audiocaps, vggsound, csv, jsonl")
    corpus.add_argument("--split", help="embed only this split; its name goes into the manifest")
    corpus.add_argument("--shards", nargs="+", metavar="TAR", help="instead of a catalog: tars of raw media")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--modality", nargs="+", metavar="NAME", help="audio, text, video; default: what both sides have")
    rows.add_argument("--window", type=float, metavar="S", help="seconds; 0 takes clips whole; default: the encoder's")
    rows.add_argument("--hop", type=float, metavar="S", help="seconds from window to window; default: the window")
    rows.add_argument("--windows", default="all", help="all (a row each), mean (a row a clip) or first; default: all")
    rows.add_argument("--template", default="{}", help="around every text, e.g. 'This is a sound of {}.'")
    rows.add_argument("--kind", help="pairs (training) or rows (evaluation); default: by split and modalities")
    rows.add_argument("--dtype", default="float16", help="of the stored rows: float16 or float32")
    rows.add_argument("--seed", type=int, default=0, help="of the order of pairs")
    rows.add_argument("--no-strings", action="store_true", help="keep neither string ids nor captions beside the rows")
    rows.add_argument("--max-seconds", type=float, default=600.0, metavar="S", help="longer recordings are skipped")
    rows.add_argument("--max-megabytes", type=float, default=1024.0, metavar="MB", help="larger files are skipped")
    rows.add_argument("--overwrite", action="store_true", help="begin anew and replace what is there")
    work = parser.add_argument_group("machine")
    work.add_argument(
        "--part-size", type=int, default=0, metavar="N", help="clips a part; a stop loses unfinished parts"
    )
    work.add_argument("--batch-size", type=int, default=32, metavar="N", help="clips a batch")
    work.add_argument("--num-workers", type=int, default=2, metavar="N", help="decoding processes a rank")
    work.add_argument("--precision", default="auto", help="Lightning's; auto: bf16-mixed on a GPU, 32-true otherwise")
    work.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    work.add_argument("--devices", help="how many; default: all GPUs or 1; torchrun and SLURM decide themselves")
    work.add_argument("--num-nodes", type=int, metavar="N", help="how many; torchrun and SLURM decide themselves")
    work.add_argument("--no-progress", action="store_true", help="no bar")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    own, encoder_arguments = split_encoder_arguments(argv)
    if any(a.split("=")[0] == "--encoder.help" for a in encoder_arguments):
        return print_encoder_help(own, "diffgap embed")
    args = _parser().parse_args(own)
    if (args.catalog is None) == (args.shards is None):
        raise ValueError("give either --catalog FILE or --shards TAR ...; see `diffgap embed --help`")
    for flag, least in (("num_workers", 0), ("part_size", 0), ("batch_size", 1)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')}: got {getattr(args, flag)}, expected at least {least}")
    from diffgap_lightning.embedding.parts import check_out

    check_out(Path(args.out), args.overwrite)  # before a model is loaded
    encoder = build_encoder(args.encoder, encoder_arguments)
    try:
        return _embed(args, encoder)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            "a decoding process died, of too little memory or of a file that breaks the decoder; the same command goes "
            "on with the unfinished parts, and fewer --num-workers need less memory"
        ) from error
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning shut down cleanly and exits 1
            raise KeyboardInterrupt from None
        raise


def _embed(args: argparse.Namespace, encoder: ContrastiveEncoder) -> int:
    """Embed, and print what it amounts to."""
    corpus, split = _corpus(args)
    settings = _settings(args, corpus, encoder)

    from diffgap_lightning.embedding.engine import embed_corpus

    _hush()
    started = time.perf_counter()
    summary = embed_corpus(
        corpus,
        encoder,
        args.out,
        settings,
        kind=args.kind,
        dtype=args.dtype,
        split=split,
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        strings=not args.no_strings,
        overwrite=args.overwrite,
        progress=not args.no_progress,
        trainer_options=_trainer_options(args),
    )
    if summary is not None:
        print(f"{summary}\nshards: {args.out} ({time.perf_counter() - started:.1f} s)")
    return 0


def _corpus(args: argparse.Namespace) -> tuple[Corpus, str | None]:
    """The corpus and the name of its split."""
    from diffgap_lightning.embedding.corpus import CatalogCorpus, RawCorpus

    if args.shards is not None:
        for flag in ("catalog", "media"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} does not go with --shards: the tars hold the media")
        return RawCorpus(args.shards, int(args.max_megabytes * 1e6)), args.split
    from diffgap_lightning.data.catalog import read_catalog

    catalog = read_catalog(args.catalog, args.media, args.format)
    named = {split: count for split, count in catalog.splits.items() if split is not None}
    if args.split is None and len(named) > 1:
        listed = ", ".join(f"{split} ({count})" for split, count in named.items())
        raise ValueError(f"{args.catalog}: holds splits {listed}; choose one with --split, so that they stay apart")
    if args.split is None:
        return CatalogCorpus(catalog, args.part_size), next(iter(named), None)
    chosen = catalog.select(args.split) if named else catalog
    return CatalogCorpus(chosen, args.part_size), chosen.clips[0].split or args.split


def _settings(args: argparse.Namespace, corpus: Corpus, encoder: ContrastiveEncoder) -> Any:
    """What decides the rows; says on stderr which media are missing."""
    from diffgap_lightning.data.media import MediaLimits
    from diffgap_lightning.embedding.corpus import CatalogCorpus, available_modalities, first_problem
    from diffgap_lightning.embedding.decode import EmbedSettings

    modalities = tuple(dict.fromkeys(args.modality or ())) or available_modalities(corpus, encoder.modalities)
    if not modalities:
        why = "is --media right?" if isinstance(corpus, CatalogCorpus) else first_problem(corpus) or "give other tars"
        raise ValueError(f"{corpus.name}: none of its clips has {' or '.join(encoder.modalities)}; {why}")
    if isinstance(corpus, CatalogCorpus) and _first_process():
        for modality in modalities:
            if missing := corpus.catalog.missing(modality):
                first = ", ".join(clip.id for clip in missing[:3])
                total = len(corpus.catalog)
                print(
                    f"{modality}: missing for {len(missing)} of {total} clips (e.g. {one_line(first)})", file=sys.stderr
                )
    window = encoder.window if args.window is None else args.window or None
    limits = MediaLimits(max_bytes=int(args.max_megabytes * 1e6), max_seconds=args.max_seconds)
    return EmbedSettings(modalities, window, args.hop, args.windows, args.template, limits)


def _first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _trainer_options(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from diffgap_lightning.embedding.engine import cluster_options

    devices: int | str | None = args.devices
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    gpu = args.accelerator in ("gpu", "cuda") or (args.accelerator == "auto" and torch.cuda.is_available())
    precision = ("bf16-mixed" if gpu else "32-true") if args.precision == "auto" else args.precision
    options = {"accelerator": args.accelerator, "precision": precision} | cluster_options(devices)
    return options | ({"num_nodes": args.num_nodes} if args.num_nodes else {})


def _hush() -> None:
    """Leave out what Lightning says about loaders and devices; its warnings that matter stay."""
    for message in (".*infer the batch indices.*", ".*does not have many workers.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
