"""What a generator is conditioned on: rows refined one by one, each with noise of its own.

Row b is refined with `torch.Generator().manual_seed(seeds[b])`, so that its result does not depend on the batch that it
is in: a run that was stopped goes on with the same embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from diffgap_lightning.refiner import Start


class Refines(Protocol):
    """A refiner or a bridge."""

    @property
    def refine(self) -> Callable[..., Tensor]:
        """`(B, D)`, `source=`, `target=` and options -> `(B, D_target)`."""


@dataclass(frozen=True)
class RefineOptions:
    """How to refine; None leaves a choice to the refiner.

    Attributes:
        strength: How far back the start is noised, 0 to 1.
        num_steps: The refiner's sampler steps.
        guidance_scale: The refiner's.
        start: `"posterior_mean"` or `"source"`.

    Raises:
        ValueError: one of them is out of range.
    """

    strength: float | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the refiner."""
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength: got {self.strength}, expected 0 (the start itself) to 1 (pure noise)")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps: got {self.num_steps}, expected at least 1")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, expected a finite number")
        if self.start is not None and self.start not in get_args(Start):
            raise ValueError(f"start: got {self.start!r}, expected one of {', '.join(get_args(Start))}")


def refine_rows(
    refiner: Refines, embeddings: Tensor, seeds: Sequence[int], source: str, target: str, options: RefineOptions | None
) -> Tensor:
    """Refine each row with its own seed.

    Args:
        refiner: A refiner or a bridge.
        embeddings: `(B, D)`.
        seeds: B of them.
        source: Modality of the rows.
        target: The modality to move to.
        options: Default: the refiner's own configuration. A strength alone noises the posterior mean.

    Returns:
        `(B, D_target)` float32, unit norm.
    """
    options = options or RefineOptions()
    chosen = {key: value for key, value in vars(options).items() if value is not None}
    if "strength" in chosen:
        chosen.setdefault("start", "posterior_mean")
    rows = [
        refiner.refine(row[None], source=source, target=target, generator=torch.Generator().manual_seed(seed), **chosen)
        for row, seed in zip(embeddings.float(), seeds, strict=True)
    ]
    return torch.cat(rows).float()
