"""Where refining starts, and what is fitted on rows that the closed forms have not seen.

    start="posterior_mean"   E[target | source], blended with the centred source and brought back to the target's
                             variance (regression alone shrinks off the data's manifold) by the factor `restore`
    start="source"           the source embedding with its centroid moved onto the target's

`calibrate` fits that factor and the weights of the fused score (see `fusion.py`) on held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffgap_lightning.mixture_denoiser import MixtureDenoiser
from diffgap_lightning.refiner.config import Direction, Start, check_start, direction_name
from diffgap_lightning.refiner.fusion import PSEUDO_QUERIES, fit_weights
from diffgap_lightning.refiner.scoring import Scorer

TOLERANCE = 1.645  # standard errors, one-sided 5 %: by how much a bridge must win to be preferred
_BLEND = 0.3  # of the centred source with a linear posterior mean


class CalibratedRefiner(Scorer):
    """A refiner that knows where to start."""

    @torch.no_grad()
    def start_energy(self, embedding: Tensor, *, source: str, target: str) -> Tensor:
        """Mean square of each row's unrestored start in the target's coordinates, `(N,)`; 1 on average on the data."""
        offset = self._blend(self.rows(embedding, source), source, target)
        return self.whole(self.space.coordinates(offset, target).square()).flatten(1).mean(1)

    def start_of(self, rows: Tensor, source: str, target: str, start: Start) -> Tensor:
        """Offset from the target's centroid `(B, D_t)` at which refining starts."""
        check_start(start)
        if start == "posterior_mean":
            return self.config.restore[direction_name(source, target)] * self._blend(rows, source, target)
        self.space.shift(rows[:1], source, target)  # refuses unequal dimensions
        return self.space.centre(rows, source)

    def blend_of(self, source: str, target: str) -> float:
        """Share of the centred source in a posterior-mean start."""
        if self.config.dims[source] != self.config.dims[target]:
            return 0.0
        if self.config.blend is not None:
            return self.config.blend
        closed_form = self.cdm_of(source, target).closed_form
        linear = len(closed_form.anchors) == 0 and not isinstance(closed_form, MixtureDenoiser)
        return _BLEND if linear else 0.0

    def _blend(self, rows: Tensor, source: str, target: str) -> Tensor:
        """Posterior mean and, where the dimensions are equal, centred source: an offset `(B, D_t)`."""
        mean = self.cdm_of(source, target).posterior_mean(self.whole(self.space.encode(rows, source)))
        offset = self.space.offset(mean.flatten(0, -2), target)
        blend = self.blend_of(source, target)
        return offset if blend == 0 else (1 - blend) * offset + blend * self.space.centre(rows, source)

    def calibrate(self, embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor]) -> None:
        """Fit the fusion weights and the restoring factors on rows that were not trained on.

        Args:
            embeddings: Modality to `(N, D)` validation rows.
            ids: Modality to `(N,)`.
        """
        components = {
            (pair, m): self.components(embeddings[m], modality=m, pair=pair) for pair in self.config.pairs for m in pair
        }
        energy = {d: self.start_energy(embeddings[d[0]], source=d[0], target=d[1]) for d in self.directions}
        self.calibrate_from(components, energy, ids)

    def calibrate_from(
        self,
        components: Mapping[tuple[Direction, str], Mapping[str, Tensor]],
        energy: Mapping[Direction, Tensor],
        ids: Mapping[str, Tensor],
    ) -> None:
        """`calibrate` from what `components` and `start_energy` returned, e.g. gathered over a validation epoch."""
        fusion = {}
        for pair in self.config.pairs:
            s, t = pair
            name = direction_name(s, t)
            fusion[name] = fit_weights(
                components[pair, s],
                components[pair, t],
                ids[s],
                ids[t],
                prior=self.config.fusion_prior.get(name, self.prior_weights(pair)),
                rivals=list(self.bridges),
                pseudo_queries=max(PSEUDO_QUERIES, self.config.fusion_queries.get(name, 0.0)),
                tolerance=TOLERANCE,
            )
        restore = {direction_name(*d): restoring(e) for d, e in energy.items()}
        self.config = replace(self.config, fusion=fusion, restore=restore)


def restoring(energy: Tensor) -> float:
    """The factor that brings starts to unit mean square."""
    return float(energy.mean().clamp(min=1e-4).rsqrt())
