"""The weights against the samplers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffgap_lightning.diffusion.linear_steps import linear_steps
from diffgap_lightning.diffusion.samplers import sample_ddim, sample_dpmpp_2m
from diffgap_lightning.diffusion.schedule import NoiseSchedule, ScheduleName, sampling_times


def denoise(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 - 0.3 * t) + t


@pytest.mark.parametrize("schedule_name", ["cosine", "linear"])
@pytest.mark.parametrize(("num_steps", "strength"), [(1, 1.0), (2, 0.2), (10, 0.3), (50, 1.0)])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim"])
def test_they_are_the_sampler(sampler: str, num_steps: int, strength: float, schedule_name: ScheduleName) -> None:
    schedule, times = NoiseSchedule(schedule_name), sampling_times(num_steps, strength).double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = sample_dpmpp_2m if sampler == "dpmpp_2m" else sample_ddim
    expected = sample(denoise, x, schedule, times)
    last = torch.zeros_like(x)
    steps = linear_steps(sampler, schedule, times.tolist())
    assert len(steps) == num_steps
    for t, step in zip(times, steps, strict=False):
        x0 = denoise(x, t)
        x, last = step.x * x + step.x0 * x0 + step.last_x0 * last, x0
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    if sampler == "dpmpp_2m" and num_steps > 2:
        assert any(step.last_x0 != 0 for step in steps)


def test_a_sampler_that_draws_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler: got 'ddpm', expected 'dpmpp_2m' or 'ddim'"):
        linear_steps("ddpm", NoiseSchedule(), [1.0, 0.0])
