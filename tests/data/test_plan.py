from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.data.plan import EvalPlan, TrainPlan


def rows_of(plan: TrainPlan, epoch: int, rank: int, step: int) -> list[tuple[int, int]]:
    """(block, row) of a batch, computed from the plan alone."""
    window, number = plan.window(epoch, rank, step)
    rows: list[tuple[int, int]] = []
    for segment in plan.segments(window):
        index = plan.block_rows(segment)
        index = np.arange(plan.rows[segment.block]) if index is None else index
        rows += [(segment.block, int(i)) for i in index]
    mixed = [(-1, -1)] * len(rows)
    for row, to in zip(rows, plan.mixing(window, len(rows)), strict=True):
        mixed[to] = row
    return mixed[number * plan.batch_size :][: plan.batch_size]


def epoch_rows(plan: TrainPlan, epoch: int) -> list[tuple[int, int]]:
    return [r for rank in range(plan.world) for step in range(plan.num_steps) for r in rows_of(plan, epoch, rank, step)]


plans = st.builds(
    TrainPlan,
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=8).map(lambda x: np.array([*x, 4])),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 5),
    window_rows=st.integers(1, 30),
)


@given(plans, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch_gives_every_rank_full_batches_and_no_row_twice(plan: TrainPlan, epoch: int) -> None:
    rows = epoch_rows(plan, epoch)
    assert len(rows) == plan.num_steps * plan.world * plan.batch_size
    assert len(set(rows)) == len(rows)
    assert plan.total - len(rows) < plan.batch_size * plan.world
    assert all(0 <= i < plan.rows[b] for b, i in rows)


@given(plans, st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_with_fixed_steps_the_line_goes_on_and_covers_every_pass(plan: TrainPlan, steps: int) -> None:
    plan = replace(plan, steps=steps)
    epochs = -(-2 * plan.total // (steps * plan.world * plan.batch_size))
    rows = [r for epoch in range(epochs) for r in epoch_rows(plan, epoch)]
    counts = np.unique([b * 100 + i for b, i in rows], return_counts=True)[1]
    assert len(counts) == plan.total
    assert counts.max() - counts.min() <= 1
    assert counts.min() >= 2


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_epochs_and_seeds_change_order_and_the_sets_that_ranks_get(blocks: int) -> None:
    plan = TrainPlan(np.full(blocks, 32), 8, world=2, lanes=2)

    def share(plan: TrainPlan, epoch: int, rank: int) -> list[tuple[int, int]]:
        return [r for step in range(plan.num_steps) for r in rows_of(plan, epoch, rank, step)]

    assert share(plan, 0, 0) == share(plan, 0, 0)
    assert share(plan, 0, 0) != share(plan, 1, 0)
    assert set(share(plan, 0, 0)) != set(share(plan, 1, 0))
    assert share(plan, 0, 0) != share(replace(plan, seed=1), 0, 0)
    assert not set(share(plan, 0, 0)) & set(share(plan, 0, 1))


def test_every_row_and_neighbour_is_equally_likely_in_a_batch() -> None:
    plan = TrainPlan(np.full(4, 8), 4, world=2, window_rows=16)
    counts = np.zeros((32, 32))
    epochs = 600
    for epoch in range(epochs):
        rows = [b * 8 + i for b, i in rows_of(plan, epoch, 0, 0)]
        counts[np.ix_(rows, rows)] += 1
    share = np.diag(counts) / epochs
    assert np.abs(share - 4 / 32).max() < 5 * np.sqrt(0.125 * 0.875 / epochs)
    same = np.kron(np.eye(4), np.ones((8, 8))) - np.eye(32) > 0
    other = np.kron(1 - np.eye(4), np.ones((8, 8))) > 0
    assert counts[same].min() > 0
    assert counts[other].min() > 0


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    plan, fresh = (TrainPlan(np.array([7, 9, 3, 12]), 3, lanes=2, window_rows=6) for _ in range(2))
    everything = [[rows_of(plan, e, 0, s) for s in range(plan.num_steps)] for e in range(3)]
    assert rows_of(fresh, 2, 0, 5) == everything[2][5]
    assert rows_of(fresh, 0, 0, 1) == everything[0][1]


def test_few_rows_make_one_smaller_step_and_too_few_are_refused() -> None:
    plan = TrainPlan(np.array([5]), 64, world=2)
    assert (plan.num_steps, plan.batch_size) == (1, 2)
    with pytest.raises(ValueError, match="1 rows are too few for 2 ranks"):
        TrainPlan(np.array([1]), 4, world=2)
    with pytest.raises(ValueError, match="batch_size 0"):
        TrainPlan(np.array([5]), 0)
    assert len(epoch_rows(TrainPlan(np.array([5]), 8, steps=3), 0)) == 24


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=3).filter(lambda x: max(x) > 0),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(0, 4),
)
@settings(max_examples=200, deadline=None)
def test_evaluation_gives_each_row_once_in_equally_many_batches(
    totals: list, size: int, world: int, workers: int
) -> None:
    plan = EvalPlan(tuple(totals), size, world)
    assert sorted(plan.order(workers)) == list(range(plan.num_batches))
    for m, total in enumerate(totals):
        ranges = [plan.ranges(rank, batch)[m] for rank in range(world) for batch in range(plan.num_batches)]
        assert [i for lo, hi in ranges for i in range(lo, hi)] == list(range(total))
        assert max(hi - lo for lo, hi in ranges) <= size


def test_workers_get_neighbouring_batches() -> None:
    plan = EvalPlan((100,), 10)
    dealt = [plan.order(2)[w::2] for w in range(2)]
    assert dealt == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
