r"""Maximum mean discrepancy: are produced embeddings and true ones drawn from the same distribution?

The unbiased estimate (Gretton et al. 2012, eq. 3) between rows x (N, D) and y (M, D),

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
    k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),

is 0 on average where the distributions are equal, and so may be negative. The default sigma is Gretton's median
heuristic on the target rows alone, 2 sigma^2 = (median distance of two different rows)^2: every method that is
compared on the same targets is measured with the same kernel. Another common convention, sigma = median distance, is a
kernel wider by sqrt(2) and gives other figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.precision import column_mean, full_float32, true_float

_MAX_BLOCK = 2**24  # distances held at once
_MEDIAN_ROWS = 2048  # about two million distances; more rows do not move their median
_RESOLUTION = 1e-6  # of a float32 squared distance, relative to the rows' squares


@torch.no_grad()
def mmd2(
    source: Tensor, target: Tensor, bandwidth: float | Sequence[float] | None = None, *, chunk_size: int = 1024
) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel; negative values are noise around 0.

    Args:
        source: `(N, D)` produced rows, N >= 2.
        target: `(M, D)` true rows, M >= 2, each once: repeated rows are not independent draws.
        bandwidth: sigma; several are averaged; None: `median_bandwidth(target)`.
        chunk_size: Rows of one block of distances.

    Raises:
        TypeError, ValueError: rows that `check_embeddings` refuses, fewer than two, a bandwidth that is not positive.
    """
    check_rows(source, "source")
    check_rows(target, "target", dim=source.shape[1])
    if bandwidth is None:
        bandwidth = median_bandwidth(target)
    sigmas = [float(s) for s in (bandwidth if isinstance(bandwidth, Sequence) else [bandwidth])]
    if not sigmas or not all(0 < s < math.inf for s in sigmas):
        raise ValueError(f"bandwidth: got {bandwidth}, expected positive numbers")
    rates = [1 / (2 * s * s) for s in sigmas]
    centre = column_mean(target)  # distances do not depend on it, their rounding does
    x, y = true_float(source, centre), true_float(target, centre)
    within = kernel_mean(x, None, rates, chunk_size) + kernel_mean(y, None, rates, chunk_size)
    return within - 2 * kernel_mean(x, y, rates, chunk_size)


@torch.no_grad()
def median_bandwidth(rows: Tensor) -> float:
    """Median distance of two different rows of `(M, D)` over sqrt(2); from a fixed draw of 2048 rows if M is more."""
    check_rows(rows, "target")
    if len(rows) > _MEDIAN_ROWS:
        draw = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MEDIAN_ROWS]
        rows = rows[draw.to(rows.device)]
    x = true_float(rows, column_mean(rows))
    with full_float32(x.device):
        distances = squared_distances(x, x)[tuple(torch.triu_indices(len(x), len(x), 1, device=x.device))]
    middle = [distances.kthvalue(k).values.item() for k in ((len(distances) + 1) // 2, len(distances) // 2 + 1)]
    median = sum(math.sqrt(m) for m in middle) / 2
    if median**2 <= _RESOLUTION * x.square().sum(1).mean().item():
        raise ValueError(
            "bandwidth: the median distance of the target rows is 0, most rows are equal; give a bandwidth"
        )
    return median / math.sqrt(2)


def kernel_mean(x: Tensor, y: Tensor | None, rates: Sequence[float], chunk_size: int) -> float:
    """Mean of `exp(-rate |x_i - y_j|^2)` over all pairs and rates; over pairs of different rows of `x` if `y` is None.

    Blocks are added up in float64; within `x` each pair is computed once.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    columns = x if y is None else y
    rows = max(1, min(chunk_size, _MAX_BLOCK // len(columns)))
    total = 0.0
    with full_float32(x.device):
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            if y is not None:
                distances = squared_distances(part, y)
                total += sum(_total(distances.mul(-rate).exp_()) for rate in rates)
                continue
            distances = squared_distances(part, x[start:])
            distances[:, : len(part)].fill_diagonal_(torch.inf)
            for rate in rates:
                kernel = distances.mul(-rate).exp_()
                total += 2 * _total(kernel) - _total(kernel[:, : len(part)])
    pairs = len(x) * (len(x) - 1) if y is None else len(x) * len(y)
    return total / pairs / len(rates)


def check_rows(x: Tensor, name: str, dim: int | None = None) -> None:
    """`check_embeddings`, and at least two rows."""
    check_embeddings(x, name, dim=dim)
    if len(x) < 2:
        raise ValueError(f"{name}: got 1 row, expected at least 2: this measure compares different rows")


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`(n, m)` from one matrix product; rounding may take equal rows below 0, hence the clamp."""
    return torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1), x, y.T, alpha=-2).clamp_min_(0)


def _total(block: Tensor) -> float:
    return block.sum(1).cpu().double().sum().item()
