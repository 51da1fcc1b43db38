r"""Closed-form maps between two sets of paired rows: ridge, canonical correlations, Procrustes, Gaussian transport.

Rows are embeddings, `x` (N, D_x) and `y` (N, D_y) are centred pairs, and a map acts from the right: `y ~ x @ W`.
Everything is solved in float64 from the second moments `x'x`, `x'y`, `y'y` and returned in float32 on the device of
the input; N < D is no special case.

- ridge: `W = (x'x + penalty I)^-1 x'y`; the penalty may be chosen by generalised cross-validation (Golub, Heath &
  Wahba 1979), which needs one eigendecomposition for all penalties.
- canonical correlations: with covariances C of the rows in their first `rank` principal directions, shrunk towards a
  multiple of the identity, the singular value decomposition of `C_xx^-1/2 C_xy C_yy^-1/2` (Hotelling 1936).
- Procrustes: the orthogonal `R` with the least `|x R - y|` (Schonemann 1966).
- Gaussian transport: the linear map that takes N(0, A) to N(0, B) at the least squared distance (Olkin & Pukelsheim
  1982), `A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

_CHUNK = 65536
_PENALTIES = torch.logspace(-7, 2, 181, dtype=torch.float64)  # in units of the largest eigenvalue of x'x


def second_moment(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`x' y` (or `x' x`) in float64, added up over chunks of rows so that the rows are never copied at once.

    Args:
        x: `(N, D_x)`.
        y: `(N, D_y)`, `x` if None.

    Returns:
        `(D_x, D_y)` float64.

    Raises:
        ValueError: the two are not matrices with equally many rows.
    """
    y = x if y is None else y
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"got shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (N, D_x) and (N, D_y) pairs")
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=_wide_device(x))
    for start in range(0, len(x), _CHUNK):
        a = _wide(x[start : start + _CHUNK])
        total += a.T @ (a if y is x else _wide(y[start : start + _CHUNK]))
    return total


def ridge(x: Tensor, y: Tensor, penalty: float | Literal["auto"] = "auto") -> Tensor:
    """The ridge map `W = (x'x + penalty I)^-1 x'y` of centred pairs.

    Args:
        x: `(N, D_x)` centred rows.
        y: `(N, D_y)` centred rows.
        penalty: Added to the diagonal of `x'x` (a sum over rows, not a mean); `"auto"`: `ridge_penalty_gcv`. At 0 the
            solution of least norm.

    Returns:
        `(D_x, D_y)` float32.

    Raises:
        ValueError: a negative penalty, or shapes that are not pairs.
    """
    values, vectors, projected = _spectrum(x, y)
    if penalty == "auto":
        penalty = _gcv_minimum(values, projected, _total(y), len(x))
    elif not 0 <= float(penalty) < math.inf:
        raise ValueError(f"ridge: got penalty {penalty}, expected a number >= 0 or 'auto'")
    denominator = values + penalty
    shrunk = torch.where(denominator > values[-1] * 1e-12, 1 / denominator, 0.0)  # at penalty 0, the pseudo-inverse
    return _narrow((vectors * shrunk) @ projected, x)


def ridge_from_moments(xx: Tensor, xy: Tensor, yy: Tensor, number: int) -> Tensor:
    """As `ridge` with penalty `"auto"`, from the second moments of `number` centred pairs; `(D_x, D_y)` float64."""
    values, vectors = torch.linalg.eigh(xx)
    values, projected = values.clamp_min(0), vectors.T @ xy
    penalty = _gcv_minimum(values, projected, float(yy.trace()), number)
    return (vectors / (values + penalty).clamp_min(values[-1] * 1e-12)) @ projected


def ridge_penalty_gcv(x: Tensor, y: Tensor) -> float:
    """The ridge penalty that minimises the generalised cross-validation score `N RSS / (N - 1 - df)^2`.

    One degree of freedom goes to the mean that the caller removed. Penalties run over nine decades in steps of 12 %.

    Args:
        x: `(N, D_x)` centred rows.
        y: `(N, D_y)` centred rows.
    """
    values, _, projected = _spectrum(x, y)
    return _gcv_minimum(values, projected, _total(y), len(x))


