"""How sure a refinement is: the spread of several samples of p(target | source), in cosines that a user can read.

For samples x_1 ... x_S of one row, their mean direction c and the mean directions c_-s without one of them,

    cos_s = <x_s, c_-s>,    expected = mean_s cos_s,
    lower = the k-th smallest cos_s,    k = floor((1 - level) (S + 1)).

Were the true target one more draw from the same posterior, its cosine to c would have the same distribution, so it lies
above `lower` with probability 1 - k / (S + 1) >= level exactly (the rank argument of conformal prediction, Vovk et al.
2005): no Gaussian is assumed. What can be wrong is the posterior itself: `coverage` measures that on pairs, and
`calibrated_level` says which level to ask for instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uncertainty:
    """Of B rows.

    Attributes:
        mean: Mean direction of the samples, `(B, D)` of unit norm.
        expected_cosine: Of `mean` to the true target, `(B,)`: low where the source says little. Rank by it, or refuse.
        lower_cosine: What the cosine of `mean` to the true target exceeds with probability `level`, `(B,)`.
        spread: Root mean square angle of the samples from their mean direction, `(B,)` in radians.
    """

    mean: Tensor
    expected_cosine: Tensor
    lower_cosine: Tensor
    spread: Tensor


def uncertainty_of(samples: Tensor, level: float = 0.9) -> Uncertainty:
    """Read the uncertainty off samples `(B, S, D)` of unit norm.

    Args:
        samples: Independent draws for each row.
        level: Probability of `lower_cosine`, below 1; needs S >= 1 / (1 - level) - 1 samples.

    Raises:
        ValueError: a level outside (0, 1), or too few samples for it.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a probability between 0 and 1")
    count = samples.shape[1]
    k = math.floor((1 - level) * (count + 1) + 1e-9)
    if count < 2 or k < 1:
        least = max(2, math.ceil(1 / (1 - level) - 1 - 1e-9))
        raise ValueError(f"num_samples: got {count} for level {level}, expected at least {least}")
    x = samples.float()
    total = x.sum(1)
    others = torch.nn.functional.normalize(total[:, None] - x, dim=2)
    cosines = (x * others).sum(2).clamp(-1, 1)
    return Uncertainty(
        mean=torch.nn.functional.normalize(total, dim=1).to(samples.dtype),
        expected_cosine=cosines.mean(1),
        lower_cosine=cosines.kthvalue(k, dim=1).values,
        spread=cosines.acos().square().mean(1).sqrt(),
    )


def coverage(uncertainty: Uncertainty, target: Tensor) -> float:
    """Share of true targets `(B, D)` whose cosine to `mean` reaches `lower_cosine`; about the level if it is honest."""
    found = torch.cosine_similarity(uncertainty.mean.float(), target.float())
    return float((found >= uncertainty.lower_cosine).float().mean())


def calibrated_level(samples: Tensor, target: Tensor, level: float = 0.9) -> float:
    """The level to ask for so that held-out pairs are covered with probability `level`.

    Args:
        samples: `(B, S, D)` from `refine(..., strength=1.0, num_samples=S)` of held-out sources; use the same S later.
        target: Their true targets `(B, D)`.
        level: Wanted.

    Raises:
        ValueError: no level does it with so few samples or pairs.
    """
    count = samples.shape[1]
    wanted = level * (1 + 1 / len(target))
    for k in range(count, 0, -1):
        nominal = 1 - k / (count + 1)
        if nominal > 0 and coverage(uncertainty_of(samples, nominal), target) >= wanted:
            return nominal
    raise ValueError(
        f"level: got {level}, but {count} samples cover less of {len(target)} pairs even at their widest; take more "
        "samples, or a better refiner"
    )
