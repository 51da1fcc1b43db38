"""Confidence intervals by resampling whole ids.

Several captions of one clip share the clip's difficulty, so resampling captions would pretend to more evidence than
there is. Each replicate draws C ids with replacement from the C ids present; id c is drawn n_c times, and a mean over
rows i becomes the weighted mean sum_i n_c(i) x_i / sum_i n_c(i). The same draws serve every method: a difference
between two methods is then paired, and its interval is narrower than those of the two.

The interval is the percentile one (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). It speaks
for the clips that might have been drawn, not for another training seed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resample_counts(num_ids: int, replicates: int, generator: torch.Generator) -> Tensor:
    """How often each id is drawn in each replicate.

    Args:
        num_ids: C.
        replicates: R.
        generator: Source of the draws.

    Returns:
        `(R, C)` int16; every row sums to C.
    """
    if num_ids < 1 or replicates < 1:
        raise ValueError(f"bootstrap: got {num_ids} ids and {replicates} replicates, expected at least one of each")
    counts = torch.zeros(replicates, num_ids, dtype=torch.int16)
    for row in counts:
        draws = torch.randint(num_ids, (num_ids,), generator=generator)
        row += torch.bincount(draws, minlength=num_ids).short()
    return counts


def resampled_means(values: Tensor, unit: Tensor, counts: Tensor) -> Tensor:
    """The mean of a quantity in each replicate.

    Args:
        values: `(N,)` one value a row.
        unit: `(N,)` int64, which id the row belongs to, in 0..C-1.
        counts: `(R, C)` from `resample_counts`.

    Returns:
        `(R,)` float64. A replicate that drew none of the rows' ids repeats the mean of all rows.
    """
    num_ids = counts.shape[1]
    total = torch.zeros(num_ids, dtype=torch.float64).index_add_(0, unit, values.double())
    number = torch.bincount(unit, minlength=num_ids).double()
    sums = torch.stack([torch.stack((row @ total, row @ number)) for row in map(Tensor.double, counts)])
    return torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1].clamp(min=1), values.double().mean())


def interval(replicates: Tensor, level: float = 0.95) -> list[float]:
    """The percentile interval `[low, high]` of `(R,)` replicates."""
    tail = (1 - level) / 2
    return [float(q) for q in torch.quantile(replicates, torch.tensor([tail, 1 - tail], dtype=replicates.dtype))]
