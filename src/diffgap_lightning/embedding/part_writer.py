"""Lightning callback that collects the rows of each part and keeps the part when its last batch is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from tqdm import tqdm

from diffgap_lightning.data.raw_shards import Skip
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.embedding.parts import PartRecord, PartStore
from diffgap_lightning.functional.pairs import hash_ids

if TYPE_CHECKING:
    from diffgap_lightning.embedding.module import EncodedBatch

MAX_CAPTION = 500  # characters of a text that are kept beside its embedding


class PartWriter(BasePredictionWriter):
    """Writes finished parts.

    Args:
        store: Where they go.
        dtype: Of the rows.
        strings: Also keep ids as strings, and captions.
        part_clips: Clips of each part, where known: gives the bar a total.
        progress: Show a bar on rank 0.
    """

    def __init__(
        self, store: PartStore, dtype: str, strings: bool, part_clips: Sequence[int] | None, progress: bool
    ) -> None:
        super().__init__(write_interval="batch")
        self.store, self.dtype, self.strings = store, dtype, strings
        self.part_clips, self.progress = part_clips, progress
        self._open: dict[int, list[EncodedBatch]] = {}
        self._bar: Any = None
        self._skipped = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        parts: list[int] = pl_module.parts  # type: ignore[assignment]
        done = self.store.parts - len(self.store.unfinished())
        if done and trainer.is_global_zero:
            print(f"going on: {done} of {self.store.parts} parts are finished", file=sys.stderr)
        known = self.part_clips is not None
        self._bar = tqdm(
            total=sum(self.part_clips[p] for p in parts) if self.part_clips is not None else len(parts),
            desc="embed" if trainer.world_size == 1 else f"embed (rank 0 of {trainer.world_size})",
            unit="clip" if known else "tar",
            disable=not (self.progress and trainer.is_global_zero),
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hold a batch's rows; keep the part if that was its last one."""
        self._open.setdefault(prediction.part, []).append(prediction)
        self._skipped += len(prediction.skips)
        if self.part_clips is not None or prediction.last:
            self._bar.update(batch.seen if self.part_clips is not None else 1)
        self._bar.set_postfix(skipped=self._skipped, refresh=False)
        if prediction.last:
            batches = self._open.pop(prediction.part)
            self.store.write(*finished_part(batches, self.dtype, self.strings, trainer_encoder(pl_module)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until every rank has written its parts."""
        assert not self._open, f"parts {sorted(self._open)} did not end"
        self._bar.close()
        trainer.strategy.barrier("embed")


def trainer_encoder(module: LightningModule) -> str:
    """The fingerprint of the module's encoder."""
    return str(module.encoder.fingerprint)  # type: ignore[union-attr]


def finished_part(
    batches: Sequence[EncodedBatch], dtype: str, strings: bool, encoder: str
) -> tuple[PartRecord, EmbeddingTable | None]:
    """The record and the table of a part, from its batches."""
    record = PartRecord(batches[0].part, sum(len(b.ids) for b in batches))
    record.skipped = [Skip(*skip) for b in batches for skip in b.skips]
    full = [b for b in batches if b.ids]
    if not full:
        return record, None
    table = EmbeddingTable({}, {}, encoder=encoder)
    for modality in full[0].rows:
        rows = np.concatenate([b.rows[modality] for b in full])
        names = [b.ids[owner] for b in full for owner in b.owners[modality]]
        table.embeddings[modality] = torch.from_numpy(rows.astype(dtype))
        table.ids[modality] = hash_ids(names)
        if strings:
            table.names[modality] = np.array(names, dtype=np.str_)
        if modality != "text":
            table.columns[f"{modality}_start"] = np.concatenate([b.starts[modality] for b in full])
        elif strings:
            table.columns["text_caption"] = np.array([t[:MAX_CAPTION] for b in full for t in b.texts], dtype=np.str_)
        record.rows[modality] = len(rows)
    return record, table
