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
from diffgap_lightning.diffusion.noise import row_normal, row_uniform
from diffgap_lightning.losses import Weighting, contrastive_loss, denoising_loss, noise_rows, stratified_times
from diffgap_lightning.training.shares import Share

ObjectiveName = Literal["diffusion", "regression"]


class Draws(NamedTuple):
    """What is random in the loss of one batch, and how many rows it stands for.

    Attributes:
        t: Times `(B,)`; the first rows are at t = 1.
        eps: Noise, of the targets' shape.
        condition_noise: Noise added to the conditions, of their shape; None for none.
        keep: `(B,)` bool, False where the condition is dropped.
        first: How many of these rows are at t = 1.
        all_first: How many are on all ranks.
        total: Rows on all ranks.
        ranks: How many ranks there are.
    """

    t: Tensor
    eps: Tensor
    condition_noise: Tensor | None
    keep: Tensor
    first: int
    all_first: int
    total: int
    ranks: int = 1


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
        share: Share | None = None,
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
            share: Which rows, of those on all ranks that train this direction, these are; all of them by default.

        Returns:
            Scalars `"loss"` and `"denoising"`, and `"contrastive"` where it counts.
        """
        draws = self.draw(condition, x0, generator, share)
        return self.loss(cdm, condition, x0, ids, gallery, gallery_ids, logit_scale, draws)

    def draw(
        self, condition: Tensor, x0: Tensor, generator: torch.Generator | None, share: Share | None = None
    ) -> Draws:
        """Draw for a batch; arguments as for `__call__`.

        With a `share` it is drawn for the rows of all ranks, and those of this one are kept.
        """
        share = Share(len(x0)) if share is None else share
        size, device, noise = share.total, x0.device, None
        first = noise_rows(size, self._share)
        t = stratified_times(size, self._share, generator, device)
        eps = torch.randn((size, *x0.shape[1:]), generator=generator, device=device)
        if self.condition_noise > 0:
            shape = (size, *condition.shape[1:])
            noise = share.of(self.condition_noise * torch.randn(shape, generator=generator, device=device))
        keep = keep_condition(size, self.condition_dropout, generator, device)
        keep[:first] = True
        own = (share.of(t), share.of(eps), noise, share.of(keep))
        return Draws(*own, share.before(first), first, size, share.stride)

    def draw_by_key(self, condition: Tensor, x0: Tensor, keys: Tensor, seed: int) -> tuple[Tensor, Draws]:
        """Draws that depend on each row's own key `(B,)` int64, and the order `(B,)` in which they are: t = 1 first.

        For figures that must not depend on how rows were batched.
        """
        uniform, noise = row_uniform(keys, 3, seed), None
        at_one = uniform[:, 0] < self._share
        order = torch.argsort(at_one.to(torch.int8), descending=True, stable=True)
        keys, uniform, at_one = keys[order], uniform[order], at_one[order]
        t = torch.where(at_one, 1.0, uniform[:, 1].clamp(min=1e-3))
        eps = row_normal(keys, x0[0].numel(), seed + 1).view(len(keys), *x0.shape[1:])
        if self.condition_noise > 0:
            noise = self.condition_noise * row_normal(keys, condition[0].numel(), seed + 2)
            noise = noise.view(len(keys), *condition.shape[1:])
        keep, first = (uniform[:, 2] >= self.condition_dropout) | at_one, int(at_one.sum())
        return order, Draws(t, eps, noise, keep, first, first, len(keys))

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
        """`__call__` without its randomness: a function that can be compiled.

        With several ranks the mean of their losses is that of all rows.
        """
        t, eps, condition_noise, keep, first, all_first, total, ranks = draws
        if len(x0) == 0:
            zero = 0.0 * logit_scale
            parts = {"loss": zero, "denoising": zero.detach()}
            return parts | {"contrastive": zero.detach()} if self.contrastive_weight > 0 and all_first > 0 else parts
        x_t = cdm.schedule.add_noise(x0, eps, t)
        x_t[:first] = 0.0
        if condition_noise is not None:
            condition = condition + condition_noise
        estimate = cdm(x_t, t, condition, keep)
        # Weights of eps and min-SNR vanish at t = 1: the rows of the posterior mean always count as errors of x0.
        log_snr = cdm.schedule.log_snr(t)
        row = ranks / total  # what one counts for
        mean_part = first * row * denoising_loss(estimate[:first], x0[:first], log_snr[:first]) if first else 0.0
        rest, others = slice(first, None), len(x0) - first
        levels = denoising_loss(estimate[rest], x0[rest], log_snr[rest], self.loss_weighting) if others else 0.0
        loss = torch.as_tensor(mean_part + others * row * levels)
        parts = {"loss": loss, "denoising": loss.detach()}
        if self.contrastive_weight > 0 and all_first > 0:
            contrast = 0.0 * logit_scale
            if first > 0:
                contrast = (first * ranks / all_first) * contrastive_loss(
                    estimate[:first].flatten(1), gallery.flatten(1), ids[:first], gallery_ids, logit_scale
                )
            parts |= {"loss": loss + self.contrastive_weight * contrast, "contrastive": contrast.detach()}
        return parts
