"""Regularised canonical correlation analysis as a bridge.

In canonical coordinates u = (x - mean_x) W_x and v = (y - mean_y) W_y, white and correlated one by one by c_k,

    score    cos(c^p u, c^p v) + centred_weight cos(x - mean_x, y - mean_y)
    refine   normalise(mean_y + (c u) B), B the ridge regression of y on c u           (reduced-rank regression)

The weights c^p count a coordinate by how much it tells (Gong et al. 2014). On many pairs this is the closed form to
beat; on few, the centred cosine has to help. What is left to "auto" is chosen on the training rows, see `cca_choice`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffgap_lightning.bridges.base import Bridge, Direction, unit
from diffgap_lightning.bridges.cca_choice import Auto, CCAChoice, best_choice, moments_of, open_choices, solve
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import ridge


class CCABridge(Bridge):
    """Regularised CCA with a correlation-weighted cosine.

    Args:
        rank: Principal directions kept of each modality, or `"auto"`.
        shrinkage: 0 to 1, of the covariances towards the sphere, or `"auto"`.
        power: Exponent of the correlations, or `"auto"`.
        centred_weight: Weight of the centred cosine in the score, or `"auto"`; 0 between unequal dimensions.
        seed: Of the held-out ids, for `"auto"`.

    Attributes:
        chosen: What `fit` settled on for each unordered pair; empty in a loaded bridge.
    """

    pair_tensors = ("first", "second", "centred_weight")
    direction_tensors = ("map",)

    def __init__(
        self,
        rank: int | Auto = "auto",
        shrinkage: float | Auto = "auto",
        power: float | Auto = "auto",
        centred_weight: float | Auto = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(rank=rank, shrinkage=shrinkage, power=power, centred_weight=centred_weight, seed=seed)
        self.chosen: dict[tuple[str, str], CCAChoice] = {}

    def again(self, pair: Direction) -> Bridge:
        """As every bridge's."""
        chosen = self.chosen.get(self._pair(*pair))
        return super().again(pair) if chosen is None else CCABridge(**chosen._asdict())

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        o = self.options
        centred = o["centred_weight"] if self._same_dims(first, second) else 0.0
        moments = moments_of(rows)
        choice = best_choice(open_choices(o["rank"], o["shrinkage"], o["power"], centred), rows, moments, o["seed"])
        w_x, w_y, correlations = solve(choice, moments, len(rows.i))
        weight = correlations**choice.power
        self.chosen[first, second] = choice
        self._keep(f"first:{first}->{second}", (w_x * weight).float())
        self._keep(f"second:{first}->{second}", (w_y * weight).float())
        self._keep(f"centred_weight:{first}->{second}", weight.new_tensor(choice.centred_weight).float())
        x, y = rows.x, rows.y
        for source, target, a, b, w in ((first, second, x, y, w_x), (second, first, y, x, w_y)):
            reduce = (w * correlations).float()
            self._keep(f"map:{source}->{target}", reduce @ ridge(a @ reduce, b))

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        return x @ self._get(f"map:{source}->{target}")

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        first, second = self._pair(source, target)
        canonical = unit(x @ self._get(f"{'first' if modality == first else 'second'}:{first}->{second}"), dim=1)
        weight = float(self._get(f"centred_weight:{first}->{second}"))
        return canonical if weight == 0 else torch.cat([canonical, weight**0.5 * unit(x, dim=1)], dim=1)
