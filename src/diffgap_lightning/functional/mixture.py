r"""A mixture of Gaussians with one common covariance, fitted by EM: rows that gather around many concepts.

    p(z) = sum_k pi_k N(z; m_k, W)

One covariance is known well however few rows a component has, and with it every density is a matrix product. What a
component's mean cannot know from its n_k rows it takes from all of them (empirical Bayes): with the covariance B of the
means, each mean is the posterior one under m_k ~ N(m, B), so that directions in which the components hardly differ are
shared. In the basis where W = I and B = diag(b) that is a factor b / (b + 1 / n_k) for each coordinate.

Held-out rows decide how many components there are: the most that are allowed, a quarter of them and so on are tried,
each from rows drawn at random and on `rows_each` rows a component, and the best one is finished on all rows. On a few
hundred rows one Gaussian is usually all that is found.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffgap_lightning.functional.linear import second_moment

_CHUNK = 8192
_LEAST_ROWS = 2.0  # a component with fewer rows is dropped


class Mixture(NamedTuple):
    """`p(z) = sum_k exp(log_weight_k) N(z; mean_k, covariance)`.

    Attributes:
        log_weight: `(K,)`.
        mean: `(K, d)`.
        covariance: `(d, d)`.
    """

    log_weight: Tensor
    mean: Tensor
    covariance: Tensor

    def joint(self, z: Tensor) -> Tensor:
        """`log pi_k + log N(z; m_k, W)` less `d log(2 pi) / 2`, `(N, K)`."""
        root = torch.linalg.cholesky(torch.linalg.inv(self.covariance.double())).to(z)
        y, m = z @ root, self.mean.to(z) @ root
        bias = self.log_weight.to(z) - 0.5 * m.square().sum(1) + root.diagonal().log().sum()
        return torch.addmm(bias - 0.5 * y.square().sum(1, keepdim=True), y, m.T)

    def log_density(self, z: Tensor) -> Tensor:
        """`log p(z)` less the constant, `(N,)`."""
        return torch.cat([self.joint(chunk).logsumexp(1) for chunk in z.split(_CHUNK)])

    def responsibilities(self, z: Tensor) -> Tensor:
        """`p(k | z)`, `(N, K)`."""
        return self.joint(z).softmax(1)

    def reordered(self, order: Tensor) -> Mixture:
        """The mixture of the coordinates in another order `(d,)`."""
        return Mixture(self.log_weight, self.mean[:, order], self.covariance[order][:, order])

    def marginal(self, coordinates: slice) -> Mixture:
        """The mixture of some of the coordinates."""
        return Mixture(self.log_weight, self.mean[:, coordinates], self.covariance[coordinates, coordinates])


def fit_mixture(
    rows: Tensor,
    held: Tensor,
    max_components: int,
    generator: torch.Generator,
    rows_each: int = 32,
    iterations: int = 10,
    max_rows: int = 400_000,
) -> Mixture:
    """Fit a mixture whose number of components held-out rows decide.

    Args:
        rows: `(N, d)`.
        held: `(M, d)` other rows.
        max_components: K is at most this, and at most a quarter of the rows.
        generator: Of the splits and of the rows that are looked at, on the CPU.
        rows_each: Rows a component on which splits are learned.
        iterations: Of EM after each split.
        max_rows: Rows that are used, drawn at random.
    """
    chosen = torch.randperm(len(rows), generator=generator)[:max_rows]
    rows = rows[chosen.to(rows.device)]
    best = _maximise(rows.mean(0, keepdim=True), rows.new_tensor([float(len(rows))]), second_moment(rows), len(rows))
    single, likelihood = best, float(best.log_density(held).mean())
    for number in _sizes(min(max_components, len(rows) // 4)):
        some = rows[: max(rows_each * number, 100 * rows.shape[1])]
        start = Mixture(rows.new_full((number,), -math.log(number)), rows[:number], single.covariance)
        mixture = _iterate(start, some, iterations)
        found = float(mixture.log_density(held).mean())
        if found > likelihood:
            best, likelihood = mixture, found
    return _iterate(best, rows, 2) if len(best.mean) > 1 else best


def _sizes(most: int) -> list[int]:
    """Numbers of components to try: `most`, a quarter of it and so on, ascending."""
    return sorted(most // 4**i for i in range(16) if most // 4**i > 1)


def _iterate(mixture: Mixture, rows: Tensor, iterations: int) -> Mixture:
    """EM on `(N, d)` rows."""
    moment = second_moment(rows)
    for _ in range(iterations):
        total, count = torch.zeros_like(mixture.mean), torch.zeros_like(mixture.log_weight)
        for chunk in rows.split(_CHUNK):
            share = mixture.responsibilities(chunk)
            count += share.sum(0)
            total += share.T @ chunk
        kept = count >= _LEAST_ROWS
        mixture = _maximise(total[kept] / count[kept, None], count[kept], moment, len(rows))
    return mixture


def _maximise(mean: Tensor, count: Tensor, moment: Tensor, number: int) -> Mixture:
    """Weights, covariance and shrunk means from the components' rows.

    Args:
        mean: `(K, d)` of each component's rows.
        count: `(K,)` how many these are.
        moment: Second moment of all rows `(d, d)`, float64.
        number: How many all rows are.
    """
    num_components, dim = mean.shape
    n, m = count.double(), mean.double()
    centre = (n[:, None] * m).sum(0) / n.sum()
    within = (moment - (n[:, None] * m).T @ m) / max(number - num_components, 1)
    share = dim / (dim + number)
    within *= 1 - share
    within.diagonal().add_(share * within.trace() / dim)
    if num_components > 1:
        root = torch.linalg.cholesky(within)
        white = torch.linalg.solve_triangular(root, (m - centre).T, upper=False)  # (d, K): W is the identity
        b, basis = torch.linalg.eigh((white * n) @ white.T / number)
        b = (b - num_components / number).clamp(min=0)[:, None]
        m = centre + (root @ basis @ (b / (b + 1 / n) * (basis.T @ white))).T
    return Mixture((count / count.sum()).log(), m.to(mean), within.to(mean))
