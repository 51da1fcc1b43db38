"""`FeatureExtractor`: what turns clips into the rows, and class scores, that generation metrics compare.

A network that is not here is a subclass: set the attributes, override `forward`. Batches give the same rows as clips
one by one, and a clip's rows do not depend on the clips beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """Of N clips, on the CPU.

    Attributes:
        rows: `(R, D)` float32; a clip has one row (PANNs, CLAP) or one a second (VGGish).
        counts: Rows of each clip, N numbers that add up to R.
        logits: `(N, C)` float32 class scores before the softmax, or None.
    """

    rows: Tensor
    counts: list[int]
    logits: Tensor | None = None

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """Features of all parts' clips, in order."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(
            torch.cat([part.rows for part in parts]),
            [count for part in parts for count in part.counts],
            torch.cat(logits) if logits and len(logits) == len(parts) else None,
        )


class FeatureExtractor(nn.Module):
    """Base class of extractors.

    Attributes:
        name: Network and checkpoint, as the table names it.
        sample_rate: Of the mono waveforms that it takes, in Hz.
        min_seconds: Shorter clips have no row.
        dim: D.
        frechet: What the Frechet distance of its rows is called: `"fad"` (VGGish) or `"fd"`.
        knows_text: Whether it embeds captions too.
        sha256: Digest of the weight file, or of what identifies the weights; empty where unknown.
    """

    name: str = ""
    sample_rate: int = 0
    min_seconds: float = 0.0
    dim: int = 0
    frechet: Literal["fad", "fd"] = "fd"
    knows_text: bool = False
    sha256: str = ""

    def forward(self, waveforms: Sequence[Tensor]) -> Features:
        """Extract features.

        Args:
            waveforms: N tensors `(T_i,)`, float32 in [-1, 1] at `sample_rate`, each at least `min_seconds` long.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """`(N, D)` embeddings of captions in the space of the rows, where the network knows text."""
        raise NotImplementedError(f"{type(self).__name__} does not embed text")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))
