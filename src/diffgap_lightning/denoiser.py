"""The network of the contrastive diffusion module: a residual MLP whose layer norms are steered by the noise level.

It sees an embedding as a vector, not as an image or a sequence, so it needs no attention: residual blocks

    h <- h + gate * W2 silu(W1 ((1 + scale) norm(h) + shift))

whose (scale, shift, gate) are linear in an embedding of the log signal-to-noise ratio plus one of the condition (AdaLN,
Peebles & Xie 2023). The last layer starts at zero: before training the network adds nothing to the closed-form
estimate that it corrects (see `cdm.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MLPDenoiser(nn.Module):
    """Correction to a closed-form estimate, from what is known of the noisy embedding and from the condition.

    Args:
        target_dim: Coordinates R_t of the embedding that is denoised.
        condition_dim: Coordinates R_c of the condition.
        width: Width of the residual stream.
        depth: Number of residual blocks.
        expansion: Width of a block's hidden layer, in units of `width`.
        dropout: Dropout probability in the blocks' hidden layers.
    """

    def __init__(
        self,
        target_dim: int,
        condition_dim: int,
        width: int = 512,
        depth: int = 3,
        expansion: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 0:
            raise ValueError(f"denoiser: got width {width}, depth {depth}; expected width >= 1 and depth >= 0")
        # What steers the norms needs fewer dimensions than the stream: a quarter halves the parameters.
        steer_dim = max(width // 4, 1)
        self.level = LevelEmbedding(steer_dim)
        self.condition = nn.Linear(condition_dim, width + steer_dim)
        self.no_condition = nn.Parameter(torch.zeros(width + steer_dim))
        self.inputs = nn.Linear(2 * target_dim, width)
        self.blocks = nn.ModuleList(_Block(width, steer_dim, round(expansion * width), dropout) for _ in range(depth))
        self.modulation = nn.Linear(steer_dim, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.output = nn.Linear(width, target_dim)
        for layer in (self.output, self.modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, residual: Tensor, mean: Tensor, log_snr: Tensor, condition: Tensor, keep: Tensor | None
    ) -> Tensor:
        """Compute the correction.

        Args:
            residual: `(B, R_t)`, the closed-form estimate of x0 minus `mean`: what the noisy input itself tells.
            mean: `(B, R_t)`, the closed-form prediction from the condition (zero where it is dropped).
            log_snr: `(B,)`.
            condition: `(B, R_c)`.
            keep: `(B,)` bool, False where the condition is dropped; None keeps all.

        Returns:
            `(B, R_t)`.
        """
        known = self.condition(condition)
        if keep is not None:
            known = torch.where(keep[:, None], known, self.no_condition)
        stream, steer = known.split([self.inputs.out_features, known.shape[1] - self.inputs.out_features], dim=1)
        steer = nn.functional.silu(self.level(log_snr) + steer)
        h = self.inputs(torch.cat([residual, mean], dim=1)) + stream
        for block in self.blocks:
            h = block(h, steer)
        scale, shift = self.modulation(steer).chunk(2, dim=1)
        return self.output(nn.functional.silu((1 + scale) * self.norm(h) + shift))


class LevelEmbedding(nn.Module):
    """Sines and cosines of the log signal-to-noise ratio, through a two-layer network: `(B,)` to `(B, dim)`."""

    def __init__(self, dim: int, num_frequencies: int = 32) -> None:
        super().__init__()
        # Periods from about 100 (the whole range of log-SNR) down to about 1 nat.
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(math.log(0.06), math.log(6.0), num_frequencies)), persistent=False
        )
        self.layers = nn.Sequential(nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, log_snr: Tensor) -> Tensor:
        """Embed `log_snr` `(B,)`."""
        angle = log_snr[:, None] * self.get_buffer("frequencies")
        return self.layers(torch.cat([angle.sin(), angle.cos()], dim=1))


class _Block(nn.Module):
    def __init__(self, width: int, steer_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(steer_dim, 3 * width)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, steer: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(steer).chunk(3, dim=1)
        # 1 + gate, so that a block is open from the first step on; only the network's output starts at zero.
        return h + (1 + gate) * self.layers((1 + scale) * self.norm(h) + shift)
