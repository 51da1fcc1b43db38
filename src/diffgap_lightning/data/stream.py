"""Batches from shards: data sets that compute any batch of a plan, in any process and in any order.

A loader (`data/stream_loader.py`) sends workers *requests*, epoch and step, and a worker answers with the batch that
the plan puts there for its rank, which it was given with the data set. So a worker counts nothing and needs no process
group, and spawned and forked workers do the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffgap_lightning.data.losses import Loss, ShardError, ShardLossError
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
        held, buffers = self._windows.pop(window.lane, (None, {}))
        self._windows[window.lane] = window, buffers if held == window else self._load(window, buffers)
        rows = self._windows[window.lane][1]
        lo = number * self.plan.batch_size
        hi = lo + self.plan.batch_size
        batch: Batch = {}
        for modality in self.modalities:
            batch[modality] = torch.from_numpy(rows[modality][lo:hi]).to(torch.float32, copy=True)
            batch[f"{modality}_id"] = torch.from_numpy(rows["id"][lo:hi]).clone()
        return batch, self._report()

    def _load(self, window: Window, buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All rows of a window, mixed, in the arrays of the last one where they fit: fresh memory is slow to touch."""
        segments = self.plan.segments(window)
        total = sum(s.hi - s.lo for s in segments)
        manifest = self.reader.shards.manifest
        rows = buffers
        if len(buffers.get("id", ())) != total:
            rows = {m: np.empty((total, manifest.dims[m]), manifest.dtype) for m in self.modalities}
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
