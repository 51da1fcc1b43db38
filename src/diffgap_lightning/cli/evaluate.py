"""`diffgap evaluate`: generation metrics of a folder of clips, as a table on stdout and as JSON.

Networks come from local files, by name: `--extractor vggish=FILE panns=FILE`, and `--encoder NAME` with
`--encoder.KEY VALUE` as for `diffgap embed`. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from diffgap_lightning.cli.arguments import ArgumentParser, one_line, suggest
from diffgap_lightning.cli.embed import build_encoder, split_encoder_arguments

if TYPE_CHECKING:
    from diffgap_lightning.evaluation.features import FeatureExtractor
    from diffgap_lightning.evaluation.generation import GenerationReport

EXTRACTORS = {
    "vggish": ("diffgap_lightning.evaluation.vggish", "VGGish"),
    "panns": ("diffgap_lightning.evaluation.panns", "PannsCnn14"),
}
WHERE = {
    "vggish": "vggish-10086976.pth of github.com/harritaylor/torchvggish",
    "panns": "Cnn14_mAP=0.431.pth or Cnn14_16k_mAP=0.438.pth of zenodo.org/records/3987831",
}
LEGEND = (
    "(-) less is better, (+) more. KL, CLAP: mean over pairs, 95% bootstrap interval over clips. "
    "Compare only figures of the same extractor."
)


def build_parser() -> ArgumentParser:
    """The command's own flags; `--encoder.*` are left to the encoder's class."""
    parser = ArgumentParser(
        prog="diffgap evaluate",
        usage="%(prog)s GENERATED [REFERENCE] --extractor NAME=FILE ... [--encoder NAME] [--captions FILE] [options]",
        description="FAD, FD, KAD, KL, IS and CLAP score of a folder of generated clips.",
        epilog="Networks: " + "; ".join(f"{name}: {text}" for name, text in WHERE.items()) + ". Example: "
        "diffgap evaluate run/refined real --extractor vggish=vggish.pth panns=Cnn14_16k.pth --encoder laion_clap "
        "--captions run",
    )
    parser.add_argument("generated", metavar="GENERATED", help="folder of clips")
    parser.add_argument("reference", metavar="REFERENCE", nargs="?", help="folder of real clips, paired by name for KL")
    parser.add_argument(
        "--extractor", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="vggish, panns"
    )
    parser.add_argument("--encoder", metavar="NAME", help="a contrastive encoder, e.g. laion_clap, or a class path")
    parser.add_argument("--captions", metavar="FILE", help="CSV, TSV, JSON, JSONL, or the folder of a generate run")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="fad fd kad kl is clap (default: what can be had)")
    parser.add_argument("--splits", type=int, default=10, metavar="N", help="of the inception score (default: 10)")
    parser.add_argument(
        "--error-budget", type=float, default=0.05, metavar="SHARE", help="of clips that may fail (default: 0.05)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    parser.add_argument("--json", metavar="PATH", help="also write the records here")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `cli.main` for the convention."""
    own, encoder_arguments = split_encoder_arguments(argv)
    args = build_parser().parse_args(own)
    if encoder_arguments and not args.encoder:
        raise ValueError(f"{encoder_arguments[0]}: give --encoder NAME with it")
    if not args.extractor and not args.encoder:
        listed = "; ".join(f"--extractor {name}=FILE, {text}" for name, text in WHERE.items())
        raise ValueError(f"no network to measure with; give local files ({listed}) or --encoder NAME")
    from diffgap_lightning.atomic import check_replaceable
    from diffgap_lightning.evaluation.captions import read_captions
    from diffgap_lightning.evaluation.clip_folder import ClipFolder
    from diffgap_lightning.evaluation.generation import evaluate_folders

    for folder in filter(None, (args.generated, args.reference)):
        ClipFolder.open(folder)  # a wrong path is told before weights are read
    if args.json:
        check_replaceable(args.json)
    captions = read_captions(args.captions) if args.captions else None
    extractors = [_extractor(text) for text in args.extractor]
    if args.encoder:
        from diffgap_lightning.evaluation.encoder_features import EncoderFeatures

        extractors.append(EncoderFeatures(build_encoder(args.encoder, encoder_arguments)))
    report = evaluate_folders(
        args.generated,
        args.reference,
        [extractor.to(_device(args.device)) for extractor in extractors],
        metrics=args.metrics,
        captions=captions,
        splits=args.splits,
        error_budget=args.error_budget,
        progress=None if args.no_progress else _bar,
    )
    print(format_report(report))
    if args.json:
        from diffgap_lightning.evaluation.report import write_json

        write_json(args.json, report.records)
    return 0


def format_report(report: GenerationReport) -> str:
    """The table, and below it what was left out and why."""
    from diffgap_lightning.evaluation.clip_folder import some
    from diffgap_lightning.evaluation.generation import LESS_IS_BETTER

    rows = [["metric", "value", "", "generated", "reference", "extractor"]]
    notes = []
    for record in report.records:
        sign = "-" if LESS_IS_BETTER[record["metric"]] else "+"
        spread = f"+- {record['std']:.3f}" if record["metric"] == "is" else ""
        if record["ci"]:
            spread = "[{:.4f}, {:.4f}]".format(*record["ci"])
        value = f"{round(record['value'], 4) + 0.0:.4f}"
        sizes = [str(record["n_generated"]), str(record["n_reference"] or "-")]
        rows.append([f"{record['metric'].upper()} ({sign})", value, spread, *sizes, record["extractor"]])
        if record["note"]:
            notes.append(f"{record['metric'].upper()}, {record['extractor']}: {record['note']}")
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if k in (1, 3, 4) else c.ljust(w) for k, (c, w) in enumerate(zip(row, width, strict=True)))
        for row in rows
    ]
    table = [lines[0], "-" * len(lines[0]), *lines[1:]]
    notes += [f"{name.upper()} left out: {why}" for name, why in report.skipped.items()]
    if report.failures:
        listed = some([f"{file} ({why})" for file, why in report.failures.items()])
        notes.append(f"unusable clips: {len(report.failures)}: {listed}")
    return "\n".join([*(line.rstrip() for line in table), "", LEGEND, *map(one_line, notes)])


def _extractor(text: str) -> FeatureExtractor:
    """The network behind `NAME=FILE`."""
    from importlib import import_module

    name, _, path = text.partition("=")
    if name not in EXTRACTORS:
        raise ValueError(f"--extractor: unknown {name!r}{suggest(name, EXTRACTORS)}; encoders go with --encoder")
    if not path:
        raise ValueError(f"--extractor: got {text!r}, expected {name}=FILE, a local copy of {WHERE[name]}")
    module, kind = EXTRACTORS[name]
    return getattr(import_module(module), kind).from_file(path)


def _device(name: str) -> Any:
    import torch

    try:
        return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device: got {name!r}, expected cpu, cuda, cuda:0, ...") from error


def _bar(batches: Iterable[list[str]], text: str) -> Iterable[list[str]]:
    """A progress bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(batches, desc=text, disable=None, leave=False)
