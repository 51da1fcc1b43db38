"""How much of the signal is left at time t: the variance-preserving forward process.

    x_t = sqrt(alpha_bar(t)) x0 + sqrt(1 - alpha_bar(t)) eps,      eps ~ N(0, I),  t in [0, 1]

t = 0 is the clean embedding and t = 1 is (nearly) pure noise. `log_snr = log(alpha_bar / (1 - alpha_bar))` is clipped
below at `log_snr_min`, so that every division by sqrt(alpha_bar) stays finite.

- cosine: alpha_bar = cos^2(pi t / 2). Nichol & Dhariwal 2021, without their offset, which the clip makes needless.
- linear: beta rises linearly from 0.1 to 20, so alpha_bar = exp(-0.1 t - 9.95 t^2). Ho et al. 2020, in the continuous
  form of Song et al. 2021.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["cosine", "linear"]


class NoiseSchedule:
    """A variance-preserving noise schedule over continuous time.

    Args:
        name: `"cosine"` or `"linear"`.
        log_snr_min: The lowest log signal-to-noise ratio, reached at t = 1.

    Example:
        >>> schedule = NoiseSchedule("cosine")
        >>> schedule.alpha_bar(torch.tensor([0.0, 0.5, 1.0])).round(decimals=3)
        tensor([1.0000, 0.5000, 0.0000])
    """

    def __init__(self, name: ScheduleName = "cosine", log_snr_min: float = -10.0) -> None:
        if name not in ("cosine", "linear"):
            raise ValueError(f"schedule: got {name!r}, expected 'cosine' or 'linear'")
        self.name = name
        self.log_snr_min = log_snr_min

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Share of the signal's variance that is left at time `t` (any shape, in [0, 1]); 1 at t = 0."""
        value = torch.cos(t * (math.pi / 2)).square() if self.name == "cosine" else torch.exp(_linear_log_alpha_bar(t))
        return value.clamp(min=1 / (1 + math.exp(-self.log_snr_min)), max=1.0)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(sqrt(alpha_bar), sqrt(1 - alpha_bar))`: the weights of signal and noise, each of `t`'s shape."""
        return self.alpha_bar(t).sqrt(), self._noise_share(t).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """Log signal-to-noise ratio at time `t`, at most 16 (reached at t = 0, where it would be infinite)."""
        return (self.alpha_bar(t).log() - self._noise_share(t).log()).clamp(max=16.0)

    def _noise_share(self, t: Tensor) -> Tensor:
        """1 - alpha_bar, not computed by that difference: near t = 0 it would lose every digit of a single float."""
        if self.name == "cosine":
            value = torch.sin(t * (math.pi / 2)).square()
        else:
            value = -torch.expm1(_linear_log_alpha_bar(t))
        return value.clamp(max=1 / (1 + math.exp(self.log_snr_min)))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Draw `x_t` given `x0` and `eps`, both `(B, R)` or `(B, T, R)`, at times `t` `(B,)`."""
        alpha, sigma = (w.view(-1, *[1] * (x0.ndim - 1)) for w in self.alpha_sigma(t))
        return alpha * x0 + sigma * eps


def _linear_log_alpha_bar(t: Tensor) -> Tensor:
    return -0.1 * t - 9.95 * t.square()


def sampling_times(num_steps: int, start: float = 1.0, device: torch.device | None = None) -> Tensor:
    """`(num_steps + 1,)` equally spaced times from `start` down to 0.

    Raises:
        ValueError: `num_steps` below 1 or `start` outside [0, 1].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    if not 0.0 <= start <= 1.0:
        raise ValueError(f"strength: got {start}, expected a number from 0 (the start itself) to 1 (pure noise)")
    return torch.linspace(start, 0.0, num_steps + 1, device=device)
