r"""The conditional mean of a mixture of concepts, fitted on pairs.

In canonical coordinates (u, v) of two modalities let `p(u, v) = sum_k pi_k N([u, v]; [m_k, n_k], W)` (see
`functional/mixture.py`). With the shares r_k(u) = p(k | u), the mean y_k of y in component k, the regression B within
the components and the ridge map R,

    E[y | x] = a sum_k r_k(u) (y_k + (u - m_k) B) + (1 - a) x R,

which is one softmax over the concepts beside a linear map. Held-out pairs decide how many concepts there are (one is
the Gaussian case) and how much, a, they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffgap_lightning.bridges.cca_choice import best_choice, moments_of, open_choices, solve
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import ridge_from_moments
from diffgap_lightning.functional.mixture import Mixture, fit_mixture

_HELD_SHARE, _HELD_UNITS = 0.05, 2000
_ROWS_A_COMPONENT = 16
_CHUNK = 8192


class ConceptMean(NamedTuple):
    """`E[y | x] = softmax(x white centre' + bias) target + x linear` of rows less their modality's centroid.

    Attributes:
        white: `(D_x, r)`, to canonical coordinates in which every component's covariance is the identity.
        centre: `(K, r)`, the components' means there.
        bias: `(K,)`, `log pi_k - |centre_k|^2 / 2`.
        target: `(K, D_y)`.
        linear: `(D_x, D_y)`.
    """

    white: Tensor
    centre: Tensor
    bias: Tensor
    target: Tensor
    linear: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`(N, D_x)` -> `(N, D_y)`."""
        parts = [self.logits(chunk)[1].softmax(1) @ self.target + chunk @ self.linear for chunk in x.split(_CHUNK)]
        return torch.cat(parts)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """White coordinates `(N, r)`, and `log pi_k N(x; k)` less what does not depend on k `(N, K)`."""
        white = x @ self.white
        return white, torch.addmm(self.bias, white, self.centre.T)

    def log_density(self, x: Tensor) -> Tensor:
        """Logarithm of the density of the canonical coordinates of x, up to a constant, `(N,)`."""
        pairs = (self.logits(chunk) for chunk in x.split(_CHUNK))
        return torch.cat([logits.logsumexp(1) - 0.5 * white.square().sum(1) for white, logits in pairs])


@dataclass(frozen=True)
class ConceptFit:
    """What `fit_concepts` found between two modalities, x and y.

    Attributes:
        forward: E[y | x].
        backward: E[x | y].
        canonical: Canonical maps of x and y, `(D, r)` each.
        held: Pairs that were not fitted on; all of them where there are too few to hold any out.
    """

    forward: ConceptMean
    backward: ConceptMean
    canonical: tuple[Tensor, Tensor]
    held: PairedRows


