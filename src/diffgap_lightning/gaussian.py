"""The best denoiser that needs no training: the exact answer if target and condition were jointly Gaussian.

With a ridge map W from the condition c to the target and the residual covariance S = cov(x0 - cW),

    mean(c) = c W,      x0(x_t, c) = mean + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha mean),

and without a condition the same with mean 0 and S the target's covariance. At high noise it is the ridge bridge, at
low noise it returns its input, and sampling with it draws from the Gaussian posterior. The network learns what is left:
whatever is not Gaussian. On a few hundred pairs that is little, and a model that starts here cannot be worse than the
closed form by having too few of them.

S is measured on leave-one-out residuals, r / (1 - h) with the ridge leverages h, because training residuals are too
small; both covariances are shrunk towards a multiple of the identity by R / (R + N), the weight of R prior rows.
Its products are kept out of autocast: at low noise the estimate is the input, and has to be it to more than two digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.functional.linear import ridge, ridge_penalty_gcv, second_moment

_CHUNK = 65536  # rows in float64 at once


class GaussianDenoiser(nn.Module):
    """Closed-form conditional and unconditional denoiser in space coordinates.

    Args:
        condition_dim: Coordinates R_c of the condition.
        target_dim: Coordinates R_t of the target.
    """

    weight: Tensor
    basis: Tensor
    variance: Tensor

    def __init__(self, condition_dim: int, target_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(condition_dim, target_dim))
        # Eigenvectors and variances of the two covariances; rows: 0 conditional (residual), 1 unconditional (target).
        self.register_buffer("basis", torch.eye(target_dim).repeat(2, 1, 1))
        self.register_buffer("variance", torch.ones(2, target_dim))

    @classmethod
    @torch.no_grad()
    def fit(cls, condition: Tensor, target: Tensor) -> GaussianDenoiser:
        """Fit on positive pairs of coordinates, `(P, R_c)` and `(P, R_t)`, whose means are (about) zero."""
        self = cls(condition.shape[1], target.shape[1]).to(target.device)
        penalty = ridge_penalty_gcv(condition, target)
        self.weight.copy_(ridge(condition, target, penalty))
        residual = (target - self.mean(condition)) / (1 - _leverages(condition, penalty))[:, None]
        for i, rows in enumerate((residual, target)):
            variance, basis = torch.linalg.eigh(_shrunk_covariance(rows))
            self.variance[i].copy_(variance.clamp(min=1e-6))
            self.basis[i].copy_(basis)
        return self

    def mean(self, condition: Tensor, keep: Tensor | None = None) -> Tensor:
        """The ridge prediction `(B, R_t)`; zero where `keep` `(B,)` is False."""
        with torch.autocast(condition.device.type, enabled=False):
            mean = condition.to(self.weight.dtype) @ self.weight
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


def _leverages(x: Tensor, penalty: float) -> Tensor:
    """Diagonal of the ridge hat matrix `x (x'x + penalty I)^-1 x'`, `(P,)`, kept below 0.9."""
    gram = second_moment(x)
    gram.diagonal().add_(penalty)
    inverse = torch.linalg.inv(gram)
    wide = (chunk.to(inverse) for chunk in x.split(_CHUNK))
    return torch.cat([((chunk @ inverse) * chunk).sum(1) for chunk in wide]).clamp(0, 0.9).to(x)


def _shrunk_covariance(rows: Tensor) -> Tensor:
    n, dim = rows.shape
    covariance = second_moment(rows) / n
    share = dim / (dim + n)
    prior = covariance.trace() / dim
    covariance *= 1 - share
    covariance.diagonal().add_(share * prior)
    return covariance
