"""Whole batches out of tensors in memory, by step number: aligned pairs for training, every row once for evaluation.

A data set here holds batches, not rows: item `(epoch, step)` gathers a batch with one indexed read a modality, much
faster than collating rows one by one. Its content depends on the seed, the epoch, the step and the rank alone, so ranks
and workers share nothing, every rank has the same number of steps, and resuming means naming a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from diffgap_lightning.data.permutation import permuted

Batch = dict[str, Tensor]
Item = int | tuple[int, int]


class PairIndex:
    """All combinations of one row a modality that share an id, numbered 0..P-1 and decoded on demand.

    A class with 1000 clips and 1000 videos is a million pairs; only its two lists of rows are kept.

    Args:
        ids: Modality -> `(N_m,)` int64.
    """

    def __init__(self, ids: Mapping[str, Tensor]) -> None:
        arrays = {modality: values.cpu().numpy() for modality, values in ids.items()}
        common = np.unique(next(iter(arrays.values())))
        for values in arrays.values():
            common = np.intersect1d(common, values)
        self._order, self._first, self._count = {}, {}, {}
        total = np.ones(len(common), dtype=np.int64)
        for modality, values in arrays.items():
            order = np.argsort(values, kind="stable")
            first = np.searchsorted(values[order], common, side="left")
            count = np.searchsorted(values[order], common, side="right") - first
            self._order[modality], self._first[modality], self._count[modality] = order, first, count
            total *= count
        self._end = np.cumsum(total)

    def __len__(self) -> int:
        """P, the number of positive pairs."""
        return int(self._end[-1]) if len(self._end) else 0

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Modality -> `(B,)` row numbers of the pairs with these numbers."""
        group = np.searchsorted(self._end, numbers, side="right")
        rest = self._end[group] - 1 - numbers
        rows = {}
        for modality, order in self._order.items():
            rest, digit = np.divmod(rest, self._count[modality][group])
            rows[modality] = order[self._first[modality][group] + digit]
        return rows


