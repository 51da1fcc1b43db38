"""x0, eps and v: each is the others by their definitions, at every noise level."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.diffusion.prediction import check_prediction, from_x0, to_x0

KINDS = ("x0", "eps", "v")


def noisy(log_snr: float, seed: int, dtype=torch.float64):
    """x0, eps, x_t, alpha, sigma of three rows at one level."""
    g = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(3, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    alpha = torch.tensor(1 / (1 + math.exp(-log_snr)), dtype=torch.float64).sqrt()
    sigma = torch.tensor(1 / (1 + math.exp(log_snr)), dtype=torch.float64).sqrt()
    alpha, sigma = alpha.to(dtype), sigma.to(dtype)
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


@given(log_snr=st.floats(-12, 16), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_each_name_stands_for_its_definition(log_snr, seed) -> None:
    x0, eps, x_t, alpha, sigma = noisy(log_snr, seed)
    outputs = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}
    for kind, output in outputs.items():
        torch.testing.assert_close(from_x0(x0, kind, x_t, alpha, sigma), output, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(to_x0(output, kind, x_t, alpha, sigma), x0, rtol=1e-8, atol=1e-8)


@given(kind=st.sampled_from(KINDS), log_snr=st.floats(-12, 16), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_estimate_survives_the_round_trip_in_single_precision(kind, log_snr, seed) -> None:
    _, _, x_t, alpha, sigma = noisy(log_snr, seed, torch.float32)
    estimate = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed + 1))
    back = to_x0(from_x0(estimate, kind, x_t, alpha, sigma), kind, x_t, alpha, sigma)
    # A rounding of x_t (about 1e-7) comes back divided by alpha, 1 / 400 at the lowest level here.
    torch.testing.assert_close(back, estimate, rtol=1e-5, atol=2e-6 / alpha.item())


@given(log_snr=st.floats(-8, 8), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_error_of_x0_is_that_of_eps_over_alpha_and_of_v_times_sigma(log_snr, seed) -> None:
    _, _, x_t, alpha, sigma = noisy(log_snr, seed)
    g = torch.Generator().manual_seed(seed + 1)
    output, change = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    for kind, factor in (("x0", 1.0), ("eps", -sigma / alpha), ("v", -sigma)):
        moved = to_x0(output + change, kind, x_t, alpha, sigma) - to_x0(output, kind, x_t, alpha, sigma)
        torch.testing.assert_close(moved, factor * change, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_may_differ_between_rows(kind) -> None:
    log_snr = torch.tensor([-6.0, 0.0, 6.0])[:, None]
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    x0, x_t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    together = from_x0(x0, kind, x_t, alpha, sigma)
    apart = [from_x0(x0[i], kind, x_t[i], alpha[i], sigma[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(apart))
    torch.testing.assert_close(to_x0(together, kind, x_t, alpha, sigma), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convert", [to_x0, from_x0])
def test_an_unknown_kind_is_refused(convert) -> None:
    with pytest.raises(ValueError, match="prediction: got 'score'"):
        check_prediction("score")
    x0, _, x_t, alpha, sigma = noisy(0.0, 0)
    with pytest.raises(ValueError, match="prediction: got 'score'"):
        convert(x0, "score", x_t, alpha, sigma)
