"""The network for sequences: every frame's denoiser sees the frames around it, of the source and of the noisy target.

A frame's stream begins as in `denoiser.py`: from its closed-form estimate and its own source frame. Then residual
blocks alternate two steps, both steered by the noise level (AdaLN): attention between the frames of the sequence, and
a small MLP in each frame. Through attention a frame is conditioned on the whole source sequence. The logits carry a
learned bias for each head and distance between frames, which starts as a slope of its own for every head (ALiBi, Press
et al. 2022): some heads begin by looking at the neighbours, some at everything.

As there, the last layer starts at zero: before training each frame has its closed-form estimate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.denoiser import LevelEmbedding

HEAD_DIM = 32


class SequenceDenoiser(nn.Module):
    """Correction to a closed-form estimate of every frame of a sequence.

    Args:
        target_dim: Coordinates R_t of a frame that is denoised.
        condition_dim: Coordinates R_c of a frame of the condition.
        frames: T, frames of a sequence.
        width: Width of the residual stream.
        depth: Number of blocks.
        dropout: Dropout probability in the blocks' hidden layers.
    """

    def __init__(
        self,
        target_dim: int,
        condition_dim: int,
        frames: int,
        width: int = 512,
        depth: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 0 or frames < 1:
            raise ValueError(
                f"denoiser: got width {width}, depth {depth}, {frames} frames; expected width >= 1, depth >= 0 and "
                "at least 1 frame"
            )
        steer_dim = max(width // 4, 1)
        self.frames = frames
        self.level = LevelEmbedding(steer_dim)
        self.condition = nn.Linear(condition_dim, width + steer_dim)
        self.no_condition = nn.Parameter(torch.zeros(width + steer_dim))
        self.inputs = nn.Linear(2 * target_dim, width)
        self.blocks = nn.ModuleList(_Block(width, steer_dim, frames, dropout) for _ in range(depth))
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
            residual: `(B, T, R_t)`, the closed-form estimate of x0 minus `mean`.
            mean: `(B, T, R_t)`, the closed-form prediction from the condition (zero where it is dropped).
            log_snr: `(B,)`, the same for all frames.
            condition: `(B, T, R_c)`.
            keep: `(B,)` bool, False where the condition is dropped; None keeps all.

        Returns:
            `(B, T, R_t)`.
        """
        known = self.condition(condition)
        if keep is not None:
            known = torch.where(keep[:, None, None], known, self.no_condition)
        width = self.inputs.out_features
        stream, steer = known.split([width, known.shape[2] - width], dim=2)
        steer = nn.functional.silu(self.level(log_snr)[:, None] + steer)
        h = self.inputs(torch.cat([residual, mean], dim=2)) + stream
        for block in self.blocks:
            h = block(h, steer)
        scale, shift = self.modulation(steer).chunk(2, dim=2)
        return self.output(nn.functional.silu((1 + scale) * self.norm(h) + shift))


class _Block(nn.Module):
    """Attention between frames, then a layer within each; both pre-normalised, steered and gated."""

    def __init__(self, width: int, steer_dim: int, frames: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(steer_dim, 6 * width)
        self.attention = _FrameAttention(width, frames)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, steer: Tensor) -> Tensor:
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(steer).chunk(6, dim=2)
        h = h + (1 + gate) * self.attention((1 + scale) * self.norm(h) + shift)
        return h + (1 + gate2) * self.layers((1 + scale2) * self.norm(h) + shift2)


class _FrameAttention(nn.Module):
    """Multi-head attention over `(B, T, width)` with a bias that depends on the distance of two frames."""

    places: Tensor

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, width // HEAD_DIM), 0, -1) if width % h == 0)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        distance = torch.arange(1 - frames, frames).abs()
        slopes = 2.0 ** (2 - 8 * torch.arange(1, self.heads + 1) / self.heads)  # to 1/64, which sees all frames
        self.bias = nn.Parameter(-slopes[:, None] * distance)  # (heads, 2 T - 1)
        steps = torch.arange(frames)
        self.register_buffer("places", steps[None, :] - steps[:, None] + frames - 1, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        # q, k, v: (B, heads, T, width / heads)
        q, k, v = self.inputs(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[:, self.places].to(q.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.output(mixed.transpose(1, 2).flatten(2))