def fit_concepts(rows: PairedRows, max_components: int, seed: int) -> ConceptFit:
    """Fit a mixture on centred pairs, and both conditional means."""
    out = rows.held_mask(_HELD_SHARE, _HELD_UNITS, seed)
    held, rest = (rows.of(out), ~out) if out.any() else (rows, ~out)
    moments = moments_of(rows)
    choice = best_choice(open_choices(power=1.0, centred_weight=0.0), rows, moments, seed)
    if out.any():
        moments = [m - h for m, h in zip(moments, moments_of(held), strict=True)]
    number = int(rest.sum())
    w_x, w_y, correlations = solve(choice, moments, number)
    rank = leading(correlations)
    maps = w_x[:, :rank].float(), w_y[:, :rank].float()
    i, j = rows.i[rest], rows.j[rest]
    z = torch.cat([_joint(rows, maps, a, b) for a, b in zip(i.split(_CHUNK), j.split(_CHUNK), strict=True)])
    most = min(max_components, number // _ROWS_A_COMPONENT)
    z_held = torch.cat([held.x @ maps[0], held.y @ maps[1]], 1)
    mixture = fit_mixture(z, z_held, most, torch.Generator().manual_seed(seed))
    count, mean_x, mean_y = _component_means(mixture, rows, maps, i, j)
    turned = mixture.reordered(torch.arange(2 * rank, device=z.device).roll(rank))
    means = (
        _mean_of(mixture, maps, (mean_x, mean_y), count, moments),
        _mean_of(turned, maps[::-1], (mean_y, mean_x), count, [moments[1], moments[0], moments[2].T]),
    )
    ridges = (
        ridge_from_moments(moments[0], moments[2], moments[1], number),
        ridge_from_moments(moments[1], moments[2].T, moments[0], number),
    )
    forward = _beside(means[0], ridges[0], held.x, held.y)
    return ConceptFit(forward, _beside(means[1], ridges[1], held.y, held.x), maps, held)


def leading(correlations: Tensor) -> int:
    """How many canonical correlations stand out: where two groups of equal spread tell them apart best.

    The profile likelihood of Zhu & Ghodsi (2006), with one variance: the least squared error about two means.
    """
    c = correlations.double()
    if len(c) < 3:
        return len(c)
    n = torch.arange(1, len(c), device=c.device)
    left = c.cumsum(0)[:-1]
    return int((left.square() / n + (c.sum() - left).square() / (len(c) - n)).argmax()) + 1


def _joint(rows: PairedRows, maps: tuple[Tensor, Tensor], i: Tensor, j: Tensor) -> Tensor:
    return torch.cat([rows.first[i] @ maps[0], rows.second[j] @ maps[1]], 1)


def _component_means(
    mixture: Mixture, rows: PairedRows, maps: tuple[Tensor, Tensor], i: Tensor, j: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows a component `(K,)` and the means of all coordinates in it, `(K, D_x)` and `(K, D_y)`, in float64."""
    count = torch.zeros_like(mixture.log_weight)
    x, y = (count.new_zeros(len(count), len(w)) for w in maps)
    for a, b in zip(i.split(_CHUNK), j.split(_CHUNK), strict=True):
        share = mixture.responsibilities(_joint(rows, maps, a, b))
        count += share.sum(0)
        x += share.T @ rows.first[a]
        y += share.T @ rows.second[b]
    n = count.double().clamp(min=1e-6)
    return n, x.double() / n[:, None], y.double() / n[:, None]


def _mean_of(
    mixture: Mixture, maps: tuple[Tensor, ...], means: tuple[Tensor, Tensor], count: Tensor, moments: Sequence[Tensor]
) -> ConceptMean:
    """E[y | x] of the mixture; everything comes in the order x, y, and moments as xx, yy, xy."""
    w, v = maps[0].double(), maps[1].double()
    rank = w.shape[1]
    within = [moments[k] - (means[0] * count[:, None]).T @ means[m] for k, m in ((0, 0), (2, 1))]
    slope = torch.linalg.solve(w.T @ within[0] @ w, w.T @ within[1])
    concepts = _concept_targets(means[1], mixture.mean[:, rank:].double(), v, moments[1], count)
    own = mixture.marginal(slice(rank))
    root = torch.linalg.cholesky(torch.linalg.inv(own.covariance.double()))
    m = own.mean.double()
    bias = mixture.log_weight.double() - 0.5 * (m @ root).square().sum(1)
    return ConceptMean(*(t.float() for t in (w @ root, m @ root, bias, concepts - m @ slope, w @ slope)))


def _concept_targets(means: Tensor, canonical: Tensor, v: Tensor, moment: Tensor, count: Tensor) -> Tensor:
    """Means y_k `(K, D)`: as their canonical coordinates predict, and their own where their rows support it.

    Empirical Bayes, with the share `n / (n + variance within a component / variance of the means)` of their own.
    """
    decode = torch.linalg.solve(v.T @ moment @ v, v.T @ moment)
    own = means - canonical @ decode
    number = count.sum()
    noise = (moment.trace() - (count[:, None] * means.square()).sum()) / number
    between = (count[:, None] * own.square()).sum() / number - noise * len(means) / number
    return canonical @ decode + (count / (count + noise / between.clamp(min=1e-12)))[:, None] * own


def _beside(mean: ConceptMean, ridge: Tensor, x: Tensor, y: Tensor) -> ConceptMean:
    """The combination with the ridge map that has the least squared error on pairs."""
    linear = ridge.to(mean.linear)
    rest = x @ linear
    step = mean(x) - rest
    a = (((y - rest) * step).sum() / step.square().sum().clamp(min=1e-12)).clamp(0, 1)
    return mean._replace(target=a * mean.target, linear=a * mean.linear + (1 - a) * linear)
