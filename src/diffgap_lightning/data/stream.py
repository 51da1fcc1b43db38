"""Batches from shards: data sets that compute any batch of a plan, and loaders that ask for them in order.

A loader sends workers *requests* (epoch and step), not rows, and a worker answers with the batch that the plan puts
there. So a worker needs no rank, no epoch counter and no process group of its own, spawned and forked workers do the
same, and the position that a checkpoint saves is the number of batches handed to the trainer, however many were
prefetched.

    for batch in loader:           {"audio": (B, D) float32, "audio_id": (B,) int64, "text": ...}
    loader.state_dict()            {"epoch": 3, "position": 120, "plan": {...}}: the same on every rank
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffgap_lightning.data.losses import Loss, LossLedger, ShardError, ShardLossError
from diffgap_lightning.data.plan import EvalPlan, Segment, TrainPlan, Window
from diffgap_lightning.data.shard_reader import BlockData, BlockReader, ShardSet

Batch = dict[str, Tensor]


class _Stream(Dataset[Any]):
    """Reads blocks through a small cache and remembers what was lost until the next batch reports it."""

    def __init__(self, shards: ShardSet, modalities: Sequence[str] | None, cached: int) -> None:
        self.reader = BlockReader(shards, modalities)
        self.modalities = self.reader.modalities
        self._cache: OrderedDict[int, BlockData] = OrderedDict()
        self._cached = cached
        self._lost: set[int] = set()
        self._losses: list[Loss] = []

    def _block(self, index: int) -> BlockData | None:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        if index in self._lost:
            return None
        try:
            data = self.reader.read(index)
        except ShardError as error:
            self._lost.add(index)
            self._losses.append(error.loss)
            return None
        self._losses += data.losses
        self._cache[index] = data
        while len(self._cache) > self._cached:
            self._cache.popitem(last=False)
        return data

    def _report(self) -> list[Loss]:
        losses, self._losses = self._losses, []
        return losses


class TrainStream(_Stream):
    """`stream[epoch, step]` is a rank's batch at that step, rows of all modalities pair by pair, and what was lost.

    Lost rows are replaced by rows of the blocks that follow, so every batch is full.

    Args:
        shards: Kind `"pairs"` or `"samples"`.
        plan: The training order.
        rank: Whose part of it.
        modalities: Read these only.
    """

    def __init__(
        self, shards: ShardSet, plan: TrainPlan, rank: int = 0, modalities: Sequence[str] | None = None
    ) -> None:
        super().__init__(shards, modalities, cached=2)
        self.plan, self.rank = plan, rank
        self._windows: dict[int, tuple[Window, dict[str, np.ndarray]]] = {}

    def __getitem__(self, request: tuple[int, int]) -> tuple[Batch, list[Loss]]:
        """The batch of `(epoch, step)`."""
        epoch, step = request
        window, number = self.plan.window(epoch, self.rank, step)
        if self._windows.get(window.lane, (None, None))[0] != window:
            self._windows.pop(window.lane, None)
            self._windows[window.lane] = window, self._load(window)
        rows = self._windows[window.lane][1]
        lo = number * self.plan.batch_size
        hi = lo + self.plan.batch_size
        batch: Batch = {}
        for modality in self.modalities:
            batch[modality] = torch.from_numpy(rows[modality][lo:hi]).to(torch.float32, copy=True)
            batch[f"{modality}_id"] = torch.from_numpy(rows["id"][lo:hi]).clone()
        return batch, self._report()

    def _load(self, window: Window) -> dict[str, np.ndarray]:
        """All rows of a window, mixed."""
        segments = self.plan.segments(window)
        total = sum(s.hi - s.lo for s in segments)
        manifest = self.reader.shards.manifest
        rows: dict[str, np.ndarray] = {m: np.empty((total, manifest.dims[m]), manifest.dtype) for m in self.modalities}
        rows["id"] = np.empty(total, np.int64)
        goes_to, at = self.plan.mixing(window, total), 0
        for segment in segments:
            for data, index in self._rows(segment):
                count = len(data.arrays[f"{self.modalities[0]}_id"]) if index is None else len(index)
                where = goes_to[at : at + count]
                for name in rows:
                    source = data.arrays[name if name != "id" else f"{self.modalities[0]}_id"]
                    rows[name][where] = source if index is None else source[index]
                at += count
        return rows

    def _rows(self, segment: Segment) -> Iterator[tuple[BlockData, np.ndarray | None]]:
        """A segment's block and row numbers in it; other blocks' rows where it is lost."""
        data = self._block(segment.block)
        if data is not None:
            yield data, _present(data, self.plan.block_rows(segment), int(self.plan.rows[segment.block]))
            return
        need, found = segment.hi - segment.lo, False
        others = self.plan.after(segment.pass_, segment.block)
        for tried, other in enumerate(cycle(map(int, others)) if len(others) else ()):
            data = self._block(other)
            if data is not None and len(data.arrays[f"{self.modalities[0]}_id"]):
                found = True
                count = min(need, len(data.arrays[f"{self.modalities[0]}_id"]))
                yield data, np.arange(count)
                need -= count
            if not need:
                return
            if tried >= len(others) and not found:
                break
        known = self._losses[0] if self._losses else self.reader.shards.urls[0]
        raise ShardLossError(f"no block can be read; the first: {known}")


def _present(data: BlockData, index: np.ndarray | None, planned: int) -> np.ndarray | None:
    """Row numbers among the rows that are there; rows left out are replaced by others of the block."""
    if data.kept is None:
        return index
    position = np.full(planned, -1)
    position[data.kept] = np.arange(len(data.kept))
    missing = position < 0
    position[missing] = np.resize(np.arange(len(data.kept)), int(missing.sum()))
    return position if index is None else position[index]


class EvalStream(_Stream):
    """`stream[i]` is a rank's i-th batch: each modality's own rows, with `<modality>_row`, their number in the split.

    Lost rows are left out and reported.
    """

    def __init__(
        self, shards: ShardSet, plan: EvalPlan, rank: int = 0, modalities: Sequence[str] | None = None
    ) -> None:
        chosen = tuple(modalities or shards.manifest.modalities)
        super().__init__(shards, chosen, cached=len(chosen))
        self.plan, self.rank = plan, rank
        rows = shards.manifest.block_rows
        self._ends = {m: np.cumsum(rows[:, shards.manifest.modalities.index(m)]) for m in chosen}

    def __getitem__(self, index: int) -> tuple[Batch, list[Loss]]:
        """The batch `index` of this rank."""
        batch: Batch = {}
        for modality, (lo, hi) in zip(self.modalities, self.plan.ranges(self.rank, index), strict=True):
            batch |= self._rows(modality, lo, hi)
        return batch, self._report()

    def _rows(self, modality: str, lo: int, hi: int) -> Batch:
        ends = self._ends[modality]
        dim = self.reader.shards.manifest.dims[modality]
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        at = lo
        while at < hi:
            block = int(np.searchsorted(ends, at, side="right"))
            begin = int(ends[block - 1]) if block else 0
            stop = min(hi, int(ends[block]))
            data = self._block(block)
            if data is not None:
                kept = np.arange(int(ends[block]) - begin) if data.kept is None else data.kept
                a, b = np.searchsorted(kept, (at - begin, stop - begin))
                parts.append((data.arrays[modality][a:b], data.arrays[f"{modality}_id"][a:b], kept[a:b] + begin))
            at = stop
        joined = [np.concatenate(p) for p in zip(*parts, strict=True)] if parts else [np.empty((0, dim)), [], []]
        return {
            modality: torch.from_numpy(np.asarray(joined[0])).to(torch.float32, copy=True),
            f"{modality}_id": torch.from_numpy(np.array(joined[1], dtype=np.int64)),
            f"{modality}_row": torch.from_numpy(np.array(joined[2], dtype=np.int64)),
        }


class _Requests:
    """The sampler of the inner loader: whatever was put in it last."""

    def __init__(self) -> None:
        self.items: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _same(item: Any) -> Any:
    return item


class StreamLoader:
    """Hands out a stream's batches in order, counts its losses, and keeps its workers between epochs.

    Args:
        stream: A `TrainStream` or `EvalStream`.
        ledger: Counts what is lost and refuses more than its budget.
        num_workers: Worker processes; 0 reads in this one.
        multiprocessing_context: `"fork"`, `"spawn"` or `"forkserver"`; None is the platform's.
        pin_memory: Copy batches to page-locked memory.
        prefetch_factor: Batches that each worker prepares ahead.
        timeout: Seconds to wait for a worker before the run is stopped with an error.
    """

    def __init__(
        self,
        stream: TrainStream | EvalStream,
        ledger: LossLedger,
        *,
        num_workers: int = 0,
        multiprocessing_context: str | None = None,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        timeout: float = 900.0,
    ) -> None:
        self.stream, self.ledger, self.num_workers = stream, ledger, num_workers
        self._requests = _Requests()
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:
            self._options |= {
                "multiprocessing_context": multiprocessing_context,
                "prefetch_factor": prefetch_factor,
                "persistent_workers": True,
                "timeout": timeout,
            }
        self._loader: DataLoader[Any] | None = None

    def _run(self, requests: Iterable[Any]) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                self.stream, batch_size=None, sampler=self._requests, collate_fn=_same, **self._options
            )
        self._requests.items = requests
        for batch, losses in self._loader:
            self.ledger.add(losses)
            yield batch

    def close(self) -> None:
        """Let the workers end."""
        self._loader = None


class EvalLoader(StreamLoader):
    """Every row of a split once over all ranks; the same number of batches on each."""

    stream: EvalStream

    def __len__(self) -> int:
        """Batches of this rank."""
        return self.stream.plan.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Start from the first batch."""
        order = self.stream.plan.order(self.num_workers)
        for done, batch in enumerate(self._run(order), start=1):
            if done == len(order):
                self.ledger.tell("all rows read")
            yield batch


