"""`embed_corpus`: from a corpus to shards, going on where a killed run stopped.

`EmbedModule` embeds in Lightning's predict loop and `PartWriter` keeps finished parts. After a barrier rank 0 alone
writes shards and manifest from the parts; the folder of parts must be visible to all ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from diffgap_lightning.data.manifest import MANIFEST_NAME
from diffgap_lightning.embedding.corpus import Corpus
from diffgap_lightning.embedding.decode import ClipDecoder, EmbedSettings
from diffgap_lightning.embedding.merge import SUMMARY_NAME, EmbedSummary, finish
from diffgap_lightning.embedding.module import EmbedModule
from diffgap_lightning.embedding.part_writer import PartWriter
from diffgap_lightning.embedding.parts import PARTS, PartStore, check_out, check_same_run, is_finished
from diffgap_lightning.encoders.base import ContrastiveEncoder


def embed_corpus(
    corpus: Corpus,
    encoder: ContrastiveEncoder,
    out: str | os.PathLike[str],
    settings: EmbedSettings,
    *,
    kind: str | None = None,
    dtype: str = "float16",
    split: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 0,
    strings: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    trainer_options: dict[str, Any] | None = None,
) -> EmbedSummary | None:
    """Embed a corpus into block shards, going on where a killed run stopped.

    Args:
        corpus: A `CatalogCorpus` or `RawCorpus`.
        encoder: Embeds.
        out: Folder of the shards; the unfinished work lies in `<out>.parts` beside it.
        settings: Modalities and windows.
        kind: `"pairs"` for training, `"rows"` for evaluation; by default rows for splits val and test and for a single
            modality, pairs otherwise.
        dtype: Of the stored rows, `"float16"` or `"float32"`.
        split: Written into the manifest.
        seed: Of the order of pairs.
        batch_size: Clips a batch.
        num_workers: Decoding processes a rank.
        strings: Also keep ids as strings, and captions.
        overwrite: Begin anew and replace shards that are there.
        progress: Show a bar with rate and time left.
        trainer_options: For Lightning's `Trainer`: accelerator, devices, num_nodes, strategy, precision.

    Returns:
        What it amounts to; None on ranks other than 0.

    Raises:
        ValueError: wrong settings, another run's folder, or nothing that could be embedded.
        OSError: `out` cannot be written to.
    """
    out = Path(out)
    if kind is None:
        kind = "rows" if split in ("val", "test") or len(settings.modalities) < 2 else "pairs"
    if kind == "pairs" and len(settings.modalities) < 2:
        raise ValueError(f"kind 'pairs' needs two modalities, got {settings.modalities[0]}; use kind 'rows'")
    ClipDecoder(settings, encoder)  # refuses what is impossible before anything starts
    run = {
        "corpus": corpus.digest,
        "encoder": encoder.fingerprint,
        "settings": settings.to_dict(),
        "kind": kind,
        "dtype": dtype,
        "split": split,
        "seed": seed,
        "strings": strings,
    }
    store = PartStore(out.with_name(out.name + PARTS), run, len(corpus))
    if not overwrite:
        if is_finished(out):
            return _finished_before(out, store.run)
        store.check()
    check_out(out, overwrite)
    module = EmbedModule(encoder, corpus, store, settings, batch_size, num_workers, fresh=overwrite)
    writer = PartWriter(store, dtype, strings, corpus.part_clips, progress)
    started = time.perf_counter()
    trainer = Trainer(
        logger=False, callbacks=[writer], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **(trainer_options or {}),
    )  # fmt: skip
    trainer.predict(module, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    seconds = time.perf_counter() - started
    replace = overwrite or (out / MANIFEST_NAME).is_file()  # shards beside parts: killed between the two
    return finish(store, out, kind=kind, dtype=dtype, split=split, seed=seed, seconds=seconds, overwrite=replace)


def _finished_before(out: Path, run: dict[str, Any]) -> EmbedSummary:
    """The summary of a run that is complete; refuses another run's shards."""
    path = out / SUMMARY_NAME
    if not path.is_file():
        raise ValueError(f"{out}: holds shards that no `diffgap embed` wrote; use another --out, or --overwrite")
    check_same_run(path, run)
    return EmbedSummary.read(out)


def cluster_options(devices: Sequence[int] | int | str | None = None) -> dict[str, Any]:
    """Trainer options that fit the launcher: `torchrun` and SLURM say how many processes there are.

    Args:
        devices: What the user asked for, if anything.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": local, "num_nodes": world // local, "strategy": "ddp"}
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return {"devices": int(os.environ["SLURM_NTASKS"]) // nodes, "num_nodes": nodes, "strategy": "ddp"}
    if devices is None:
        devices = "auto" if torch.cuda.is_available() else 1
    return {"devices": devices}
