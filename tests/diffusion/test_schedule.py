"""Noise schedules: their moments, their limits and their accuracy where the noise is small."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.diffusion.schedule import NoiseSchedule, sampling_times

NAMES = ("cosine", "linear")


def exact_noise_share(name: str, t: float) -> float:
    """1 - alpha_bar from its definition in float64, without the clip."""
    return math.sin(math.pi * t / 2) ** 2 if name == "cosine" else -math.expm1(-(0.1 * t + 9.95 * t * t))


@pytest.mark.parametrize("name", NAMES)
def test_alpha_bar_falls_from_one_to_the_clip(name) -> None:
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    alpha_bar = NoiseSchedule(name).alpha_bar(t)
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() <= 0).all()
    assert (alpha_bar[:498].diff() < 0).all()
    # log_snr = -10 at t = 1, that is alpha_bar = 1 / (1 + e^10).
    assert alpha_bar[-1].item() == pytest.approx(1 / (1 + math.exp(10)), rel=1e-9)


def test_cosine_is_half_at_the_middle() -> None:
    assert NoiseSchedule("cosine").alpha_bar(torch.tensor(0.5)).item() == pytest.approx(0.5, abs=1e-6)


def test_linear_is_the_limit_of_ddpm_products() -> None:
    # Ho et al. 2020 with beta_i rising linearly; in the limit of many steps beta(t) goes from 0.1 to 20.
    steps = 100_000
    beta = np.linspace(0.1, 20.0, steps) / steps
    product = np.cumprod(1 - beta)
    t = np.arange(1, steps + 1) / steps
    inside = product > 1e-4
    alpha_bar = NoiseSchedule("linear").alpha_bar(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(alpha_bar[inside], product[inside], rtol=4e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_weights_and_log_snr_are_accurate_in_single_precision(name, t) -> None:
    schedule = NoiseSchedule(name)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t))
    noise = exact_noise_share(name, t)
    assert sigma.item() == pytest.approx(math.sqrt(noise), rel=1e-4)
    assert alpha.item() == pytest.approx(math.sqrt(1 - noise), rel=1e-4)
    log_snr = min(16.0, math.log1p(-noise) - math.log(noise))
    assert schedule.log_snr(torch.tensor(t)).item() == pytest.approx(log_snr, abs=1e-3)


@given(name=st.sampled_from(NAMES), t=st.floats(0, 1, width=32), minimum=st.floats(-15, -2))
@settings(max_examples=100, deadline=None)
def test_variance_is_preserved_and_log_snr_is_that_of_the_weights(name, t, minimum) -> None:
    schedule = NoiseSchedule(name, log_snr_min=minimum)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t))
    assert (alpha**2 + sigma**2).item() == pytest.approx(1, abs=1e-6)
    assert alpha > 0
    log_snr = schedule.log_snr(torch.tensor(t)).item()
    assert minimum - 1e-4 <= log_snr <= 16
    if log_snr < 15.9:
        assert log_snr == pytest.approx(2 * (alpha.log() - sigma.log()).item(), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_is_finite_at_both_ends(name) -> None:
    low, high = NoiseSchedule(name, log_snr_min=-8.0).log_snr(torch.tensor([1.0, 0.0]))
    assert low.item() == pytest.approx(-8, abs=1e-3)
    assert high.item() == pytest.approx(16, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [0.05, 0.4, 0.8, 1.0])
def test_noised_rows_have_the_moments_of_the_forward_process(name, t) -> None:
    schedule, n = NoiseSchedule(name), 40_000
    x0, eps = torch.tensor([[3.0, -2.0]]).expand(n, 2), torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    x_t = schedule.add_noise(x0, eps, torch.full((n,), t))
    noise = min(exact_noise_share(name, t), 1 / (1 + math.exp(-10)))
    mean, std = math.sqrt(1 - noise) * x0[0], math.sqrt(noise)
    # Standard errors: std / sqrt(n) of a mean, std / sqrt(2 n) of a standard deviation; allow four.
    assert ((x_t.mean(0) - mean).abs() < 4 * std / math.sqrt(n)).all()
    assert ((x_t.std(0) - std).abs() < 4 * std / math.sqrt(2 * n)).all()


def test_each_row_is_noised_at_its_own_time() -> None:
    schedule, t = NoiseSchedule(), torch.tensor([0.1, 0.9])
    x0, eps = torch.eye(2), torch.ones(2, 2)
    rows = [schedule.add_noise(x0[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), torch.cat(rows))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule: got 'sigmoid'"):
        NoiseSchedule("sigmoid")


@pytest.mark.parametrize(("steps", "start"), [(1, 1.0), (7, 1.0), (5, 0.3)])
def test_sampling_times_descend_in_equal_steps_to_zero(steps, start) -> None:
    times = sampling_times(steps, start)
    assert times.shape == (steps + 1,)
    assert times[0].item() == pytest.approx(start)
    assert times[-1] == 0
    torch.testing.assert_close(-times.diff(), torch.full((steps,), start / steps))


def test_sampling_times_begin_at_pure_noise_unless_told_otherwise() -> None:
    assert sampling_times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("steps", "start", "words"),
    [(0, 1.0, "num_steps: got 0"), (5, 1.1, "strength: got 1.1"), (5, -0.1, "strength"), (5, math.nan, "strength")],
)
def test_sampling_times_refuse_bad_arguments(steps, start, words) -> None:
    with pytest.raises(ValueError, match=words):
        sampling_times(steps, start)
