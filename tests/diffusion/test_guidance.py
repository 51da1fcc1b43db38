"""Classifier-free guidance: an extrapolation, and the share of dropped conditions."""

from __future__ import annotations

import math

import pytest
import torch

from diffgap_lightning.diffusion.guidance import guide, keep_condition

CPU = torch.device("cpu")


def conditional(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 2 * x_t + t


def unconditional(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x_t.square() - t


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_guidance_extrapolates_between_the_two_estimates(scale) -> None:
    x, t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    expected = (1 - scale) * unconditional(x, t) + scale * conditional(x, t)
    torch.testing.assert_close(guide(conditional, unconditional, scale)(x, t), expected)


def test_scale_zero_ignores_the_condition() -> None:
    x, t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    assert torch.equal(guide(conditional, unconditional, 0.0)(x, t), unconditional(x, t))


def test_scale_one_never_calls_the_unconditional_denoiser() -> None:
    def refuse(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")

    guided = guide(conditional, refuse, 1.0)
    x = torch.ones(2, 2)
    assert torch.equal(guided(x, torch.tensor(0.5)), conditional(x, torch.tensor(0.5)))
    with pytest.raises(AssertionError, match="called"):
        guide(conditional, refuse, 1.5)(x, torch.tensor(0.5))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_each_condition_is_dropped_with_the_given_probability(dropout) -> None:
    n = 20_000
    keep = keep_condition(n, dropout, torch.Generator().manual_seed(0), CPU)
    assert keep.dtype == torch.bool
    error = math.sqrt(dropout * (1 - dropout) / n)
    assert keep.float().mean().item() == pytest.approx(1 - dropout, abs=4 * error)
    # Rows are independent: neighbours agree as often as chance says.
    agree = dropout**2 + (1 - dropout) ** 2
    assert (keep[1:] == keep[:-1]).float().mean().item() == pytest.approx(agree, abs=0.02)


def test_dropout_zero_keeps_and_one_drops_every_condition() -> None:
    generator = torch.Generator().manual_seed(0)
    assert keep_condition(1000, 0.0, generator, CPU).all()
    assert not keep_condition(1000, 1.0, generator, CPU).any()


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again = (keep_condition(64, 0.5, torch.Generator().manual_seed(3), CPU) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout", [-0.1, 1.5, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout) -> None:
    with pytest.raises(ValueError, match="condition_dropout: got"):
        keep_condition(4, dropout, None, CPU)