class PairBatches(Dataset[Batch]):
    """Training batches: rows of all modalities aligned, a new order every epoch.

    Each pair comes once an epoch over all ranks; what does not fill a step on every rank is left out (`drop_last`) or
    shared evenly, wrapping around to the first pairs where it does not divide. An epoch has at least one step: with
    fewer pairs than a step takes, that step takes them all.

    Args:
        embeddings: Modality -> `(N_m, D_m)`.
        ids: Modality -> `(N_m,)` int64.
        batch_size: Pairs a step and rank.
        seed: Of the order.
        drop_last: Leave out the last, incomplete step.
        rows_only: Batches hold row numbers `"<modality>_row"` in place of embeddings and ids; see `resident.py`.
        rank: Of this process, below `world_size`.
        world_size: Number of processes.
    """

    def __init__(
        self,
        embeddings: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rows_only: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.embeddings, self.ids, self.pairs = dict(embeddings), dict(ids), PairIndex(ids)
        if not len(self.pairs):
            raise ValueError(f"no id occurs in all of {', '.join(ids)}; choose modalities that have positive pairs")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.rows_only = rows_only
        full, rest = divmod(len(self.pairs), batch_size * world_size)
        self._full_steps = full
        self._last_size = 0 if (drop_last and full) else -(-rest // world_size)

    def __len__(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self._full_steps + (self._last_size > 0)

    def __getitem__(self, item: Item) -> Batch:
        """The batch at `(epoch, step)`; a bare step belongs to epoch 0."""
        epoch, step = item if isinstance(item, tuple) else (0, item)
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        size = self.batch_size if step < self._full_steps else self._last_size
        # Every W-th pair of the step: with as many rows in all, one process would have them in one batch.
        start = step * self.batch_size * self.world_size + self.rank
        positions = (start + self.world_size * np.arange(size)) % len(self.pairs)
        rows = self.pairs.rows(permuted(positions, len(self.pairs), (self.seed, epoch)))
        if self.rows_only:
            return {f"{modality}_row": torch.from_numpy(index) for modality, index in rows.items()}
        batch = {}
        for modality, index in rows.items():
            batch[modality] = _gather(self.embeddings[modality], index)
            batch[f"{modality}_id"] = _gather(self.ids[modality], index)
        return batch


class RowBatches(Dataset[Batch]):
    """Evaluation batches: every row of every modality exactly once over all steps and ranks, with its row number.

    Rows are dealt in the order of their ids, each modality evenly over all batches, so that partners mostly meet in one
    batch and all ranks have equally many steps; a batch may lack a modality that has few rows.

    Args:
        embeddings: Modality -> `(N_m, D_m)`.
        ids: Modality -> `(N_m,)` int64.
        batch_size: Most rows of a modality in a batch.
        rank: Of this process, below `world_size`.
        world_size: Number of processes.
    """

    def __init__(
        self,
        embeddings: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.embeddings, self.ids = dict(embeddings), dict(ids)
        self.rank, self.world_size = rank, world_size
        self._order = {modality: np.argsort(values.cpu().numpy(), kind="stable") for modality, values in ids.items()}
        self._steps = math.ceil(max(len(values) for values in ids.values()) / (batch_size * world_size))

    def __len__(self) -> int:
        """Steps of every rank."""
        return self._steps

    def __getitem__(self, item: Item) -> Batch:
        """The batch at a step; the epoch makes no difference."""
        step = item[1] if isinstance(item, tuple) else item
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        part, parts = step * self.world_size + self.rank, self._steps * self.world_size
        batch = {}
        for modality, order in self._order.items():
            rows = order[len(order) * part // parts : len(order) * (part + 1) // parts]
            batch[modality] = _gather(self.embeddings[modality], rows)
            batch[f"{modality}_id"] = _gather(self.ids[modality], rows)
            batch[f"{modality}_row"] = torch.from_numpy(rows.copy())
        return batch


def _gather(x: Tensor, rows: np.ndarray) -> Tensor:
    """`x[rows]` by NumPy, on one thread: torch's threads would wait for each other on a busy CPU."""
    return torch.from_numpy(x.numpy().take(rows, axis=0))


class StepSampler(DistributedSampler[Item]):
    """Names the steps of an epoch, `(epoch, 0), (epoch, 1), ...`, from a given step where training resumes.

    A `DistributedSampler`, because Lightning leaves those in place: the batches are dealt to the ranks already.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__(range(num_steps), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self.num_steps = num_steps
        self.first_step = 0

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.num_steps

    def __iter__(self) -> Iterator[Item]:
        """The steps of the present epoch, from `first_step`."""
        return iter([(self.epoch, step) for step in range(self.first_step, self.num_steps)])

    def set_epoch(self, epoch: int) -> None:
        """Name the present epoch; only the one that was interrupted does not begin at its first step."""
        if epoch != self.epoch:
            self.epoch, self.first_step = epoch, 0


class StepLoader(DataLoader[Batch]):
    """A loader of whole batches that knows how far it is: Lightning stores its state and resumes at the next batch.

    `Trainer(overfit_batches=...)` puts a plain sampler in place of ours: the same steps, always of epoch 0.
    """

    sampler: StepSampler
    _step = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of the present epoch; a step is counted as its batch is handed out, not as it is prefetched."""
        batches = super().__iter__()
        self._step, self.sampler.first_step = getattr(self.sampler, "first_step", 0), 0
        for batch in batches:
            self._step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, steps handed out of it, and steps it has; the same on every rank."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "step": self._step, "num_steps": len(self.sampler)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after a stored step; an epoch of another length begins again, with a warning."""
        self.sampler.epoch, self.sampler.first_step = state["epoch"], state["step"]
        if state["num_steps"] != len(self.sampler):
            self.sampler.first_step = 0
            warnings.warn(
                f"the interrupted epoch had {state['num_steps']} steps, now it has {len(self.sampler)} (other "
                "data, batch size or number of processes): it begins again at its first step",
                stacklevel=2,
            )
