"""Spread of samples: exact coverage where the posterior is right, monotone in how little the source says."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from diffgap_lightning.refiner.uncertainty import coverage, uncertainty_of


def draws(noise: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """`(B, count, 20)` unit draws around a direction of each row, `noise` `(B, 1, 1)` wide."""
    g = torch.Generator().manual_seed(seed)
    centre = normalize(torch.randn(len(noise), 1, 20, generator=g), dim=2)
    return normalize(centre + noise * torch.randn(len(noise), count, 20, generator=g), dim=2)


@pytest.mark.parametrize(("level", "count", "expected"), [(0.9, 19, 0.9), (0.9, 32, 30 / 33), (0.5, 7, 0.5)])
def test_one_more_draw_is_covered_as_often_as_promised(level: float, count: int, expected: float) -> None:
    noise = torch.linspace(0.05, 0.4, 4000)[:, None, None]
    x = draws(noise, count + 1)
    assert coverage(uncertainty_of(x[:, 1:], level), x[:, 0]) == pytest.approx(expected, abs=0.02)


def test_samples_that_are_too_narrow_or_too_wide_are_found_out() -> None:
    x = draws(torch.full((2000, 1, 1), 0.2), 33)
    centre = normalize(x[:, 1:].mean(1, keepdim=True), dim=2)
    narrow, wide = (normalize(centre + f * (x[:, 1:] - centre), dim=2) for f in (0.5, 2.0))
    assert coverage(uncertainty_of(narrow), x[:, 0]) < 0.5
    assert coverage(uncertainty_of(wide), x[:, 0]) > 0.97


def test_the_expected_cosine_is_that_of_one_more_draw() -> None:
    x = draws(torch.full((3000, 1, 1), 0.2), 9)
    found = uncertainty_of(x[:, 1:], 0.5)
    true = torch.cosine_similarity(found.mean, x[:, 0]).mean()
    assert float(found.expected_cosine.mean()) == pytest.approx(float(true), abs=0.01)


def test_more_noise_is_more_spread_and_less_expected_cosine() -> None:
    found = uncertainty_of(draws(torch.tensor([0.05, 0.2, 0.5])[:, None, None], 200))
    assert (found.spread.diff() > 0).all()
    assert (found.expected_cosine.diff() < 0).all()
    assert (found.lower_cosine < found.expected_cosine).all()


def test_shapes_norms_and_equal_samples() -> None:
    x = normalize(torch.ones(3, 1, 5), dim=2).repeat(1, 12, 1)
    found = uncertainty_of(x)
    assert found.mean.shape == (3, 5)
    torch.testing.assert_close(found.lower_cosine, torch.ones(3))
    torch.testing.assert_close(found.spread, torch.zeros(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("count", "level", "message"), [(1, 0.5, "at least 2"), (8, 0.9, "at least 9"), (9, 1.0, "level")]
)
def test_too_few_samples_are_refused(count: int, level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uncertainty_of(draws(torch.full((2, 1, 1), 0.2), count), level)
