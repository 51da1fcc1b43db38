r"""Kernel regression around a linear guess, and its leave-out errors without a refit.

    f(x) = s x W + sum_i exp(-rate |x/|x| - x_i/|x_i||^2) d_i,      D = (K + penalty I)^-1 (Y - s X W)

is the mean of a Gaussian process whose prior mean is `x W`, shrunk by s (Rasmussen & Williams 2006, ch. 2): far from
every training row it falls back to that guess, near them it follows their targets. Where W is the identity between two
modalities of one contrastive space, this is centring, corrected where the data know better.

Leaving out the rows I of a unit (all captions of a clip) changes their predictions to

    y_I - f_{-I}(x_I) = (P_II)^-1 (P (Y - s X W))_I,        P = (K + penalty I)^-1,

so penalty and s are chosen by the error on clips that the fit has not seen; s in closed form for each penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RATE = 1.0  # unit rows of unlike meaning lie at a squared distance of about 2: their kernel is e^-2
PENALTIES = (0.3, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class KernelRegression:
    """A fitted regression; rows `(M, D_x)` and coefficients `(M, D_y)`, in the precision of the input.

    Attributes:
        anchors: Distinct training rows of unit norm.
        dual: Their coefficients d.
        share: s.
        penalty: What was chosen, or given.
        residual: `(P, D_y)`, the target minus its prediction without its unit.
    """

    anchors: Tensor
    dual: Tensor
    share: float
    penalty: float
    residual: Tensor


def kernel_regression(
    x: Tensor, y: Tensor, guess: Tensor, units: Tensor, penalties: tuple[float, ...] = PENALTIES
) -> KernelRegression:
    """Fit on pairs of rows.

    Args:
        x: `(P, D_x)`.
        y: `(P, D_y)`.
        guess: The prior mean of every row, `x W`, `(P, D_y)`.
        units: `(P,)` integers; rows of a unit are left out together.
        penalties: What to choose from.
    """
    anchors = unit_rows(x.double())
    values, vectors = torch.linalg.eigh(kernel(anchors, anchors))
    best: tuple[float, float, float, Tensor, Tensor] | None = None
    for penalty in penalties:
        inverse = (vectors / (values.clamp(min=0) + penalty)) @ vectors.T
        solved, guessed = inverse @ y.double(), inverse @ guess.double()
        error = leave_out_residual(inverse, torch.cat([solved, guessed], 1), units)
        of_target, of_guess = error.split(y.shape[1], 1)
        weight = of_guess.square().sum()
        share = float(((of_target * of_guess).sum() / weight).clamp(0, 1)) if weight > 0 else 0.0
        residual = of_target - share * of_guess
        loss = float(residual.square().sum())
        if best is None or loss < best[0]:
            best = loss, penalty, share, residual, solved - share * guessed
    assert best is not None, "at least one penalty"
    _, penalty, share, residual, dual = best
    anchors, place = torch.unique(anchors, dim=0, return_inverse=True)
    merged = torch.zeros(len(anchors), y.shape[1], dtype=dual.dtype, device=dual.device).index_add_(0, place, dual)
    return KernelRegression(anchors.to(x), merged.to(y), share, penalty, residual.to(y))


def kernel(x: Tensor, anchors: Tensor) -> Tensor:
    """`exp(-rate |x_i - a_j|^2)` of unit rows `(N, D)`, `(M, D)`: `(N, M)`."""
    return torch.exp(-2 * RATE * (1 - x @ anchors.T))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero."""
    return torch.nn.functional.normalize(x, dim=1)


def leave_out_residual(inverse: Tensor, solved: Tensor, units: Tensor) -> Tensor:
    """`(P_II)^-1 (P Y)_I` for every unit I.

    Args:
        inverse: P, `(N, N)`, of a kernel plus its penalty.
        solved: P Y, `(N, K)`.
        units: `(N,)` integers.
    """
    out = solved / inverse.diagonal()[:, None]
    _, unit, size = torch.unique(units, return_inverse=True, return_counts=True)
    order = torch.argsort(unit, stable=True)
    for rows in order.split(size.tolist()):
        if len(rows) > 1:
            out[rows] = torch.linalg.solve(inverse[rows][:, rows], solved[rows])
    return out
