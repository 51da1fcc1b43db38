"""What datamodules over tables in memory have in common: loaders over one table a split.

Training batches are aligned positive pairs in an order that depends on (seed, epoch) alone, so a resumed run sees what
an uninterrupted one would have seen, in mid-epoch too. Evaluation batches hold every row of every modality once, with
its row number. Both are dealt to the ranks here: `Trainer(use_distributed_sampler=...)` makes no difference.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from diffgap_lightning.data.batches import PairBatches, RowBatches, StepLoader, StepSampler
from diffgap_lightning.data.resident import ResidentRows, fits
from diffgap_lightning.data.splits import Splits, sample_ids
from diffgap_lightning.data.table import EmbeddingTable

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TableDataModule(LightningDataModule):
    """Loaders over one `EmbeddingTable` a split; a subclass says in `make_splits` where the tables come from.

    Args:
        batch_size: Pairs a step and rank in training, most rows of a modality a step and rank in evaluation.
        seed: Of the splits and of the training order.
        num_workers: Loader processes; 0 is the fastest for tables in memory.
        drop_last: Leave out the last training step of an epoch where it is incomplete.
        pin_memory: Copy batches to page-locked memory, for a faster way to a GPU.
        predict_split: What `predict_dataloader` reads.
        resident: Keep the training rows on the device (see `resident.py`); None: on a GPU where they fit.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int,
        num_workers: int,
        drop_last: bool,
        pin_memory: bool,
        predict_split: Split,
        resident: bool | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more")
        if predict_split not in SPLITS:
            raise ValueError(f"predict_split: got {predict_split!r}, expected one of {', '.join(SPLITS)}")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.drop_last, self.pin_memory, self.predict_split = drop_last, pin_memory, predict_split
        self.resident = resident
        self._resident_rows: ResidentRows | None = None
        self._splits: Splits = {}

    def make_splits(self) -> Splits:
        """`"train"`, `"val"`, `"test"` -> table; a split may be missing."""
        raise NotImplementedError

    @property
    def encoder(self) -> str | None:
        """Fingerprint of the model that made the embeddings, if known."""
        return next((table.encoder for table in self._splits.values() if table.encoder), None)

    def setup(self, stage: str | None = None) -> None:
        """Read or draw the tables, once."""
        if not self._splits:
            self._splits = self.make_splits()

    def rows(self, split: Split, max_rows: int | None = None) -> EmbeddingTable:
        """All rows of a split, the same on every rank; with `max_rows`, whole ids drawn up to that many a modality."""
        table = self._table(split)
        return table if max_rows is None else sample_ids(table, max_rows, self.seed)

    def train_dataloader(self) -> StepLoader:
        """Aligned positive pairs, shuffled anew every epoch."""
        table, (rank, world_size) = self._table("train"), self._place()
        self._resident_rows = self._on_device(table)
        batches = PairBatches(
            table.embeddings,
            table.ids,
            self.batch_size,
            seed=self.seed,
            drop_last=self.drop_last,
            rows_only=self._resident_rows is not None,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(batches)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Every row of the validation split once over all ranks; nothing where no such split was asked for."""
        return [] if self._splits and "val" not in self._splits else self._row_loader("val")

    def test_dataloader(self) -> StepLoader:
        """Every row of the test split once over all ranks."""
        return self._row_loader("test")

    def predict_dataloader(self) -> StepLoader:
        """Every row of `predict_split` once over all ranks."""
        return self._row_loader(self.predict_split)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Gather a training batch that came as row numbers."""
        rows = self._resident_rows
        return batch if rows is None or rows.embeddings.keys() & batch.keys() else rows.gather(batch)

    def _on_device(self, table: EmbeddingTable) -> ResidentRows | None:
        if self.trainer is None or self.resident is False:
            return None
        device = self.trainer.strategy.root_device
        if self.resident is None and not fits(table.embeddings, device):
            return None
        return ResidentRows(table.embeddings, table.ids, device)

    def _table(self, split: Split) -> EmbeddingTable:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__}: call setup() before asking for the {split} split")
        if split not in self._splits:
            raise ValueError(f"the {split} split is empty: its fraction or number is 0; give it a share or a file")
        return self._splits[split]

    def _place(self) -> tuple[int, int]:
        """`(rank, number of ranks)`."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _row_loader(self, split: Split) -> StepLoader:
        table, (rank, world_size) = self._table(split), self._place()
        return self._loader(RowBatches(table.embeddings, table.ids, self.batch_size, rank=rank, world_size=world_size))

    def _loader(self, batches: PairBatches | RowBatches) -> StepLoader:
        return StepLoader(
            batches,
            batch_size=None,
            sampler=StepSampler(len(batches)),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory or (getattr(batches, "rows_only", False) and torch.cuda.is_available()),
            persistent_workers=self.num_workers > 0,
        )