class TrainLoader(StreamLoader):
    """The batches of one epoch an iteration, resumable at any of them.

    Lightning saves and restores its state by itself (`state_dict`, `load_state_dict`); it is the same on every rank,
    because a plan and a position say all. Without Lightning, iterating again goes on with the next epoch.

    Args:
        stream: What to read.
        ledger: Counts losses.
        epoch: Tells the epoch when an iteration starts; by default the loader counts by itself.
        **options: Those of `StreamLoader`.
    """

    stream: TrainStream

    def __init__(
        self, stream: TrainStream, ledger: LossLedger, *, epoch: Callable[[], int] | None = None, **options: Any
    ) -> None:
        super().__init__(stream, ledger, **options)
        self._tell_epoch = epoch
        self.epoch, self.position = 0, 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches an epoch on each rank."""
        return self.stream.plan.num_steps

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, from the position loaded last or from its start; nothing is read before the first batch."""
        epoch = self.epoch if self._tell_epoch is None else self._tell_epoch()
        start = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        self._resume = None
        self.epoch, self.position = epoch, start
        for batch in self._run([(epoch, step) for step in range(start, len(self))]):
            self.position += 1
            if self.position == len(self):
                self.ledger.tell(f"end of epoch {epoch}")
                self.epoch, self.position = epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of its batches handed out so far, and the plan they belong to."""
        return {"epoch": self.epoch, "position": self.position, "plan": self._describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader over the same shards stopped, with any number of workers.

        The other's number of lanes is taken over, so that the order stays the same. Another batch size, number of
        ranks, seed or data set make another plan: then it warns that rows of this epoch may repeat or be left out.
        """
        lanes = int(state["plan"]["lanes"])
        if lanes != self.stream.plan.lanes:
            self.close()
            self.stream.plan = replace(self.stream.plan, lanes=lanes)
        saved, own = state["plan"], self._describe()
        changed = [f"{name} {saved.get(name)} -> {value}" for name, value in own.items() if saved.get(name) != value]
        if changed:
            warnings.warn(
                f"the checkpoint's stream differs ({', '.join(changed)}): epoch {state['epoch']} goes on at step "
                f"{state['position']} of another order, in which rows may repeat or be left out until the epoch ends",
                stacklevel=2,
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._resume = self.epoch, self.position

    def _describe(self) -> dict[str, Any]:
        plan = self.stream.plan
        return {
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "world": plan.world,
            "lanes": plan.lanes,
            "steps": plan.num_steps,
            "window": plan.window_batches,
            "data": self.stream.reader.shards.fingerprint,
        }
