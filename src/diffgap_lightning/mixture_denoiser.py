"""The closed-form denoiser where pairs are many: the mean of a mixture of concepts in place of the ridge regression.

As `gaussian.py`, with the conditional mean of `bridges/concepts.py` in the coordinates of the space,

    mean(c) = softmax(c white centre' + bias) target + c linear,      one hidden layer over the concepts,

and the covariance of what it leaves of the target. A network then learns what no mixture says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffgap_lightning.bridges.concepts import ConceptMean
from diffgap_lightning.bridges.mixture import MixtureBridge
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.space import EmbeddingSpace


class MixtureDenoiser(GaussianDenoiser):
    """Closed-form conditional and unconditional denoiser in space coordinates.

    Args:
        condition_dim: Coordinates R_c of the condition.
        target_dim: Coordinates R_t of the target.
        num_components: Concepts K.
        rank: Canonical coordinates r.
    """

    white: Tensor
    centre: Tensor
    bias: Tensor
    target: Tensor
    linear: Tensor

    def __init__(self, condition_dim: int, target_dim: int, num_components: int, rank: int) -> None:
        super().__init__(condition_dim, target_dim)
        shapes = [(condition_dim, rank), (num_components, rank), (num_components,), (num_components, target_dim)]
        for name, shape in zip(ConceptMean._fields, [*shapes, (condition_dim, target_dim)], strict=True):
            self.register_buffer(name, torch.zeros(shape))

    @classmethod
    @torch.no_grad()
    def of(
        cls, bridge: MixtureBridge, space: EmbeddingSpace, source: str, target: str, condition: Tensor, x0: Tensor
    ) -> MixtureDenoiser:
        """Take a fitted bridge's conditional mean, and measure what it leaves on positive pairs.

        Args:
            bridge: Fitted on the rows that the space was measured on.
            space: Its coordinates.
            source: Modality of the condition.
            target: Modality of the target.
            condition: Source coordinates `(P, R_c)`.
            x0: Target coordinates `(P, R_t)`.
        """
        found = bridge.conditional_mean(source, target)
        self = cls(condition.shape[1], x0.shape[1], *found.centre.shape).to(x0.device)
        unit = space.offset(torch.eye(condition.shape[1], device=x0.device), source)
        self.white.copy_(unit @ found.white)
        self.centre.copy_(found.centre)
        self.bias.copy_(found.bias)
        self.target.copy_(space.coordinates(found.target, target))
        self.linear.copy_(space.coordinates(unit @ found.linear, target))
        freedom = len(x0) / max(len(x0) - len(self.bias), 1)
        self.measure((x0 - self.mean(condition)) * freedom**0.5, x0)
        return self

    def mean(self, condition: Tensor, keep: Tensor | None = None) -> Tensor:
        """The posterior mean `(B, R_t)`; zero where `keep` `(B,)` is False."""
        parts = ConceptMean(*(self.get_buffer(name) for name in ConceptMean._fields))
        with torch.autocast(condition.device.type, enabled=False):
            rows = condition.to(self.white.dtype)
            mean = parts(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
        return mean if keep is None else mean * keep[:, None]
