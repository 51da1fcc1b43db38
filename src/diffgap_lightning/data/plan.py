"""Who reads which rows when: a pure function of (seed, epoch, rank, worker), computable at any position.

Training. The rows of one pass over the data stand in line, blocks in an order drawn from (seed, pass). The line is
cut into equal parts, one a rank; a part into lanes, one a worker; a lane into windows of some batches, whose rows are
mixed:

    pass:      | block 7      | block 2      | block 5      | block 0 ...      order from (seed, pass)
    lanes:     | rank 0 lane 0   | rank 0 lane 1   | rank 1 lane 0   | ...     equal numbers of rows
    windows:   | w0     | w1     | ...                            mixed by (seed, epoch, rank, lane, window)

Every rank has the same number of steps, no row comes twice in a pass, and few shards or even one block serve any
number of workers, because parts are cut between rows. Step s of a rank belongs to lane `s % lanes`, which is how a
`DataLoader` deals steps to workers. Where a cut falls inside a block, its rows are first permuted by (seed, pass,
block), so that another epoch cuts it into other sets.

Evaluation. Each modality's rows are cut into `world` equal parts and these into the same number of batches on every
rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Rows `[lo, hi)` of a block, counted after the block's permutation in this pass unless it is the whole block."""

    pass_: int
    block: int
    lo: int
    hi: int


class Window(NamedTuple):
    """A run of batches of one lane whose rows are mixed together."""

    epoch: int
    rank: int
    lane: int
    number: int


@dataclass
class TrainPlan:
    """The training order.

    Attributes:
        rows: `(blocks,)` rows of each block.
        batch_size: Rows of a batch on one rank.
        world: Number of ranks.
        lanes: Lanes of a rank; one for each worker.
        seed: Seeds every order.
        steps: Batches an epoch on each rank. None: as many as one pass fills, and each epoch is one pass. A number: the
            line of passes goes on from epoch to epoch.
        window_rows: At least one batch; how many rows are mixed together.
    """

    rows: np.ndarray
    batch_size: int
    world: int = 1
    lanes: int = 1
    seed: int = 0
    steps: int | None = None
    window_rows: int = 16_384
    _orders: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check that there are rows for at least one step on every rank."""
        if self.batch_size < 1 or self.world < 1 or self.lanes < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"got batch_size {self.batch_size}, steps_per_epoch {self.steps}; expected 1 or more")
        self.total = int(self.rows.sum())
        self.one_pass = self.steps is None
        if self.total < self.world:
            raise ValueError(f"{self.total} rows are too few for {self.world} ranks; use fewer ranks, or more rows")
        if self.one_pass:  # with fewer rows than a step takes, that step takes them all
            self.batch_size = min(self.batch_size, self.total // self.world)
        self.num_steps: int = self.total // (self.batch_size * self.world) if self.steps is None else self.steps
        self.window_batches = max(1, self.window_rows // self.batch_size)

    def window(self, epoch: int, rank: int, step: int) -> tuple[Window, int]:
        """The window that holds a step's batch, and the batch's number within it."""
        lane, number = step % self.lanes, step // self.lanes
        return Window(epoch, rank, lane, number // self.window_batches), number % self.window_batches

    def segments(self, window: Window) -> list[Segment]:
        """The rows of a window, in line."""
        lane_batches = (self.num_steps - window.lane + self.lanes - 1) // self.lanes
        earlier = sum((self.num_steps - lane + self.lanes - 1) // self.lanes for lane in range(window.lane))
        first = window.number * self.window_batches
        count = min(self.window_batches, lane_batches - first)
        batches = window.rank * self.num_steps + earlier + first
        start = window.epoch * (self.total if self.one_pass else self.num_steps * self.world * self.batch_size)
        lo = start + batches * self.batch_size
        return self._cut(lo, lo + count * self.batch_size)

    def mixing(self, window: Window, rows: int) -> np.ndarray:
        """`(rows,)` permutation: where each row of a window goes."""
        return np.random.default_rng([self.seed, 1, *window]).permutation(rows)

    def block_rows(self, segment: Segment) -> np.ndarray | None:
        """Row numbers within the block that a segment means, or None for the whole block in its own order."""
        rows = int(self.rows[segment.block])
        if segment.lo == 0 and segment.hi == rows:
            return None
        order = np.random.default_rng([self.seed, 2, segment.pass_, segment.block]).permutation(rows)
        return order[segment.lo : segment.hi]

    def after(self, pass_: int, block: int) -> np.ndarray:
        """All other blocks, in the order in which they follow `block` in a pass: who stands in when it is lost."""
        order, _ = self._order(pass_)
        at = int(np.nonzero(order == block)[0][0])
        return np.concatenate([order[at + 1 :], order[:at]])

    def _order(self, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        if pass_ not in self._orders:
            order = np.random.default_rng([self.seed, 0, pass_]).permutation(len(self.rows))
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[pass_] = order, np.cumsum(self.rows[order])
        return self._orders[pass_]

    def _cut(self, lo: int, hi: int) -> list[Segment]:
        """Segments of the rows `[lo, hi)` of the endless line of passes."""
        found = []
        while lo < hi:
            pass_, inner = divmod(lo, self.total)
            order, ends = self._order(pass_)
            at = int(np.searchsorted(ends, inner, side="right"))
            block = int(order[at])
            begin = int(ends[at] - self.rows[block])
            take = min(hi - lo, int(ends[at]) - inner)
            found.append(Segment(pass_, block, inner - begin, inner - begin + take))
            lo += take
        return found


@dataclass
class EvalPlan:
    """Each modality's rows exactly once over all ranks, in the same number of batches on each.

    Attributes:
        totals: `(modalities,)` rows of each modality in the whole split.
        batch_size: At most this many rows of a modality in a batch.
        world: Number of ranks.
    """

    totals: tuple[int, ...]
    batch_size: int
    world: int = 1

    def __post_init__(self) -> None:
        """Compute the number of batches of a rank."""
        if self.batch_size < 1 or self.world < 1:
            raise ValueError(f"got batch_size {self.batch_size}, expected 1 or more")
        share = -(-max(self.totals) // self.world)
        self.num_batches = max(1, -(-share // self.batch_size))

    def ranges(self, rank: int, batch: int) -> list[tuple[int, int]]:
        """For each modality, the rows `[lo, hi)` of a batch; possibly none."""
        found = []
        for total in self.totals:
            lo, hi = total * rank // self.world, total * (rank + 1) // self.world
            n = self.num_batches
            found.append((lo + (hi - lo) * batch // n, lo + (hi - lo) * (batch + 1) // n))
        return found

    def order(self, workers: int) -> list[int]:
        """A rank's batches so that, dealt round robin, each worker gets neighbouring ones and reads each block once."""
        workers = max(1, workers)
        bounds = [self.num_batches * w // workers for w in range(workers + 1)]
        parts = [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
