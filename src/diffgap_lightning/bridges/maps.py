"""Bridges that are one matrix W for each direction, between rows less their centroids.

    refine   normalise(mean_t + (x - mean_s) W_st)
    score    cos(q W_st, g) + cos(q, g W_ts) + centred_weight cos(q, g)         (q, g less their centroids)

Both directions are worth having: each regression forgets what the other's target has too little of. The centred cosine
keeps what neither map could learn from few pairs, and needs equal dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from diffgap_lightning.bridges.base import Bridge, unit
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import (
    gaussian_transport,
    procrustes,
    restoring_scale,
    ridge,
    second_moment,
)


class LinearMapBridge(Bridge):
    """Common part: subclasses give the matrix of one direction."""

    direction_tensors = ("map",)

    @abstractmethod
    def _fit_map(self, x: Tensor, y: Tensor) -> Tensor:
        """The matrix `(D_x, D_y)` for centred pairs `(P, D_x)`, `(P, D_y)`."""

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        x, y = rows.x, rows.y
        self._keep(f"map:{first}->{second}", self._fit_map(x, y))
        self._keep(f"map:{second}->{first}", self._fit_map(y, x))

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        return x @ self._get(f"map:{source}->{target}")

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        own = unit(x, dim=1)
        mapped = unit(self._offset(x, modality, target if modality == source else source), dim=1)
        if modality == target:
            return torch.cat([own, mapped], dim=1)
        weight = float(self.options["centred_weight"])
        return torch.cat([mapped + weight * own if self._same_dims(source, target) else mapped, own], dim=1)


class RidgeBridge(LinearMapBridge):
    """Ridge regression in both directions: the most faithful linear map, which shrinks towards the target's mean.

    Args:
        penalty: Added to the diagonal of `x'x` over unit rows; `"auto"`: by generalised cross-validation.
        centred_weight: Weight of the centred cosine in the score; without effect between unequal dimensions.
    """

    def __init__(self, penalty: float | Literal["auto"] = "auto", centred_weight: float = 1.0) -> None:
        super().__init__(penalty=penalty, centred_weight=centred_weight)

    def _fit_map(self, x: Tensor, y: Tensor) -> Tensor:
        return ridge(x, y, self.options["penalty"])


class RestoredRidgeBridge(LinearMapBridge):
    """Ridge with the target's variance given back, and a share of the centred source.

    W = blend I + (1 - blend) W_ridge T, where T is the factor (`restore="scalar"`) or the symmetric matrix
    (`"transport"`) that gives the predictions the targets' total variance or covariance. Where dimensions differ,
    the orthogonal Procrustes map stands for I.

    Args:
        penalty: As for `RidgeBridge`.
        restore: `"scalar"`, or `"transport"`: Gaussian optimal transport.
        blend: Share of the centred source, 0 to 1.
        shrinkage: 0 to 1, towards the sphere of the same trace, of both covariances before the transport; 1 is the
            scalar.
        centred_weight: As for `RidgeBridge`.
    """

    def __init__(
        self,
        penalty: float | Literal["auto"] = "auto",
        restore: Literal["scalar", "transport"] = "scalar",
        blend: float = 0.3,
        shrinkage: float = 0.3,
        centred_weight: float = 1.0,
    ) -> None:
        if restore not in ("scalar", "transport"):
            raise ValueError(f"restore: got {restore!r}, expected 'scalar' or 'transport'")
        for name, value in (("blend", blend), ("shrinkage", shrinkage)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, expected 0 to 1")
        super().__init__(
            penalty=penalty, restore=restore, blend=blend, shrinkage=shrinkage, centred_weight=centred_weight
        )

    def _fit_map(self, x: Tensor, y: Tensor) -> Tensor:
        blend = self.options["blend"]
        weight = ridge(x, y, self.options["penalty"])
        if self.options["restore"] == "scalar":
            weight = weight * restoring_scale(x @ weight, y)
        else:
            wide = weight.double()
            weight = weight @ gaussian_transport(
                self._shrunk(wide.T @ (second_moment(x) / len(x)) @ wide), self._shrunk(second_moment(y) / len(y))
            )
        if blend == 0:
            return weight
        same = x.shape[1] == y.shape[1]
        return blend * (torch.eye(x.shape[1]).to(weight) if same else procrustes(x, y)) + (1 - blend) * weight

    def _shrunk(self, covariance: Tensor) -> Tensor:
        amount = self.options["shrinkage"]
        sphere = covariance.trace() / len(covariance) * torch.eye(len(covariance)).to(covariance)
        return (1 - amount) * covariance + amount * sphere


class ProcrustesBridge(LinearMapBridge):
    """The best rotation between the centred modalities; the inverse direction is its transpose.

    Args:
        centred_weight: As for `RidgeBridge`.
    """

    def __init__(self, centred_weight: float = 1.0) -> None:
        super().__init__(centred_weight=centred_weight)

    def _fit_map(self, x: Tensor, y: Tensor) -> Tensor:
        return procrustes(x, y)
