from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffgap_lightning.data.permutation import permuted


@given(st.integers(1, 300), st.integers(-5, 5), st.integers(0, 3))
def test_every_number_comes_exactly_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, (seed, epoch)).tolist()) == list(range(size))


def test_a_part_of_the_order_is_the_same_wherever_it_is_computed() -> None:
    whole = permuted(np.arange(1000), 1000, (3, 4))
    positions = np.array([999, 0, 5, 500])
    assert permuted(positions, 1000, (3, 4)).tolist() == whole[positions].tolist()


def test_the_order_is_the_same_on_every_machine() -> None:
    assert permuted(np.arange(10), 10, (0, 0)).tolist() == [6, 7, 3, 0, 1, 8, 4, 2, 9, 5]


def test_huge_lengths_cost_nothing() -> None:
    some = permuted(np.arange(1000), 10**15, (0, 1))
    assert len(set(some.tolist())) == 1000
    assert some.min() >= 0
    assert some.max() < 10**15
    assert abs(some.mean() / 10**15 - 0.5) < 0.05


@pytest.mark.parametrize("size", [997, 1000, 4096])
def test_orders_look_independent_between_epochs_seeds_and_neighbours(size: int) -> None:
    # Correlations of random orders have standard deviation 1 / sqrt(size); 5 of them leave no false alarm in practice.
    orders = np.array([permuted(np.arange(size), size, key) for key in [(0, 0), (0, 1), (1, 0), (2, 7)]])
    between = np.corrcoef(np.vstack([np.arange(size), orders]))
    assert np.abs(between - np.eye(len(between))).max() < 5 / size**0.5
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / size**0.5


def test_all_orders_of_few_elements_occur_about_equally_often() -> None:
    orders = [tuple(permuted(np.arange(3), 3, (0, epoch)).tolist()) for epoch in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 100
