"""The classifier two-sample test: what it can tell apart, what it cannot, and that ids keep it honest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.functional import two_sample
from diffgap_lightning.functional.two_sample import classifier_accuracy


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_accuracy(make, seeds: int = 6) -> float:
    return float(np.mean([classifier_accuracy(*make(seed)) for seed in range(seeds)]))


def test_two_draws_of_one_distribution_cannot_be_told_apart() -> None:
    assert mean_accuracy(lambda s: (randn(120, 6, seed=s), randn(90, 6, seed=100 + s))) == pytest.approx(0.5, abs=0.07)


def test_a_shifted_mean_and_a_smaller_spread_are_told_apart() -> None:
    assert mean_accuracy(lambda s: (randn(100, 6, seed=s) + 3, randn(100, 6, seed=100 + s)), 2) > 0.95
    assert mean_accuracy(lambda s: (0.3 * randn(200, 6, seed=s), randn(200, 6, seed=100 + s)), 2) > 0.85


def test_classes_count_alike_however_many_rows_they_have() -> None:
    # A classifier that always names the larger class would be right nine times out of ten.
    assert mean_accuracy(lambda s: (randn(270, 4, seed=s), randn(30, 4, seed=100 + s))) == pytest.approx(0.5, abs=0.08)


def test_rows_of_one_id_never_stand_on_both_sides() -> None:
    # Each produced row is its true row plus a little noise. Were the partner learned from, accuracy would fall far
    # below one half: it is nearest to the row asked about and of the other class.
    y = randn(150, 4)
    x = y + 0.05 * randn(150, 4, seed=1)
    ids = torch.arange(150)
    assert classifier_accuracy(x, y, ids, ids, penalty=0.01) > 0.3
    assert classifier_accuracy(x, y, ids, ids + 1000, penalty=0.01) < 0.25


def test_it_does_not_depend_on_place_or_scale_and_repeats_itself() -> None:
    x, y = randn(50, 4), 0.7 * randn(60, 4, seed=1)
    once = classifier_accuracy(x, y)
    assert classifier_accuracy(x, y) == once
    assert classifier_accuracy(10 * x + 5, 10 * y + 5) == pytest.approx(once, abs=0.02)


def test_of_many_rows_a_subset_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(two_sample, "MAX_ROWS", 40)
    assert classifier_accuracy(randn(300, 4) + 3, randn(200, 4, seed=1)) > 0.9


def test_misuse_is_refused() -> None:
    x = randn(10, 3)
    with pytest.raises(ValueError, match="both or neither"):
        classifier_accuracy(x, x, torch.arange(10))
    with pytest.raises(ValueError, match=r"target_ids: got shape \(9,\), expected \(10,\)"):
        classifier_accuracy(x, x, torch.arange(10), torch.arange(9))
    with pytest.raises(ValueError, match="expected at least num_folds=5"):
        classifier_accuracy(x, x, torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.long))
    with pytest.raises(ValueError, match="num_folds: got 1"):
        classifier_accuracy(x, x, num_folds=1)


def test_it_is_weighted_ridge_regression_on_the_features_of_the_kernel() -> None:
    """The same in the primal: with K = F F', w minimises sum_i weight_i (label_i - f_i w)^2 + penalty |w|^2."""
    rows, penalty = randn(80, 3).double(), 0.7
    labels = torch.cat([torch.ones(60), -torch.ones(20)]).double()
    rows[:60] += 0.8
    kernel = torch.exp(-torch.cdist(rows, rows).square() / 4)
    fold = torch.randperm(80, generator=torch.Generator().manual_seed(1)) % 4
    values, vectors = torch.linalg.eigh(kernel)
    features = vectors * values.clamp(min=0).sqrt()
    said = torch.zeros(80, dtype=torch.float64)
    for k in range(4):
        f, y = features[fold != k], labels[fold != k]
        weight = torch.where(y > 0, len(y) / (2 * (y > 0).sum()), len(y) / (2 * (y < 0).sum()))
        system = f.T @ (weight[:, None] * f) + penalty * torch.eye(80, dtype=torch.float64)
        said[fold == k] = features[fold == k] @ torch.linalg.solve(system, f.T @ (weight * y))
    right = (said.sign() == labels).double()
    expected = (right[:60].mean() + right[60:].mean()) / 2
    assert two_sample._accuracy(kernel, labels, fold, 4, penalty) == pytest.approx(float(expected))
    assert 0.6 < expected < 0.95
