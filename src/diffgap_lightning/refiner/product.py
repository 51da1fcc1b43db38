"""Several sources of one target at once: the product of their posteriors.

If sources c_1 ... c_K were independent given the target x0,

    p(x0 | x_t, c_1 ... c_K)  ~  p(x0 | x_t) prod_k p(x0 | x_t, c_k) / p(x0 | x_t).

With each factor taken as a Gaussian around what its direction's denoiser estimates, and precisions from the closed
forms (S_k the residual covariance of direction k, C the target's covariance, snr = alpha^2 / sigma^2),

    L_0 = C^-1 + snr I,    D_k = (S_k^-1 - C^-1)_+,    L = L_0 + sum_k D_k,
    x0 = L^-1 (L_0 x0_none + sum_k [(L_0 + D_k) x0_k - L_0 x0_none]).

D_k is what source k adds to the precision, kept from being negative by rounding or shrinkage. At t = 1 this is the
precision-weighted mean of the posterior means, at low noise the sum of scores (composed diffusion, Liu et al. 2022); of
one source it is that source's estimate, and where everything is Gaussian it is exact. Sources that repeat each other
are not independent given the target: the product then counts twice what they share, and is too sure of itself.

Pairs are all it needs: no clip has to have all modalities in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.diffusion.guidance import Denoise, guide


class PosteriorProduct:
    """Denoiser of a target given several sources.

    Args:
        cdms: Each source's module towards the same target, in the same coordinates.
        conditions: Each source's coordinates `(B, R_k)`.
    """

    def __init__(self, cdms: Sequence[ContrastiveDiffusion], conditions: Sequence[Tensor]) -> None:
        if not cdms or len(cdms) != len(conditions):
            raise ValueError(f"sources: got {len(cdms)} directions and {len(conditions)} conditions, expected as many")
        self.cdms, self.conditions = cdms, conditions
        # The target's covariance was measured once for each pair of modalities, on the rows of that pair.
        self.prior = torch.stack([_precision(cdm, 1) for cdm in cdms]).mean(0)
        self.gains = [_positive_part(_precision(cdm, 0) - self.prior) for cdm in cdms]

    def posterior_mean(self) -> Tensor:
        """E[x0 | all conditions], `(B, R_t)`."""
        means = [cdm.posterior_mean(c) for cdm, c in zip(self.cdms, self.conditions, strict=True)]
        return self._join(self.prior, torch.zeros_like(means[0]), means)

    def explained(self) -> tuple[float, list[float]]:
        """Share of the target's variance that the Gaussian posterior mean holds: with all sources, with each alone."""
        covariance = torch.linalg.inv(self.prior)
        total = float(covariance.trace())

        def share(gain: Tensor) -> float:
            return 1 - float(torch.linalg.inv(self.prior + gain).trace()) / total

        return share(torch.stack(self.gains).sum(0)), [share(gain) for gain in self.gains]

    def denoiser(self, guidance_scale: float = 1.0) -> Denoise:
        """The function of `(x_t, t)` that the samplers call."""

        def unconditional(x_t: Tensor, t: Tensor) -> Tensor:
            none = torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
            times = t.expand(len(x_t))
            estimates = [cdm(x_t, times, c, none) for cdm, c in zip(self.cdms, self.conditions, strict=True)]
            return torch.stack(estimates).mean(0)

        def conditional(x_t: Tensor, t: Tensor) -> Tensor:
            times = t.expand(len(x_t))
            estimates = [cdm(x_t, times, c) for cdm, c in zip(self.cdms, self.conditions, strict=True)]
            if len(estimates) == 1:
                return estimates[0]
            alpha, sigma = self.cdms[0].schedule.alpha_sigma(t)
            snr = (alpha / sigma).square().to(self.prior)
            precision = self.prior + snr * torch.eye(len(self.prior), dtype=self.prior.dtype, device=x_t.device)
            return self._join(precision, unconditional(x_t, t), estimates)

        return guide(conditional, unconditional, guidance_scale)

    def _join(self, precision: Tensor, base: Tensor, estimates: Sequence[Tensor]) -> Tensor:
        """The mean of the product; `precision` `(R, R)` is that of `base` `(B, R)`, the estimate without a source."""
        wide = base.to(precision)
        total = wide @ precision
        for gain, estimate in zip(self.gains, estimates, strict=True):
            total = total + estimate.to(precision) @ (precision + gain) - wide @ precision
        return torch.linalg.solve(precision + torch.stack(self.gains).sum(0), total.T).T.to(base.dtype)


def presence_groups(present: Mapping[str, Tensor], num_rows: int) -> list[tuple[tuple[str, ...], Tensor]]:
    """Rows that have the same sources: `(sources, row numbers)`, those with the most sources first.

    Args:
        present: Source to `(B,)` bool.
        num_rows: B.

    Raises:
        ValueError: a row without any source.
    """
    names = list(present)
    masks = torch.stack([present[name] for name in names], dim=1).cpu()
    empty = (~masks.any(dim=1)).nonzero()[:, 0]
    if len(empty):
        raise ValueError(f"present: row {int(empty[0])} of {num_rows} has no source, expected at least one a row")
    patterns, inverse = torch.unique(masks, dim=0, return_inverse=True)
    order = sorted(range(len(patterns)), key=lambda k: -int(patterns[k].sum()))
    return [
        (
            tuple(n for n, there in zip(names, patterns[k].tolist(), strict=True) if there),
            (inverse == k).nonzero()[:, 0],
        )
        for k in order
    ]


def _precision(cdm: ContrastiveDiffusion, index: int) -> Tensor:
    """Inverse of the closed form's covariance `(R, R)` float64: 0 conditional, 1 unconditional."""
    basis, variance = cdm.closed_form.basis[index].double(), cdm.closed_form.variance[index].double()
    return (basis / variance) @ basis.T


def _positive_part(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0)) @ vectors.T
