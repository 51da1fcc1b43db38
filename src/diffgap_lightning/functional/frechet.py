r"""Frechet distance between the Gaussians fitted to two sets of rows (the 2-Wasserstein distance, squared).

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2)

With any factors C_i = R_i' R_i the last trace is the nuclear norm of R_1 R_2', a sum of singular values: no matrix
square root, no square roots of eigenvalues that rounding made negative, and nothing special where rows are fewer than
dimensions. The factors come from a QR decomposition of the centred rows, updated over chunks of rows.

From few rows the distance is biased upwards, and covariances of rank < D make it noisy. Shrinkage towards the sphere of
the same trace, C <- (1 - a) C + a (tr C / D) I, trades that noise for a bias that all compared methods share; a may be
given or estimated for each side (Ledoit & Wolf 2004).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffgap_lightning.functional.mmd import check_rows
from diffgap_lightning.functional.precision import column_mean, widest

_CHUNK = 4096


@torch.no_grad()
def frechet_distance(source: Tensor, target: Tensor, shrinkage: float | Literal["ledoit-wolf"] = 0.0) -> float:
    """Squared Frechet distance of two sets of rows, in float64.

    Args:
        source: `(N, D)`, N >= 2; covariances divide by N - 1.
        target: `(M, D)`, M >= 2.
        shrinkage: a in [0, 1] for both sides, or `"ledoit-wolf"`: estimated for each side.

    Raises:
        TypeError, ValueError: rows that `check_embeddings` refuses, fewer than two, a shrinkage outside [0, 1].
    """
    check_rows(source, "source")
    check_rows(target, "target", dim=source.shape[1])
    if shrinkage != "ledoit-wolf" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
        raise ValueError(f"shrinkage: got {shrinkage!r}, expected a number from 0 to 1 or 'ledoit-wolf'")
    a, b = (_covariance_factor(rows) for rows in (source, target))
    if shrinkage == "ledoit-wolf":
        a, b = _shrink(a, _ledoit_wolf(source, a)), _shrink(b, _ledoit_wolf(target, b))
    else:
        a, b = _shrink(a, shrinkage), _shrink(b, shrinkage)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    between = (column_mean(source) - column_mean(target)).square().sum()
    return max(0.0, (between + a.square().sum() + b.square().sum() - 2 * cross).item())


@torch.no_grad()
def ledoit_wolf_shrinkage(rows: Tensor) -> float:
    """The shrinkage `a` with the least expected squared error of the covariance of `(N, D)` rows (Ledoit & Wolf 2004).

    With S the covariance (divided by N), m = tr S / D: a = min(1, b / d), d = |S - m I|_F^2 and
    b = (1 / N^2) sum_k |x_k x_k' - S|_F^2 = (mean_k |x_k|^4 - |S|_F^2) / N over centred rows x_k.
    """
    check_rows(rows, "rows")
    return _ledoit_wolf(rows, _covariance_factor(rows))


def _ledoit_wolf(rows: Tensor, factor: Tensor) -> float:
    n, dim = rows.shape
    factor = factor * ((n - 1) / n) ** 0.5
    covariance = (
        factor.T @ factor if n > dim else factor @ factor.T
    )  # the other Gram matrix has the same norm and trace
    norm, trace = covariance.square().sum(), covariance.trace()
    spread = norm - trace.square() / dim
    centre = column_mean(rows)
    fourth = sum(((widest(part) - centre).square().sum(1).square().sum()) for part in rows.split(_CHUNK)) / n
    if spread <= norm * 1e-12:
        return 1.0
    return float(torch.clamp((fourth - norm) / n / spread, 0, 1))


def _covariance_factor(rows: Tensor) -> Tensor:
    """`R` of at most D rows with `R' R` the covariance (divided by N - 1) of `(N, D)`."""
    centre = column_mean(rows)
    factor = centre.new_zeros(0, len(centre))
    for part in rows.split(_CHUNK):
        factor = torch.linalg.qr(torch.cat([factor, widest(part) - centre]), mode="r").R
    return factor / (len(rows) - 1) ** 0.5


def _shrink(factor: Tensor, amount: float) -> Tensor:
    """The factor of `(1 - a) C + a (tr C / D) I`."""
    if amount == 0:
        return factor
    dim = factor.shape[1]
    sphere = (amount * factor.square().sum() / dim).sqrt() * torch.eye(dim, dtype=factor.dtype, device=factor.device)
    return torch.linalg.qr(torch.cat([(1 - amount) ** 0.5 * factor, sphere]), mode="r").R
