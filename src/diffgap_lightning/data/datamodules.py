"""Lightning datamodules over tables in memory: from a file, or drawn from the synthetic world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffgap_lightning.data.splits import Splits, split_by_fold, split_by_fraction
from diffgap_lightning.data.synthetic import SyntheticSample, SyntheticWorld
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.table_module import Split, TableDataModule

MAX_OPTIMUM = 1 << 28


class EmbeddingDataModule(TableDataModule):
    """Embeddings from a `.npz` or `.safetensors` table, split by fold, by fraction, or by separate files.

    Args:
        path: The table. Training rows come from it, and every split that has no file of its own.
        batch_size: Pairs a step and rank in training, most rows of a modality a step and rank in evaluation.
        val_path: A table that is the validation split as a whole.
        test_path: A table that is the test split as a whole.
        val_fraction: Share of the ids held out for validation; 0 for none.
        test_fraction: Share of the ids held out for the test, unless `fold` is given; 0 for none.
        fold: The test fold, of the columns `<modality>_<fold_column>`.
        val_fold: The validation fold; by default ids are drawn, or the next fold is taken where folds cut through ids.
        fold_column: Name of the fold columns, without the modality.
        modalities: Use these only; by default all in the file.
        normalize: Scale rows to unit norm instead of refusing rows that are not.
        seed: Of the splits and of the training order.
        num_workers: Loader processes; 0 is the fastest for tables in memory.
        drop_last: Leave out the last training step of an epoch where it is incomplete.
        pin_memory: Copy batches to page-locked memory, for a faster way to a GPU.
        predict_split: What `predict_dataloader` reads.
        resident: Keep the training rows on the device (see `resident.py`); None: on a GPU where they fit.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 256,
        *,
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        fold: int | str | None = None,
        val_fold: int | str | None = None,
        fold_column: str = "fold",
        modalities: Sequence[str] | None = None,
        normalize: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = True,
        pin_memory: bool = False,
        predict_split: Split = "test",
        resident: bool | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, drop_last, pin_memory, predict_split, resident)
        if fold is not None and test_path is not None:
            raise ValueError(f"got fold={fold} and test_path={test_path}; the test split is one or the other")
        if fold is None and val_fold is not None:
            raise ValueError(f"got val_fold={val_fold} without fold; name the test fold too")
        if val_fold is not None and val_path is not None:
            raise ValueError(
                f"got val_fold={val_fold} and val_path={val_path}; the validation split is one or the other"
            )
        self.path, self.val_path, self.test_path = Path(path), val_path, test_path
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.fold, self.val_fold, self.fold_column = fold, val_fold, fold_column
        self.modalities, self.normalize = modalities, normalize

    def make_splits(self) -> Splits:
        """Read the file or files."""
        table = EmbeddingTable.read(self.path, modalities=self.modalities, normalize=self.normalize)
        others = {
            name: self._read_like(table, path)
            for name, path in (("val", self.val_path), ("test", self.test_path))
            if path is not None
        }
        val_fraction = 0.0 if "val" in others else self.val_fraction
        if self.fold is not None:
            splits = split_by_fold(
                table,
                self.fold,
                column=self.fold_column,
                val_fold=self.val_fold,
                val_fraction=val_fraction,
                seed=self.seed,
                where=str(self.path),
            )
        else:
            test_fraction = 0.0 if "test" in others else self.test_fraction
            splits = split_by_fraction(table, val_fraction, test_fraction, self.seed, where=str(self.path))
        return splits | others

    def _read_like(self, table: EmbeddingTable, path: str | Path) -> EmbeddingTable:
        """Another file of the same modalities, dimensions and encoder."""
        other = EmbeddingTable.read(path, modalities=table.modalities, dims=table.dims, normalize=self.normalize)
        if None not in (table.encoder, other.encoder) and table.encoder != other.encoder:
            raise ValueError(f"{path}: encoder: got {other.encoder}, expected {table.encoder} as in {self.path}")
        return other.select_rows(other.paired())


class SyntheticDataModule(TableDataModule):
    """Pairs of the synthetic world, whose best possible retrieval is known.

    Args:
        num_pairs: Training pairs.
        num_val: Validation pairs; 0 for none.
        num_test: Test pairs; 0 for none.
        batch_size: Pairs a step and rank in training, most rows of a modality a step and rank in evaluation.
        world: The distribution; by default `SyntheticWorld()`.
        seed: Of the draws and of the training order; the world has a seed of its own.
        num_workers: Loader processes; 0 is the fastest for tables in memory.
        drop_last: Leave out the last training step of an epoch where it is incomplete.
        pin_memory: Copy batches to page-locked memory, for a faster way to a GPU.
        predict_split: What `predict_dataloader` reads.
        resident: Keep the training rows on the device (see `resident.py`); None: on a GPU where they fit.
    """

    def __init__(
        self,
        num_pairs: int = 50_000,
        num_val: int = 1000,
        num_test: int = 1000,
        batch_size: int = 256,
        *,
        world: SyntheticWorld | None = None,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = True,
        pin_memory: bool = False,
        predict_split: Split = "test",
        resident: bool | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, drop_last, pin_memory, predict_split, resident)
        for name, number in {"num_pairs": num_pairs, "num_val": num_val, "num_test": num_test}.items():
            if number < 0:
                raise ValueError(f"{name}: got {number}, expected 0 or more")
        self.sizes = {"train": num_pairs, "val": num_val, "test": num_test}
        self._world = world
        self._latents: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def world(self) -> SyntheticWorld:
        """The distribution that the pairs come from."""
        if self._world is None:
            self._world = SyntheticWorld()
        return self._world

    def make_splits(self) -> Splits:
        """Draw every split with a seed of its own; ids count on from split to split."""
        splits, first_id = {}, 0
        for number, (name, size) in enumerate(self.sizes.items()):
            if size:
                pairs: SyntheticSample = self.world.sample(size, seed=(self.seed, number))
                ids = torch.arange(first_id, first_id + size)
                rows = {"audio": pairs.audio, "text": pairs.text}
                splits[name] = EmbeddingTable(rows, {"audio": ids, "text": ids}, encoder=self.world.fingerprint)
                self._latents[name] = (pairs.audio_latent, pairs.text_latent)
            first_id += size
        return splits

    def optimum(self, split: Split) -> Tensor:
        """The best possible text-to-audio scores: pointwise mutual information of the rows of a split.

        Returns:
            `(T, A)` float64, in nats, in the order of `rows(split)`.

        Raises:
            ValueError: the split is empty, or too large for a matrix.
        """
        table = self._table(split)
        if table.num_rows["text"] * table.num_rows["audio"] > MAX_OPTIMUM:
            raise ValueError(f"optimum of the {split} split: {table.num_rows} rows make too large a matrix; draw fewer")
        return self.world.pointwise_mutual_information(*self._latents[split])
