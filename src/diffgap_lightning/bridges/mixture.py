r"""A mixture of concepts as a bridge: the closed form where pairs are many.

Embeddings gather around concepts, which one Gaussian (ridge, CCA) cannot say. In canonical coordinates (u, v) of the two
modalities, `p(u, v) = sum_k pi_k N([u, v]; [m_k, n_k], W)` (see `functional/mixture.py`), so that

    E[y | x] = sum_k r_k(u) (y_k + (u - m_k) B)                  r_k(u) = p(k | u), y_k the mean of y in component k

which is one softmax over the concepts between two linear maps. How many concepts there are held-out pairs decide: one of
them is the Gaussian case.

    refine   normalise(mean_y + E[y | x] restored to the covariance of y)
    score    log p(v | x) - log p(v),   p(v | x) taken for N(E[v | x], S),   S measured on held-out pairs

The optimal score is the pointwise mutual information, and this is it up to the one approximation, which keeps it an
inner product of features of each row: [S^-1/2 E[v | x], 1, 1] and [S^-1/2 v, ...]. It has a direction; the one that
the other modality tells more surely serves better, and held-out pairs choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from diffgap_lightning.bridges.base import Bridge
from diffgap_lightning.bridges.cca_choice import best_choice, moments_of, open_choices, solve
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import gaussian_transport, second_moment
from diffgap_lightning.functional.mixture import Mixture, fit_mixture

_HELD_SHARE, _HELD_UNITS = 0.05, 2000
_ROWS_A_COMPONENT = 16
_SCALES = (0.1, 0.25, 0.5, 1.0)
_DIRECTION_WEIGHTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
_CHUNK = 8192


class MixtureBridge(Bridge):
    """Mixture of concepts in canonical coordinates.

    Args:
        max_components: The most concepts that are tried; never more than one for each 16 pairs.
        restore: How the posterior mean gets back the target's spread: by one factor (`"scale"`, faithful) or by Gaussian
            optimal transport (`"transport"`, closer to the target's distribution).
        seed: Of the held-out ids and of the fit.
    """

    least_pairs = 5000
    pair_tensors = ("weights",)
    direction_tensors = ("white", "centre", "bias", "target", "slope", "metric", "restore")

    def __init__(
        self, max_components: int = 2048, restore: Literal["scale", "transport"] = "scale", seed: int = 0
    ) -> None:
        if max_components < 1:
            raise ValueError(f"max_components: got {max_components}, expected at least 1")
        if restore not in ("scale", "transport"):
            raise ValueError(f"restore: got {restore!r}, expected 'scale' or 'transport'")
        super().__init__(max_components=max_components, restore=restore, seed=seed)

    @property
    def num_components(self) -> dict[tuple[str, str], int]:
        """Concepts found for each unordered pair."""
        return {(a, b): len(self._get(f"bias:{a}->{b}")) for a, b in self.pairs}

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        seed = self.options["seed"]
        mask = rows.held_mask(_HELD_SHARE, _HELD_UNITS, seed)
        held = rows.of(mask) if mask.any() else rows
        choice = best_choice(open_choices(power=1.0, centred_weight=0.0), rows, moments := moments_of(rows), seed)
        w_x, w_y, correlations = (t.float() for t in solve(choice, moments, len(rows.i)))
        rank = _leading(correlations)
        w_x, w_y = w_x[:, :rank], w_y[:, :rank]
        z = torch.cat([torch.cat([x @ w_x, y @ w_y], 1) for x, y in _pair_chunks(rows)])
        most = min(self.options["max_components"], len(z) // _ROWS_A_COMPONENT)
        fitted, out = (z[~mask], z[mask]) if mask.any() and not mask.all() else (z, z)
        mixture = fit_mixture(fitted, out, most, torch.Generator().manual_seed(seed))
        self._keep_directions(first, second, rows, mixture, (w_x, w_y))
        self._keep_score(first, second, held)

    def _keep_directions(
        self, first: str, second: str, rows: PairedRows, mixture: Mixture, maps: tuple[Tensor, Tensor]
    ) -> None:
        """What E[y | x] and E[x | y] need: moments of all coordinates within the components, in one pass."""
        rank = maps[0].shape[1]
        count = mixture.mean.new_zeros(len(mixture.mean))
        sums = [count.new_zeros(len(count), len(w)) for w in maps]
        for x, y in _pair_chunks(rows):
            share = mixture.responsibilities(torch.cat([x @ maps[0], y @ maps[1]], 1))
            count += share.sum(0)
            sums[0] += share.T @ x
            sums[1] += share.T @ y
        means = [s / count.clamp(min=1e-6)[:, None] for s in sums]
        moments = (second_moment(rows.x), second_moment(rows.y), second_moment(rows.x, rows.y))
        for source, target, s in ((first, second, 0), (second, first, 1)):
            t = 1 - s
            cross = moments[2] if s == 0 else moments[2].T
            within = _within(moments[s], means[s], means[s], count), _within(cross, means[s], means[t], count)
            w, v = maps[s].double(), maps[t].double()
            slope = torch.linalg.solve(w.T @ within[0] @ w, w.T @ within[1])
            own = slice(s * rank, (s + 1) * rank)
            mean = mixture.mean[:, t * rank : (t + 1) * rank].double()
            centres = _known(means[t].double(), mean, v, moments[t], count)
            marginal = mixture.marginal(own)
            root = torch.linalg.cholesky(torch.linalg.inv(marginal.covariance.double()))
            m = marginal.mean.double()
            name = f"{source}->{target}"
            self._keep(f"white:{name}", (w @ root).float())
            self._keep(f"centre:{name}", (m @ root).float())
            self._keep(f"bias:{name}", (mixture.log_weight - 0.5 * (m @ root).square().sum(1)).float())
            self._keep(f"target:{name}", (centres - m @ slope).float())
            self._keep(f"slope:{name}", torch.linalg.solve(root, slope).float())
            self._keep(f"metric:{name}", v.float())
            self._keep(f"restore:{name}", self._restoring(rows.x if s == 0 else rows.y, moments[t] / len(rows.i), name))

    def _restoring(self, x: Tensor, covariance: Tensor, name: str) -> Tensor:
        """Factor, or matrix, that brings E[y | x] to the covariance of y."""
        mean = self._expected(x[:: max(1, len(x) // 20_000)], *name.split("->"))
        if self.options["restore"] == "scale":
            return (covariance.trace() / mean.double().square().sum(1).mean().clamp(min=1e-12)).sqrt().float()
        return gaussian_transport(second_moment(mean) / len(mean), covariance).float()

    def _keep_score(self, first: str, second: str, held: PairedRows) -> None:
        """The metric S^-1/2 of each direction and how much the directions count, from held-out pairs."""
        for source, target, x, y in ((first, second, held.x, held.y), (second, first, held.y, held.x)):
            canonical = self._get(f"metric:{source}->{target}")
            error = (y - self._expected(x, source, target)) @ canonical
            covariance = second_moment(error) / len(error)
            share = len(canonical.T) / (len(canonical.T) + len(error))
            covariance = (1 - share) * covariance + share * torch.diag(covariance.diagonal())
            root = torch.linalg.cholesky(torch.linalg.inv(covariance))
            self._keep(f"metric:{source}->{target}", (canonical.double() @ root).float())
        positive = held.first_ids[:, None] == held.second_ids
        scores = [
            self._likelihood(held.first, first, *d) @ self._likelihood(held.second, second, *d).T
            for d in ((first, second), (second, first))
        ]
        losses = {w: _contrastive_loss(w[0] * scores[0] + w[1] * scores[1], positive) for w in _DIRECTION_WEIGHTS}
        best = min(losses, key=losses.__getitem__)
        self._keep(f"weights:{first}->{second}", torch.tensor(best, device=positive.device))

    def _logits(self, x: Tensor, source: str, target: str) -> tuple[Tensor, Tensor]:
        """White canonical coordinates `(N, r)` of source rows, and log pi_k N(.) less their common terms `(N, K)`."""
        name = f"{source}->{target}"
        white = x @ self._get(f"white:{name}")
        return white, torch.addmm(self._get(f"bias:{name}"), white, self._get(f"centre:{name}").T)

    def _expected(self, x: Tensor, source: str, target: str) -> Tensor:
        """`E[y | x]` `(N, D_target)` of centred rows."""
        name, parts = f"{source}->{target}", []
        for chunk in x.split(_CHUNK):
            white, logits = self._logits(chunk, source, target)
            parts.append(logits.softmax(1) @ self._get(f"target:{name}") + white @ self._get(f"slope:{name}"))
        return torch.cat(parts)

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        restore = self._get(f"restore:{source}->{target}")
        mean = self._expected(x, source, target)
        return mean @ restore if restore.ndim == 2 else mean * restore

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        first, second = self._pair(source, target)
        weights = self._get(f"weights:{first}->{second}").tolist()
        directions = ((first, second), (second, first))
        parts = [
            w**0.5 * self._likelihood(x, modality, *d) for w, d in zip(weights, directions, strict=True) if w > 0
        ]
        return torch.cat(parts, dim=1)

    def _likelihood(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        """Features of log p(target row | source row) - log p(target row), of centred rows of either, `(N, r + 2)`."""
        metric = self._get(f"metric:{source}->{target}")
        if modality == source:
            mean = self._expected(x, source, target) @ metric
            return torch.cat([mean, -0.5 * mean.square().sum(1, keepdim=True), torch.ones_like(mean[:, :1])], dim=1)
        own = x @ metric
        density = [
            (logits.logsumexp(1) - 0.5 * white.square().sum(1))[:, None]
            for white, logits in (self._logits(chunk, target, source) for chunk in x.split(_CHUNK))
        ]
        one = torch.ones_like(own[:, :1])
        return torch.cat([own, one, -0.5 * own.square().sum(1, keepdim=True) - torch.cat(density)], dim=1)


def _pair_chunks(rows: PairedRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Aligned rows of both modalities, some thousands at a time."""
    for i, j in zip(rows.i.split(_CHUNK), rows.j.split(_CHUNK), strict=True):
        yield rows.first[i], rows.second[j]


def _within(moment: Tensor, a: Tensor, b: Tensor, count: Tensor) -> Tensor:
    """What a second moment over all rows leaves within the components of means `a` and `b`."""
    return moment - (a * count[:, None]).double().T @ b.double()


def _known(means: Tensor, canonical: Tensor, to_canonical: Tensor, moment: Tensor, count: Tensor) -> Tensor:
    """Means `(K, D)` of the components: as their canonical coordinates predict, and their own where rows support that.

    Empirical Bayes: with the share `n / (n + spread within a component / spread of the means)` of what is their own.
    """
    decode = torch.linalg.solve(to_canonical.T @ moment @ to_canonical, to_canonical.T @ moment)
    own = means - canonical @ decode
    n, number = count.double(), float(count.sum())
    noise = (moment.trace() - (n[:, None] * means.square()).sum()) / number
    between = (n[:, None] * own.square()).sum() / number - noise * len(means) / number
    return canonical @ decode + (n / (n + noise / between.clamp(min=1e-12)))[:, None] * own


def _leading(correlations: Tensor) -> int:
    """How many canonical correlations stand out: where two groups of equal spread tell them apart best.

    The profile likelihood of Zhu & Ghodsi (2006), with one variance: the least squared error about two means.
    """
    c = correlations.double()
    if len(c) < 3:
        return len(c)
    n = torch.arange(1, len(c), device=c.device)
    left = c.cumsum(0)[:-1]
    return int((left.square() / n + (c.sum() - left).square() / (len(c) - n)).argmax()) + 1


def _contrastive_loss(scores: Tensor, positive: Tensor) -> float:
    """Symmetric InfoNCE of `(n, m)` log-likelihood ratios at the best of a few temperatures."""
    losses = []
    for scale in _SCALES:
        logits = scale * scores
        kept = logits.masked_fill(~positive, -torch.inf)
        losses.append(sum(float((logits.logsumexp(d) - kept.logsumexp(d)).mean()) for d in (0, 1)))
    return min(losses)
