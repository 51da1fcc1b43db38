"""Nearest-neighbour precision and recall against their definition by loops, and what they are to tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.functional.neighbours import neighbour_precision_recall


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_manifold(rows: np.ndarray, of: np.ndarray, k: int) -> float:
    """Share of `rows` within the k-th neighbour's distance of some row of `of`."""
    radius = [sorted(np.linalg.norm(of - row, axis=1))[k] for row in of]  # [0] is the row itself
    return float(np.mean([any(np.linalg.norm(row - o) <= r for o, r in zip(of, radius, strict=True)) for row in rows]))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_against_the_definition_by_loops(k, chunk_size) -> None:
    x, y = randn(31, 4), 1.2 * randn(23, 4, seed=1) + 0.5
    found = neighbour_precision_recall(x, y, k, chunk_size=chunk_size)
    a, b = x.double().numpy(), y.double().numpy()
    assert found == pytest.approx((on_manifold(a, b, k), on_manifold(b, a, k)))


def test_a_set_lies_on_its_own_manifold_and_a_far_one_does_not() -> None:
    x = randn(40, 3)
    assert neighbour_precision_recall(x, x) == (1.0, 1.0)
    assert neighbour_precision_recall(x, x + 100) == (0.0, 0.0)


def test_the_sides_change_places() -> None:
    x, y = randn(40, 3), 0.5 * randn(30, 3, seed=1)
    assert neighbour_precision_recall(x, y) == neighbour_precision_recall(y, x)[::-1]


def test_rows_that_shrink_to_the_mean_keep_precision_and_lose_recall() -> None:
    found = [neighbour_precision_recall(scale * randn(300, 8), randn(300, 8, seed=1)) for scale in (1.0, 0.5)]
    assert found[1].precision >= found[0].precision > 0.8
    assert found[1].recall < 0.5 < found[0].recall


@pytest.mark.parametrize(
    ("n", "m", "k", "message"),
    [(5, 9, 5, "source: got 5 rows.*more than num_neighbours=5"), (9, 5, 5, "target: got 5"), (9, 9, 0, "at least 1")],
)
def test_too_few_rows_are_refused(n, m, k, message) -> None:
    with pytest.raises(ValueError, match=message):
        neighbour_precision_recall(randn(n, 3), randn(m, 3), k)


def test_the_edge_of_a_manifold_belongs_to_it() -> None:
    """On a grid, where distances are exact: the row at the k-th neighbour's distance is inside, the next is not."""
    grid = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    assert neighbour_precision_recall(torch.tensor([[-5.0], [5.0], [6.0], [-6.0]]), grid, 1) == (0.5, 0.0)
    assert neighbour_precision_recall(grid, torch.tensor([[-5.0], [5.0], [6.0], [-6.0]]), 1) == (0.0, 0.5)
