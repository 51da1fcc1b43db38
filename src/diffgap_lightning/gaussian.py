"""The best denoiser that needs no training: the exact answer if target and condition were jointly Gaussian.

With a ridge map W from the condition c to the target and the residual covariance S = cov(x0 - cW),

    mean(c) = c W,      x0(x_t, c) = mean + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha mean),

and without a condition the same with mean 0 and S the target's covariance. At high noise it is the ridge bridge, at
low noise it returns its input, and sampling with it draws from the Gaussian posterior. The network learns what is left:
whatever is not Gaussian. On a few hundred pairs that is little, and a model that starts here cannot be worse than the
closed form by having too few of them.

Where pairs are few, the mean may be a Gaussian process instead (`functional.kernel`): a linear guess, and what a kernel
over the training conditions adds. It is taken if it predicts pairs of unseen ids better than ridge does.

S is measured on leave-one-out residuals, r / (1 - h) with the ridge leverages h, because training residuals are too
small; both covariances are shrunk towards a multiple of the identity by R / (R + N), the weight of R prior rows.
Its products are kept out of autocast: at low noise the estimate is the input, and has to be it to more than two digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.functional.kernel import kernel, kernel_regression, leave_out_residual, unit_rows
from diffgap_lightning.functional.linear import ridge, ridge_penalty_gcv, second_moment

_CHUNK = 65536  # rows in float64 at once


class GaussianDenoiser(nn.Module):
    """Closed-form conditional and unconditional denoiser in space coordinates.

    Args:
        condition_dim: Coordinates R_c of the condition.
        target_dim: Coordinates R_t of the target.
        num_anchors: Training conditions that the mean's kernel knows; 0: the mean is linear.
    """

    weight: Tensor
    anchors: Tensor
    dual: Tensor
    basis: Tensor
    variance: Tensor

    def __init__(self, condition_dim: int, target_dim: int, num_anchors: int = 0) -> None:
        super().__init__()
        self.penalty: float | None = None  # of the process, if `fit` took one
        self.register_buffer("weight", torch.zeros(condition_dim, target_dim))
        self.register_buffer("anchors", torch.zeros(num_anchors, condition_dim))
        self.register_buffer("dual", torch.zeros(num_anchors, target_dim))
        # Eigenvectors and variances of the two covariances; rows: 0 conditional (residual), 1 unconditional (target).
        self.register_buffer("basis", torch.eye(target_dim).repeat(2, 1, 1))
        self.register_buffer("variance", torch.ones(2, target_dim))

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        condition: Tensor,
        target: Tensor,
        guess: Tensor | None = None,
        units: Tensor | None = None,
        penalty: float | None = None,
    ) -> GaussianDenoiser:
        """Fit on positive pairs of coordinates, `(P, R_c)` and `(P, R_t)`, whose means are (about) zero.

        Args:
            condition: `(P, R_c)`.
            target: `(P, R_t)`.
            guess: `(R_c, R_t)`, the linear map that the Gaussian process corrects; without it, the mean is ridge.
            units: `(P,)` integers, with `guess`: what new data will bring anew, such as clips.
            penalty: Of the process, which is then taken as it is; None: chosen, as is whether ridge does better.
        """
        weight, residual = _ridge(condition, target)
        anchors, dual = condition[:0], target[:0]
        if guess is not None and units is not None:
            choices = {} if penalty is None else {"penalties": (penalty,)}
            process = kernel_regression(condition, target, condition @ guess, units, **choices)
            if penalty or process.residual.square().sum() < _ridge_leave_out(condition, target, units).square().sum():
                weight, residual = process.share * guess, process.residual
                anchors, dual, penalty = process.anchors, process.dual, process.penalty
        self = cls(condition.shape[1], target.shape[1], len(anchors)).to(target.device)
        self.penalty = penalty
        for name, value in (("weight", weight), ("anchors", anchors), ("dual", dual)):
            getattr(self, name).copy_(value)
        self.measure(residual, target)
        return self

    def measure(self, residual: Tensor, target: Tensor) -> None:
        """Take the covariances of residuals and of targets, both `(P, R_t)`."""
        for i, rows in enumerate((residual, target)):
            variance, basis = torch.linalg.eigh(shrunk_covariance(rows))
            self.variance[i].copy_(variance.clamp(min=1e-6))
            self.basis[i].copy_(basis)

    def mean(self, condition: Tensor, keep: Tensor | None = None) -> Tensor:
        """The prediction `(B, R_t)`; zero where `keep` `(B,)` is False."""
        with torch.autocast(condition.device.type, enabled=False):
            condition = condition.to(self.weight.dtype)
            mean = condition @ self.weight
            if len(self.anchors) > 0:
                mean = mean + kernel(unit_rows(condition), self.anchors) @ self.dual
        return mean if keep is None else mean * keep[:, None]

    def residual(self, x_t: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor, keep: Tensor | None = None) -> Tensor:
        """Expected x0 minus `mean`, `(B, R_t)`, given the noisy `x_t`.

        Args:
            x_t: `(B, R_t)`.
            mean: `(B, R_t)` from `mean`.
            alpha: Weight of the signal, `(B, 1)`.
            sigma: Weight of the noise, `(B, 1)`.
            keep: `(B,)` bool, False where the condition is dropped; None keeps all.
        """
        offset = x_t - alpha * mean
        conditional = self._filter(offset, alpha, sigma, 0)
        if keep is None:
            return conditional
        return torch.where(keep[:, None], conditional, self._filter(offset, alpha, sigma, 1))

    def _filter(self, offset: Tensor, alpha: Tensor, sigma: Tensor, index: int) -> Tensor:
        basis, variance = self.basis[index], self.variance[index]
        gain = alpha * variance / (alpha.square() * variance + sigma.square())
        with torch.autocast(offset.device.type, enabled=False):
            return ((offset.to(basis.dtype) @ basis) * gain) @ basis.T


def _ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The map `(R_x, R_y)`, and the residual of every row under the map fitted without it."""
    penalty = ridge_penalty_gcv(x, y)
    weight = ridge(x, y, penalty)
    return weight, (y - x @ weight) / (1 - _leverages(x, penalty))[:, None]


def _ridge_leave_out(x: Tensor, y: Tensor, units: Tensor) -> Tensor:
    """As `_ridge`'s residuals, but without all rows of the unit, in the dual form of few rows."""
    gram = x.double() @ x.double().T
    gram.diagonal().add_(ridge_penalty_gcv(x, y))
    inverse = torch.linalg.inv(gram)
    return leave_out_residual(inverse, inverse @ y.double(), units)


def _leverages(x: Tensor, penalty: float) -> Tensor:
    """Diagonal of the ridge hat matrix `x (x'x + penalty I)^-1 x'`, `(P,)`, kept below 0.9."""
    gram = second_moment(x)
    gram.diagonal().add_(penalty)
    inverse = torch.linalg.inv(gram)
    wide = (chunk.to(inverse) for chunk in x.split(_CHUNK))
    return torch.cat([((chunk @ inverse) * chunk).sum(1) for chunk in wide]).clamp(0, 0.9).to(x)


def shrunk_covariance(rows: Tensor, num_pairs: int | None = None) -> Tensor:
    """Second moment `(R, R)` of rows `(N, R)`, shrunk to a multiple of the identity as that of `num_pairs` (N) is."""
    n, dim = rows.shape
    covariance = second_moment(rows) / n
    share = dim / (dim + (num_pairs or n))
    prior = covariance.trace() / dim
    covariance *= 1 - share
    covariance.diagonal().add_(share * prior)
    return covariance
