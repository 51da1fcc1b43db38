"""How similar embeddings of two modalities are: `score`, which ranks candidates and never samples.

It adds up similarities, each an inner product of features of query and gallery row alone, so that exact ranks need no
score matrix:

    bridges by name       the closed forms' own scores
    forward, backward     the contrastive diffusion module's posterior mean of one row beside the other row, both ways
    hub                   a correction for candidates that are near to everything (see `hubness.py`)

Their weights are fitted on held-out rows (see `fusion.py`); before that they are the priors below.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges import Bridge
from diffgap_lightning.functional.precision import full_float32
from diffgap_lightning.mixture_denoiser import MixtureDenoiser
from diffgap_lightning.refiner.base import RefinerBase
from diffgap_lightning.refiner.closed_forms import HUB_BRIDGE
from diffgap_lightning.refiner.config import Direction, direction_name
from diffgap_lightning.refiner.fusion import fuse

# Weights before there is a validation, and where it is small: the strongest closed form, and a little of what may
# correct it. Of few pairs, whose posterior means are kernel regressions, these means are the strongest; of many, on
# which a mixture of concepts was found, its log-likelihood ratio (in nats) beside canonical correlations.
_PRIOR_WEIGHTS = {"restored": 1.0, "centre": 0.5, "cca": 0.3, "mixture": 0.05, "forward": 0.2, "backward": 0.2}
_FEW_PRIOR_WEIGHTS = {"forward": 1.0, "backward": 0.5, "centre": 1.0, "hub": 1.25}
_MANY_PRIOR_WEIGHTS = {"cca": 1.0, "mixture": 0.03, "forward": 0.1, "backward": 0.1}


class Scorer(RefinerBase):
    """A refiner's parts, used to compare."""

    @torch.no_grad()
    def score(self, query: Tensor, gallery: Tensor, *, source: str, target: str) -> Tensor:
        """Fused similarity `(Q, G)` float32 of queries `(Q, D)` of modality `source` to a gallery of modality `target`.

        No query is conditioned on its own candidate: every row is looked at alone. Sequences `(Q, T, D)` and
        `(G, T, D)` are compared by the mean of their frames' features.
        """
        features = [
            self.score_features(rows, modality=modality, source=source, target=target)
            for rows, modality in ((query, source), (gallery, target))
        ]
        with full_float32(query.device):
            return features[0] @ features[1].to(query.device).T

    @torch.no_grad()
    def score_features(self, embedding: Tensor, *, modality: str, source: str, target: str) -> Tensor:
        """Features `(N, F)` float32 whose inner products are the fused score; `modality` is one of the two."""
        pair = self.pair_of(source, target)
        if modality not in pair:
            raise ValueError(f"modality: got {modality!r}, expected {source!r} or {target!r}")
        return fuse(self.components(embedding, modality=modality, pair=pair), self.config.fusion[direction_name(*pair)])

    @torch.no_grad()
    def components(self, embedding: Tensor, *, modality: str, pair: Direction) -> dict[str, Tensor]:
        """Features of every score component, unweighted; see the module's docstring.

        Args:
            embedding: `(N, D)` rows of one of the pair's modalities, or `(N, T, D)` sequences.
            modality: Which.
            pair: As in the configuration.

        Returns:
            Component to `(N, F_k)`: the bridges by name, `"hub"`, `"forward"` and `"backward"`.
        """
        source, target = pair
        rows = self.rows(embedding, modality)
        embedding = embedding.flatten(0, -2)
        found = {
            name: bridge.score_features(embedding, modality=modality, source=source, target=target)
            for name, bridge in self.bridges.items()
            if isinstance(bridge, Bridge)
        }
        if direction_name(*pair) in self.hubs:
            bridge = self.bridges[HUB_BRIDGE]
            features = bridge.score_features(embedding, modality=modality, source=source, target=target)  # type: ignore[operator]
            found["hub"] = self.hubs[direction_name(*pair)](features, modality == source)
        own = self.space.encode(rows, modality)
        other = target if modality == source else source
        produced = self.cdm_of(modality, other).posterior_mean(self.whole(own)).flatten(0, -2)
        forward, backward = (produced, own) if modality == source else (own, produced)
        unit, device = nn.functional.normalize, embedding.device
        found |= {"forward": unit(forward, dim=1).to(device), "backward": unit(backward, dim=1).to(device)}
        return {name: self.whole(x).mean(1) for name, x in found.items()} if self.config.frames else found

    def prior_weights(self, pair: Direction) -> dict[str, float]:
        """Weights of a pair's components before any are fitted."""
        closed_forms = [self.cdm_of(*d).closed_form for d in (pair, pair[::-1])]
        prior = _PRIOR_WEIGHTS
        if all(len(closed_form.anchors) > 0 for closed_form in closed_forms):
            prior = _FEW_PRIOR_WEIGHTS
        elif all(isinstance(closed_form, MixtureDenoiser) for closed_form in closed_forms):
            prior = _MANY_PRIOR_WEIGHTS
        usable = {*self.bridges, "forward", "backward", *(["hub"] if direction_name(*pair) in self.hubs else [])}
        return {k: w for k, w in prior.items() if k in usable}

    def pair_of(self, source: str, target: str) -> Direction:
        """The pair, as the configuration names it, that a direction belongs to.

        Raises:
            ValueError: a direction that this refiner does not have.
        """
        self.cdm_of(source, target)
        return (source, target) if (source, target) in self.config.pairs else (target, source)
