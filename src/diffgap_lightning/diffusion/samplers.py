"""From noise to an embedding: three samplers as free functions.

Each takes `denoise(x_t, t) -> x0 estimate`, the noisy start `x` `(B, R)`, the schedule and descending times
`(num_steps + 1,)` that end in 0. They know nothing of networks, conditions or modalities. With alpha_t, sigma_t the
weights of signal and noise and lambda = log(alpha / sigma):

- DDPM (Ho et al. 2020): draw from the Gaussian q(x_s | x_t, x0).
- DDIM (Song et al. 2021): keep the noise that the estimate implies, replacing a share `eta` of DDPM's by fresh noise.
- DPM-Solver++(2M) (Lu et al. 2022): integrate the exponential ODE exactly, extrapolating x0 linearly in lambda.

`callback(step, t, x, x0)` sees every step's time, noisy input and estimate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffgap_lightning.diffusion.guidance import Denoise
from diffgap_lightning.diffusion.schedule import NoiseSchedule

Callback = Callable[[int, Tensor, Tensor, Tensor], None]


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DDIM; `eta=0` is deterministic, `eta=1` has DDPM's noise. Returns `(B, R)`."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: got {eta}, expected a number from 0 (deterministic) to 1 (DDPM's noise)")
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        x0 = denoise(x, t)
        if callback is not None:
            callback(i, t, x, x0)
        eps = (x - alpha * x0) / sigma
        fresh = eta * _posterior_std(alpha, sigma, alpha_s, sigma_s)
        x = alpha_s * x0 + (sigma_s.square() - fresh.square()).clamp(min=0).sqrt() * eps
        if eta > 0:
            x = x + fresh * _randn_like(x, generator)
    return x


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DDPM's ancestral steps, x_s ~ q(x_s | x_t, x0). Returns `(B, R)`."""
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        x0 = denoise(x, t)
        if callback is not None:
            callback(i, t, x, x0)
        kept = (alpha / alpha_s) * (sigma_s / sigma).square()
        # The weight of x0, alpha_s (1 - (alpha / alpha_s)^2) / sigma^2, in a form that rounding cannot hurt.
        mean = kept * x + (alpha_s - kept * alpha) * x0
        x = mean + _posterior_std(alpha, sigma, alpha_s, sigma_s) * _randn_like(x, generator)
    return x


def sample_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DPM-Solver++(2M), deterministic, second order, one call of `denoise` a step. Returns `(B, R)`."""
    previous: tuple[Tensor, Tensor] | None = None
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        x0 = denoise(x, t)
        if callback is not None:
            callback(i, t, x, x0)
        # The last step ends at sigma = 0, where lambda is infinite: the exact limit of the update is its estimate.
        log_ratio = (alpha / sigma).log()
        direction = x0
        # Where the schedule clips log_snr, two times may have one lambda and there is nothing to extrapolate from.
        if previous is not None and sigma_s > 0 and log_ratio > previous[1]:
            last_x0, last_log_ratio = previous
            step, last_step = (alpha_s / sigma_s).log() - log_ratio, log_ratio - last_log_ratio
            direction = x0 + (step / (2 * last_step)) * (x0 - last_x0)
        previous = (x0, log_ratio)
        shrink = sigma_s / sigma
        x = shrink * x + (alpha_s - shrink * alpha) * direction
    return x


def sample_named(
    name: str,
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample with `"dpmpp_2m"`, `"ddim"` or `"ddpm"`. Returns `(B, R)`."""
    if name == "dpmpp_2m":
        return sample_dpmpp_2m(denoise, x, schedule, times)
    if name == "ddim":
        return sample_ddim(denoise, x, schedule, times, generator=generator)
    if name == "ddpm":
        return sample_ddpm(denoise, x, schedule, times, generator=generator)
    raise ValueError(f"sampler: got {name!r}, expected one of dpmpp_2m, ddim, ddpm")


def _posterior_std(alpha: Tensor, sigma: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Standard deviation of q(x_s | x_t, x0)."""
    return (sigma_s / sigma) * (1 - (alpha / alpha_s).square()).clamp(min=0).sqrt()


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal of x's shape; drawn where the generator lives, so that a CPU generator serves every device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
