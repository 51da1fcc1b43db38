r"""A mixture of concepts as a bridge: the closed form where pairs are many.

Embeddings gather around concepts, which one Gaussian (ridge, CCA) cannot say. With the conditional mean E[y | x] of
`concepts.py`, the canonical coordinates v of y and their density p(v),

    refine   normalise(mean_y + E[y | x] restored to the spread of y)
    score    log p(v | x) - log p(v),   p(v | x) taken for N(E[v | x], S),   S measured on held-out pairs

The optimal score is the pointwise mutual information, and this is it up to that one approximation, which keeps it an
inner product of features of each row: [S^-1/2 E[v | x], -|S^-1/2 E[v | x]|^2 / 2, 1] and
[S^-1/2 v, 1, -|S^-1/2 v|^2 / 2 - log p(v)]. It has a direction. The one whose target is told more surely serves better,
and held-out pairs choose it, or the mean of both.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffgap_lightning.bridges.base import Bridge
from diffgap_lightning.bridges.concepts import ConceptMean, fit_concepts
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import gaussian_transport, second_moment

_SCALES = (0.1, 0.25, 0.5, 1.0)
_DIRECTION_WEIGHTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
_RESTORE_ROWS = 20_000


class MixtureBridge(Bridge):
    """Mixture of concepts in canonical coordinates.

    Args:
        max_components: The most concepts that are tried; never more than one for each 16 pairs.
        restore: How the posterior mean gets back the target's spread: by one factor (`"scale"`, faithful) or by
            Gaussian optimal transport (`"transport"`, closer to the target's distribution).
        seed: Of the held-out ids and of the fit.
    """

    least_rows = 10_000
    pair_tensors = ("weights",)
    direction_tensors = (*ConceptMean._fields, "metric", "restore")

    def __init__(
        self, max_components: int = 2048, restore: Literal["scale", "transport"] = "scale", seed: int = 0
    ) -> None:
        if max_components < 1:
            raise ValueError(f"max_components: got {max_components}, expected at least 1")
        if restore not in ("scale", "transport"):
            raise ValueError(f"restore: got {restore!r}, expected 'scale' or 'transport'")
        super().__init__(max_components=max_components, restore=restore, seed=seed)

    def num_components(self, source: str, target: str) -> int:
        """How many concepts were found between two modalities; 1 is one Gaussian."""
        return len(self.conditional_mean(source, target).bias)

    def conditional_mean(self, source: str, target: str) -> ConceptMean:
        """`E[y | x]` of rows less their modality's centroid."""
        self._check_direction(source, target)
        return self._mean(source, target)

    def _mean(self, source: str, target: str) -> ConceptMean:
        return ConceptMean(*(self._get(f"{name}:{source}->{target}") for name in ConceptMean._fields))

    def _keep(self, name: str, value: Tensor) -> None:
        # Contiguous, as a loaded tensor is: the same products in another layout differ in their last digits.
        super()._keep(name, value.float().contiguous())

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        found = fit_concepts(rows, self.options["max_components"], self.options["seed"])
        held = found.held
        for source, target, mean, canonical, x, y in (
            (first, second, found.forward, found.canonical[1], held.x, held.y),
            (second, first, found.backward, found.canonical[0], held.y, held.x),
        ):
            name = f"{source}->{target}"
            for field, value in zip(ConceptMean._fields, mean, strict=True):
                self._keep(f"{field}:{name}", value)
            self._keep(f"metric:{name}", canonical.double() @ _inverse_root((y - mean(x)) @ canonical))
            sides = (rows.first, rows.second) if source == first else (rows.second, rows.first)
            some, goal = (z[:: max(1, len(z) // _RESTORE_ROWS)] for z in sides)
            self._keep(f"restore:{name}", self._restoring(mean(some), goal))
        positive = held.first_ids[:, None] == held.second_ids
        scores = [
            self._likelihood(held.first, first, *d) @ self._likelihood(held.second, second, *d).T
            for d in ((first, second), (second, first))
        ]
        losses = {w: _contrastive_loss(w[0] * scores[0] + w[1] * scores[1], positive) for w in _DIRECTION_WEIGHTS}
        self._keep(f"weights:{first}->{second}", torch.tensor(min(losses, key=losses.__getitem__)).to(positive.device))

    def _restoring(self, mean: Tensor, target: Tensor) -> Tensor:
        """Factor, or matrix, that brings posterior means to the spread of the target's rows."""
        if self.options["restore"] == "scale":
            return (target.square().sum(1).mean() / mean.square().sum(1).mean().clamp(min=1e-12)).sqrt()
        return gaussian_transport(second_moment(mean) / len(mean), second_moment(target) / len(target))

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        restore = self._get(f"restore:{source}->{target}")
        mean = self._mean(source, target)(x)
        return mean @ restore if restore.ndim == 2 else mean * restore

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        first, second = self._pair(source, target)
        weights = self._get(f"weights:{first}->{second}").tolist()
        used = [(w, d) for w, d in zip(weights, ((first, second), (second, first)), strict=True) if w > 0]
        return torch.cat([w**0.5 * self._likelihood(x, modality, *d) for w, d in used], dim=1)

    def _likelihood(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        """Features of log p(target row | source row) - log p(target row), of centred rows of either, `(N, r + 2)`."""
        metric = self._get(f"metric:{source}->{target}")
        if modality == source:
            mean = self._mean(source, target)(x) @ metric
            return torch.cat([mean, -0.5 * mean.square().sum(1, keepdim=True), torch.ones_like(mean[:, :1])], dim=1)
        own = x @ metric
        density = self._mean(target, source).log_density(x)
        bias = -0.5 * own.square().sum(1) - density
        return torch.cat([own, torch.ones_like(own[:, :1]), bias[:, None]], dim=1)


def _inverse_root(error: Tensor) -> Tensor:
    """`S^-1/2` of errors `(n, r)`, float64; with few of them S is drawn towards its diagonal."""
    n, rank = error.shape
    share = rank / (rank + n)
    covariance = second_moment(error) / n
    covariance = (1 - share) * covariance + share * torch.diag(covariance.diagonal())
    covariance.diagonal().add_(1e-6 * covariance.trace() / rank)
    return torch.linalg.cholesky(torch.linalg.inv(covariance))


def _contrastive_loss(scores: Tensor, positive: Tensor) -> float:
    """Symmetric InfoNCE of `(n, m)` log-likelihood ratios at the best of a few temperatures."""
    losses = []
    for scale in _SCALES:
        logits = scale * scores
        kept = logits.masked_fill(~positive, -torch.inf)
        losses.append(sum(float((logits.logsumexp(d) - kept.logsumexp(d)).mean()) for d in (0, 1)))
    return min(losses)
