"""Classifier-free guidance (Ho & Salimans 2022): one network learns both p(x | c) and p(x).

In training the condition is dropped for a share of the rows; in sampling the two estimates are extrapolated,

    x0 = x0(x_t) + guidance_scale (x0(x_t, c) - x0(x_t)),

so 0 ignores the condition, 1 is the plain conditional model and more than 1 overstates what the condition changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Maps `x_t` `(B, R)` and the time `t`, a scalar tensor, to an estimate of x0 `(B, R)`."""


def keep_condition(batch_size: int, dropout: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """`(B,)` bool: True where the condition is kept; each row is dropped with probability `dropout`."""
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"condition_dropout: got {dropout}, expected a probability from 0 to 1")
    return torch.rand(batch_size, generator=generator, device=device) >= dropout


def guide(conditional: Denoise, unconditional: Denoise, guidance_scale: float) -> Denoise:
    """Combine two denoisers; at scale 1 the unconditional one is never called."""
    if guidance_scale == 1.0:
        return conditional

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        base = unconditional(x_t, t)
        return base + guidance_scale * (conditional(x_t, t) - base)

    return guided
