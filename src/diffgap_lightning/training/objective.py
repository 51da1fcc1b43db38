"""The training loss of one direction on a batch of aligned pairs in space coordinates.

    loss = denoising_loss + contrastive_weight * contrastive_loss

Rows at t = 1 carry no signal: they are the regression from source to target, and their estimates are the contrastive
term's queries, against every target of the batch. `objective="regression"` puts all rows there, which leaves the
contrastive diffusion module out: the ablation's other arm is the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.diffusion.guidance import keep_condition
from diffgap_lightning.losses import Weighting, contrastive_loss, denoising_loss, noise_rows, stratified_times

ObjectiveName = Literal["diffusion", "regression"]


class Draws(NamedTuple):
    """What is random in the loss of one batch.

    Attributes:
        t: Times `(B,)`; the first rows are at t = 1.
        eps: Noise, of the targets' shape.
        condition_noise: Noise added to the conditions, of their shape; None for none.
        keep: `(B,)` bool, False where the condition is dropped.
    """

    t: Tensor
    eps: Tensor
    condition_noise: Tensor | None
    keep: Tensor


@dataclass(frozen=True)
class Objective:
    """How a direction's loss is made.

    Attributes:
        name: `"diffusion"` trains all noise levels, `"regression"` only the posterior mean.
        loss_weighting: Weight of the squared error of x0 at each noise level; see `losses.snr_weight`.
        contrastive_weight: Of the contrastive term; 0 leaves it out.
        condition_dropout: Share of the rows that train the unconditional model, which guidance needs.
        condition_noise: Standard deviation of Gaussian noise added to the conditions, in units of a coordinate's
            average spread; it regularises where pairs are few.
        share_of_noise: Share of the rows at t = 1, which train the posterior mean.
    """

    name: ObjectiveName = "diffusion"
    loss_weighting: Weighting = "x0"
    contrastive_weight: float = 0.0
    condition_dropout: float = 0.1
    condition_noise: float = 0.0
    share_of_noise: float = 0.25

    def __post_init__(self) -> None:
        """Check the values."""
        if self.name not in get_args(ObjectiveName):
            raise ValueError(f"objective: got {self.name!r}, expected one of {', '.join(get_args(ObjectiveName))}")
        for field in ("contrastive_weight", "condition_noise"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: got {getattr(self, field)}, expected a number >= 0")
        if self.contrastive_weight > 0 and self.share_of_noise == 0 and self.name == "diffusion":
            raise ValueError("share_of_noise: got 0, but contrastive_weight > 0 needs rows at t = 1; raise it or set 0")

    @property
    def _share(self) -> float:
        """Share of the rows at t = 1."""
        return 1.0 if self.name == "regression" else self.share_of_noise

    def __call__(
        self,
        cdm: ContrastiveDiffusion,
        condition: Tensor,
        x0: Tensor,
        ids: Tensor,
        gallery: Tensor,
        gallery_ids: Tensor,
        logit_scale: Tensor,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Compute the loss and its parts.

        Args:
            cdm: The direction's module.
            condition: Source coordinates `(B, R_s)`, or `(B, T, R_s)` of sequences.
            x0: Their targets' coordinates `(B, R_t)` or `(B, T, R_t)`.
            ids: `(B,)`.
            gallery: Coordinates of all targets of the batch, `(G, R_t)` or `(G, T, R_t)`: the contrastive term's
                candidates; sequences are compared frame by frame.
            gallery_ids: `(G,)`.
            logit_scale: Scalar, log inverse temperature.
            generator: Source of times, noise and condition dropout, on the device of `x0`.

        Returns:
            Scalars `"loss"` and `"denoising"`, and `"contrastive"` where it counts.
        """
        draws = self.draw(condition, x0, generator)
        return self.loss(cdm, condition, x0, ids, gallery, gallery_ids, logit_scale, draws)

    def draw(self, condition: Tensor, x0: Tensor, generator: torch.Generator | None) -> Draws:
        """Draw for a batch; arguments as for `__call__`."""
        size, device, noise = len(x0), x0.device, None
        t = stratified_times(size, self._share, generator, device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        if self.condition_noise > 0:
            noise = self.condition_noise * torch.randn(condition.shape, generator=generator, device=device)
        keep = keep_condition(size, self.condition_dropout, generator, device)
        keep[: noise_rows(size, self._share)] = True
        return Draws(t, eps, noise, keep)

    def loss(
        self,
        cdm: ContrastiveDiffusion,
        condition: Tensor,
        x0: Tensor,
        ids: Tensor,
        gallery: Tensor,
        gallery_ids: Tensor,
        logit_scale: Tensor,
        draws: Draws,
    ) -> dict[str, Tensor]:
        """`__call__` without its randomness: a function that can be compiled."""
        t, eps, condition_noise, keep = draws
        size = len(x0)
        first = noise_rows(size, self._share)
        x_t = cdm.schedule.add_noise(x0, eps, t)
        x_t[:first] = 0.0
        if condition_noise is not None:
            condition = condition + condition_noise
        estimate = cdm(x_t, t, condition, keep)
        # Weights of eps and min-SNR vanish at t = 1: the rows of the posterior mean always count as errors of x0.
        log_snr = cdm.schedule.log_snr(t)
        mean_part = first / size * denoising_loss(estimate[:first], x0[:first], log_snr[:first]) if first else 0.0
        rest = slice(first, size)
        levels = denoising_loss(estimate[rest], x0[rest], log_snr[rest], self.loss_weighting) if first < size else 0.0
        loss = torch.as_tensor(mean_part + (1 - first / size) * levels)
        parts = {"loss": loss, "denoising": loss.detach()}
        if self.contrastive_weight > 0 and first > 0:
            contrast = contrastive_loss(
                estimate[:first].flatten(1), gallery.flatten(1), ids[:first], gallery_ids, logit_scale
            )
            parts |= {"loss": loss + self.contrastive_weight * contrast, "contrastive": contrast.detach()}
        return parts
