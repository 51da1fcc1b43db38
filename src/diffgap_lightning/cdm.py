"""The contrastive diffusion module (CDM) of one direction: p(target | source) in the coordinates of the space.

It joins what the other files define: a closed-form Gaussian denoiser, a network that corrects it, a noise schedule and
what the network's output stands for (x0, eps or v):

    output = closed form, expressed as x0 / eps / v  +  network,      x0 = to_x0(output)

The *posterior mean* E[x0 | condition] is the estimate at t = 1, where the input holds no signal and is replaced by its
mean, zero: the same network, trained on the same loss, is the regression from source to target.

Of a sequence `(B, T, R)` the closed form treats every frame as an embedding, the network sees all frames at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.guidance import Denoise, guide
from diffgap_lightning.diffusion.prediction import Prediction, check_prediction, from_x0, to_x0
from diffgap_lightning.diffusion.schedule import NoiseSchedule
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.sequence_denoiser import SequenceDenoiser


class ContrastiveDiffusion(nn.Module):
    """Denoiser of a target modality's coordinates given a source modality's.

    Args:
        closed_form: Fitted on the training pairs.
        network: Its correction; a `SequenceDenoiser` takes sequences, an `MLPDenoiser` embeddings.
        schedule: Noise schedule.
        prediction: What the network's output stands for.
    """

    def __init__(
        self,
        closed_form: GaussianDenoiser,
        network: MLPDenoiser | SequenceDenoiser,
        schedule: NoiseSchedule,
        prediction: Prediction = "x0",
    ) -> None:
        super().__init__()
        check_prediction(prediction)
        self.closed_form, self.network = closed_form, network
        self.schedule, self.prediction = schedule, prediction

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, keep: Tensor | None = None) -> Tensor:
        """Estimate x0.

        Args:
            x_t: Noisy target coordinates `(B, R_t)`, or `(B, T, R_t)` of sequences.
            t: Times `(B,)` in (0, 1].
            condition: Source coordinates `(B, R_c)` or `(B, T, R_c)`.
            keep: `(B,)` bool, False where the condition is to be ignored; None keeps all.

        Returns:
            As `x_t`.
        """
        alpha, sigma = (w.view(-1, *[1] * (x_t.ndim - 1)) for w in self.schedule.alpha_sigma(t))
        mean, residual = self._closed_form(x_t, t, condition, keep)
        correction = self.network(residual, mean, self.schedule.log_snr(t), condition, keep)
        closed = from_x0(mean + residual, self.prediction, x_t, alpha, sigma)
        return to_x0(closed + correction, self.prediction, x_t, alpha, sigma)

    def posterior_mean(self, condition: Tensor) -> Tensor:
        """E[x0 | condition], `(B, R_t)` or `(B, T, R_t)`: the one-step estimate from no signal at all."""
        x_t = condition.new_zeros(*condition.shape[:-1], self.closed_form.weight.shape[1])
        return self(x_t, condition.new_ones(len(condition)), condition)

    def denoiser(self, condition: Tensor, guidance_scale: float = 1.0) -> Denoise:
        """The function of `(x_t, t)` that the samplers call, for fixed conditions `(B, R_c)` or `(B, T, R_c)`."""

        def conditional(x_t: Tensor, t: Tensor) -> Tensor:
            return self(x_t, t.expand(len(x_t)), condition)

        def unconditional(x_t: Tensor, t: Tensor) -> Tensor:
            none = torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
            return self(x_t, t.expand(len(x_t)), condition, none)

        return guide(conditional, unconditional, guidance_scale)

    def _closed_form(self, x_t: Tensor, t: Tensor, condition: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Its prediction and the rest of its estimate, row by row: a frame of a sequence is a row."""
        frames = x_t.shape[1:-1]
        if frames:  # each sequence's time and choice hold for all of its frames
            t = t.repeat_interleave(frames[0])
            keep = None if keep is None else keep.repeat_interleave(frames[0])
        alpha, sigma = (w[:, None] for w in self.schedule.alpha_sigma(t))
        mean = self.closed_form.mean(condition.flatten(0, -2), keep)
        residual = self.closed_form.residual(x_t.flatten(0, -2), mean, alpha, sigma, keep)
        return mean.view(*x_t.shape), residual.view(*x_t.shape)
