"""A Lightning datamodule over shards: block shards and classic WebDataset tars, local or remote.

    data:
      class_path: diffgap_lightning.data.WebDatasetDataModule
      init_args: {train: shards/train, val: shards/val, batch_size: 4096, num_workers: 2}

Ranks and workers, steps per epoch, order and resuming are those of `data/plan.py`; what could not be read is counted
against `error_budget`. Evaluation reads every row once over all ranks, whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from diffgap_lightning.data.losses import LossLedger
from diffgap_lightning.data.plan import EvalPlan, TrainPlan
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_reader import ShardSet
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.stream import EvalStream, TrainStream
from diffgap_lightning.data.stream_loader import EvalLoader, StreamLoader, TrainLoader
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.urls import is_remote

Split = Literal["train", "val", "test", "predict"]
MAX_ROWS = 100_000


class WebDatasetDataModule(LightningDataModule):
    """Streams shards. Each split is a folder of shards, tar files, a glob, a brace pattern or a list of those.

    Args:
        train: Training shards, of kind `"pairs"` or classic tars.
        val: Validation shards, best of kind `"rows"`: in pairs, a clip with five captions has five rows to be found.
        test: Test shards, as `val`.
        predict: What `predict_dataloader` reads; by default the test shards.
        batch_size: Pairs a step and rank in training, most rows of a modality a step and rank in evaluation.
        num_workers: Reading processes a rank; 0 reads in the training process.
        seed: Of the training order and of samples of rows.
        shuffle_buffer: Rows that a worker mixes at a time; they are random neighbours already if the shards were
            written by `write_embedding_shards`.
        steps_per_epoch: Training steps an epoch; by default as many as the rows fill once.
        error_budget: Share of the training (or prediction) rows that may be lost to damaged shards before the run is
            stopped. 0 stops at the first loss. Validation and test allow none: a metric over fewer rows is another one.
        modalities: Use these only; by default all. For classic tars: which `key.<modality>.npy` to read.
        multiprocessing_context: How workers start: `"fork"`, `"spawn"` or `"forkserver"`. By default the platform's
            way, but `"spawn"` for remote shards, whose network threads do not survive a fork.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Copy batches to page-locked memory, for a faster way to a GPU.
        rank: Of this process where no trainer knows it; by default that of `torch.distributed`.
        world_size: Number of processes, as `rank`.

    Raises:
        ValueError: (in `setup`) splits of different encoders or dimensions, or training shards that are not pairs.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        batch_size: int = 1024,
        *,
        num_workers: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 16_384,
        steps_per_epoch: int | None = None,
        error_budget: float = 0.0,
        modalities: Sequence[str] | None = None,
        multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.specs = {"train": train, "val": val, "test": test, "predict": predict}
        if not any(self.specs.values()):
            raise ValueError("no shards: give train, val, test or predict a folder, a glob or a brace pattern")
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if number < least:
                raise ValueError(f"{name}: got {number}, expected {least} or more")
        if not 0 <= error_budget <= 1:
            raise ValueError(f"error_budget: got {error_budget}, expected a share of the rows between 0 and 1")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.shuffle_buffer, self.steps_per_epoch, self.error_budget = shuffle_buffer, steps_per_epoch, error_budget
        self.modalities = tuple(modalities) if modalities is not None else None
        self.multiprocessing_context, self.prefetch_factor = multiprocessing_context, prefetch_factor
        self.pin_memory, self.rank, self.world_size = pin_memory, rank, world_size
        self._sets: dict[str, ShardSet] = {}
        self._loaders: dict[str, StreamLoader] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the manifests of all splits (or the headers of classic tars), once, and compare them."""
        if self._sets:
            return
        sets = {name: open_shards(spec, self.modalities) for name, spec in self.specs.items() if spec}
        self._check(sets)
        for name, shards in sets.items():
            self._ledger(name, shards)
        self._sets = sets

    @property
    def encoder(self) -> str | None:
        """Fingerprint of the model that made the embeddings, if known."""
        return next((s.manifest.encoder for s in self._sets.values() if s.manifest.encoder), None)

    def rows(self, split: Split, max_rows: int | None = MAX_ROWS) -> EmbeddingTable:
        """The rows of a split, each once, or a sample of at most `max_rows` a modality; the same on every rank."""
        shards = self._shards(split)
        ledger = self._ledger(split, shards)
        return read_embedding_shards(
            shards, modalities=self.modalities, max_rows=max_rows, seed=self.seed, extras=False, ledger=ledger
        )

    def train_dataloader(self) -> TrainLoader:
        """Aligned pairs in the order of the plan; its state is saved with Lightning's checkpoints."""
        shards, (rank, world) = self._shards("train"), self._place()
        plan = TrainPlan(
            shards.manifest.block_rows[:, 0],
            self.batch_size,
            world=world,
            lanes=max(1, self.num_workers),
            seed=self.seed,
            steps=self.steps_per_epoch,
            window_rows=self.shuffle_buffer,
        )
        trainer = self.trainer
        loader = TrainLoader(
            TrainStream(shards, plan, rank, self.modalities),
            self._ledger("train", shards),
            epoch=None if trainer is None else lambda: trainer.current_epoch,
            **self._options(shards),
        )
        self._keep("train", loader)
        return loader

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Every row of the validation shards once over all ranks; nothing where none were given."""
        return self._eval_loader("val") if self.specs["val"] else []

    def test_dataloader(self) -> EvalLoader:
        """Every row of the test shards once over all ranks."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Every row of the prediction shards once over all ranks."""
        return self._eval_loader("predict" if self.specs["predict"] else "test")

    def teardown(self, stage: str) -> None:
        """Let the workers end."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders.clear()

    def _eval_loader(self, split: Split) -> EvalLoader:
        shards, (rank, world) = self._shards(split), self._place()
        rows = shards.manifest.num_rows
        plan = EvalPlan(tuple(rows[m] for m in self.modalities or rows), self.batch_size, world)
        stream = EvalStream(shards, plan, rank, self.modalities)
        loader = EvalLoader(stream, self._ledger(split, shards), **self._options(shards))
        self._keep(split, loader)
        return loader

    def _keep(self, split: str, loader: StreamLoader) -> None:
        """Remember a loader, so that its workers end with it or with the next one of its split."""
        if split in self._loaders:
            self._loaders[split].close()
        self._loaders[split] = loader

    def _shards(self, split: Split) -> ShardSet:
        if split not in self.specs:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(self.specs)}")
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__}: call setup() before asking for the {split} split")
        if split not in self._sets:
            raise ValueError(f"no {split} shards were given; set data.{split} to a folder, a glob or a brace pattern")
        return self._sets[split]

    def _ledger(self, split: str, shards: ShardSet) -> LossLedger:
        """A fresh count that starts with what could not be indexed."""
        known = shards.losses
        rows = max(shards.manifest.num_rows.values()) + sum(loss.rows for loss in known)
        ledger = LossLedger(split, rows, self.error_budget if split in ("train", "predict") else 0.0, self._place()[0])
        ledger.add(known)
        return ledger

    def _options(self, shards: ShardSet) -> dict[str, Any]:
        context = self.multiprocessing_context
        if context is None and any(map(is_remote, shards.urls)):
            context = "spawn"
        return {
            "num_workers": self.num_workers,
            "multiprocessing_context": context,
            "prefetch_factor": self.prefetch_factor,
            "pin_memory": self.pin_memory,
        }

    def _place(self) -> tuple[int, int]:
        """`(rank, number of ranks)`."""
        if self.rank is not None or self.world_size is not None:
            return self.rank or 0, self.world_size or 1
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _check(self, sets: dict[str, ShardSet]) -> None:
        known = {name: s.manifest.encoder for name, s in sets.items() if s.manifest.encoder is not None}
        if len(set(known.values())) > 1:
            told = ", ".join(f"{name} {encoder}" for name, encoder in known.items())
            raise ValueError(f"the splits were made by different encoders ({told}); embed all with one encoder")
        (first, expected), *others = sets.items()
        for name, shards in others:
            chosen = self.modalities or tuple(expected.manifest.dims)
            for modality in chosen:
                dims = [s.manifest.dims.get(modality) for s in (expected, shards)]
                if dims[0] != dims[1]:
                    raise ValueError(f"{name} shards: {modality} has dimension {dims[1]}, in {first} it has {dims[0]}")
        if "train" in sets and sets["train"].manifest.kind == "rows":
            raise ValueError(
                "train shards: kind 'rows' (each modality by itself) cannot be streamed in pairs; "
                "write them with kind 'pairs', e.g. `diffgap shards pack FOLDER OUT --kind pairs`"
            )