def canonical_correlations(x: Tensor, y: Tensor, rank: int, shrinkage: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Regularised canonical correlation analysis of centred pairs.

    Args:
        x: `(N, D_x)` centred rows.
        y: `(N, D_y)` centred rows.
        rank: Principal directions kept of each side before the analysis; at most what the rows span is used.
        shrinkage: In [0, 1]: each covariance becomes `(1 - s) C + s trace(C) / rank I`.

    Returns:
        `(W_x (D_x, k), W_y (D_y, k), correlations (k,))` float32, correlations in [0, 1], descending. Without
        shrinkage `x W_x` and `y W_y` are white and `(x W_x)' (y W_y) / N` is the diagonal of correlations.

    Raises:
        ValueError: rank < 1, shrinkage outside [0, 1], or shapes that are not pairs.
    """
    values_x, basis_x = principal_directions(second_moment(x) / len(x), rank)
    values_y, basis_y = principal_directions(second_moment(y) / len(y), rank)
    cross = basis_x.T @ (second_moment(x, y) / len(x)) @ basis_y
    w_x, w_y, correlations = canonical_in_basis(values_x, values_y, cross, shrinkage)
    return _narrow(basis_x @ w_x, x), _narrow(basis_y @ w_y, y), _narrow(correlations, x)


def principal_directions(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues (k,), descending, and their directions (D, k); fewer where the rest is zero."""
    if rank < 1:
        raise ValueError(f"canonical correlations: got rank {rank}, expected at least 1")
    values, vectors = torch.linalg.eigh(covariance)
    k = max(1, min(rank, int((values > values[-1] * 1e-10).sum())))
    return values[-k:].flip(0), vectors[:, -k:].flip(1)


def canonical_in_basis(
    values_x: Tensor, values_y: Tensor, cross: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical correlations in principal coordinates, so that many ranks and shrinkages share the eigenvectors.

    Args:
        values_x: `(K_x,)` variances along the principal directions of x.
        values_y: `(K_y,)` those of y.
        cross: `(K_x, K_y)` covariance of the principal coordinates.
        shrinkage: As in `canonical_correlations`.

    Returns:
        `(W_x (K_x, k), W_y (K_y, k), correlations (k,))` with k the smaller of the two.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"canonical correlations: got shrinkage {shrinkage}, expected 0 to 1")
    p_x, p_y = (((1 - shrinkage) * v + shrinkage * v.mean()).clamp_min(1e-300).rsqrt() for v in (values_x, values_y))
    u, s, vt = torch.linalg.svd(p_x[:, None] * cross * p_y, full_matrices=False)
    return p_x[:, None] * u, p_y[:, None] * vt.T, s.clamp(0, 1)


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The orthogonal map of least `|x R - y|`; with unequal dimensions the semi-orthogonal one of most `<x R, y>`.

    Args:
        x: `(N, D_x)` centred rows.
        y: `(N, D_y)` centred rows.

    Returns:
        `(D_x, D_y)` float32 with orthonormal rows or columns, whichever are fewer.
    """
    u, _, vt = torch.linalg.svd(second_moment(x, y), full_matrices=False)
    return _narrow(u @ vt, x)


def gaussian_transport(cov_from: Tensor, cov_to: Tensor) -> Tensor:
    """The symmetric map `T` with `T cov_from T = cov_to` that moves N(0, cov_from) the least.

    Where `cov_from` is singular, its null space is mapped to zero, and only the part of `cov_to` that its range can
    reach is reproduced.

    Args:
        cov_from: `(D, D)` symmetric, positive semi-definite.
        cov_to: `(D, D)` likewise.

    Returns:
        `(D, D)` float32, symmetric.

    Raises:
        ValueError: the two are not square matrices of one size.
    """
    if cov_from.ndim != 2 or cov_from.shape[0] != cov_from.shape[1] or cov_from.shape != cov_to.shape:
        shapes = f"{tuple(cov_from.shape)} and {tuple(cov_to.shape)}"
        raise ValueError(f"gaussian_transport: got shapes {shapes}, expected two square matrices of one size")
    values, vectors = torch.linalg.eigh(_wide(cov_from))
    keep = values > values[-1].clamp_min(0) * 1e-10
    root = values[keep].sqrt()
    basis = vectors[:, keep]
    inner = root[:, None] * (basis.T @ _wide(cov_to) @ basis) * root
    inner_values, inner_vectors = torch.linalg.eigh(inner)
    half = (inner_vectors * inner_values.clamp_min(0).sqrt()) @ inner_vectors.T
    return _narrow(basis @ (half / root[:, None] / root) @ basis.T, cov_from)


def restoring_scale(predicted: Tensor, target: Tensor) -> float:
    """The scalar that gives `predicted` (N, D) the total variance of `target` (M, D), each about its own mean."""
    spread = [_total(rows - rows.mean(0)) / len(rows) for rows in (predicted, target)]
    if spread[0] <= 0:
        raise ValueError("restoring_scale: the predicted rows are all equal, so no scale restores their variance")
    return math.sqrt(spread[1] / spread[0])


def _spectrum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (ascending, >= 0) and vectors V of `x'x`, and `V' x'y`."""
    values, vectors = torch.linalg.eigh(second_moment(x))
    return values.clamp_min(0), vectors, vectors.T @ second_moment(x, y)


def _gcv_minimum(values: Tensor, projected: Tensor, total: float, n: int) -> float:
    """RSS = |y|^2 - sum_i p_i (e_i + 2 l) / (e_i + l)^2 and df = sum_i e_i / (e_i + l), with p_i = |V_i' x'y|^2."""
    if values[-1] <= 0:
        return 1.0
    penalty = (_PENALTIES.to(values.device) * values[-1])[:, None]
    power = projected.square().sum(1)
    residual = (total - (power * (values + 2 * penalty) / (values + penalty) ** 2).sum(1)).clamp_min(0)
    left = n - 1 - (values / (values + penalty)).sum(1)
    # With N <= D both sides of the ratio vanish at penalty 0: what leaves no degrees of freedom is no candidate. Where
    # the score cannot tell (isotropic rows), the larger penalty is the safer one.
    score = torch.where(left > 0.01 * n, residual / left.clamp_min(1e-12) ** 2, torch.inf)
    return float(penalty[(score <= score.min() * (1 + 1e-9)).nonzero().max()])


def _total(rows: Tensor) -> float:
    """The sum of squares in float64."""
    return sum(float(_wide(part).square().sum()) for part in rows.split(_CHUNK))


def _wide_device(x: Tensor) -> torch.device:
    """Apple's GPUs have no float64: their rows are solved on the CPU."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(_wide_device(x)).to(torch.float64)


def _narrow(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.float32).to(like.device)
