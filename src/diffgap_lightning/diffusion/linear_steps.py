"""The deterministic samplers as numbers: where the times are fixed, a step is a weighted sum.

    x <- a x + b x0 + c x0_last

with x0 the step's estimate and x0_last the one before. For DDIM (eta = 0) a = sigma_s / sigma, b = alpha_s - a alpha
and c = 0. DPM-Solver++(2M) puts x0 + r (x0 - x0_last) in place of x0, r being half the ratio of two steps in
lambda = log(alpha / sigma). `samplers.py` has the derivations; here is what a sampler of a fixed schedule needs to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffgap_lightning.diffusion.schedule import NoiseSchedule


class LinearStep(NamedTuple):
    """One step from time t.

    Attributes:
        alpha: Weight of the signal at t.
        sigma: Weight of the noise at t.
        x: a, the weight of the noisy input.
        x0: b, that of the estimate.
        last_x0: c, that of the estimate before; 0 where there is none.
    """

    alpha: float
    sigma: float
    x: float
    x0: float
    last_x0: float


def linear_steps(sampler: str, schedule: NoiseSchedule, times: Sequence[float]) -> list[LinearStep]:
    """The steps of `"dpmpp_2m"` or `"ddim"` through descending times that end in 0.

    Raises:
        ValueError: another sampler.
    """
    if sampler not in ("dpmpp_2m", "ddim"):
        raise ValueError(
            f"sampler: got {sampler!r}, expected 'dpmpp_2m' or 'ddim': the others draw noise at every step"
        )
    alphas, sigmas = (w.tolist() for w in schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64)))
    steps: list[LinearStep] = []
    last_lambda: float | None = None
    last_size = 0.0
    for i in range(len(times) - 1):
        alpha, sigma, alpha_s, sigma_s = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
        shrink = sigma_s / sigma
        weight, ratio, now = alpha_s - shrink * alpha, 0.0, math.log(alpha / sigma)
        if last_lambda is not None:
            last_size = now - last_lambda
        # As in `sample_dpmpp_2m`: nothing to extrapolate to at sigma = 0, or from where the schedule is clipped.
        if sampler == "dpmpp_2m" and last_lambda is not None and sigma_s > 0 and last_size > 0:
            ratio = (math.log(alpha_s / sigma_s) - now) / (2 * last_size)
        steps.append(LinearStep(alpha, sigma, shrink, weight * (1 + ratio), -weight * ratio))
        last_lambda = now
    return steps
