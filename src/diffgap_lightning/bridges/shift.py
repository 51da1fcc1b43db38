"""The two bridges without a map: the embedding itself, and the embedding with its centroid moved.

    raw      x                                  cos(q, g)
    centre   normalise(x - mean_s + mean_t)     cos(q - mean_s, g - mean_t)

Centring removes the constant part of the modality gap (Liang et al. 2022) and costs nothing; on small data it is hard
to beat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.bridges.base import Bridge, repeat_samples, unit
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.checks import check_embeddings


class CentreBridge(Bridge):
    """Move the source's centroid onto the target's; needs equal dimensions.

    Example:
        >>> rows = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
        >>> ids = torch.arange(8)
        >>> bridge = CentreBridge().fit({"text": rows, "audio": rows.flip(1)}, {"text": ids, "audio": ids})
        >>> bridge.refine(rows, source="text", target="audio").shape
        torch.Size([8, 4])
    """

    equal_dims = True

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        """The centroids are all there is."""

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        return x

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        return unit(x, dim=1)


class IdentityBridge(CentreBridge):
    """The raw embedding: `refine` returns its input bit for bit (a copy), `score` is the plain cosine."""

    def refine(self, embedding: Tensor, *, source: str, target: str, num_samples: int = 1, **options: Any) -> Tensor:
        """A copy of `embedding` `(B, D)`, or `(B, num_samples, D)`; other options have no effect."""
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, expected at least 1")
        self._check_direction(source, target)
        check_embeddings(embedding, source, dim=self.dims[source])
        return repeat_samples(embedding.clone(), num_samples)

    def centre(self, embedding: Tensor, modality: str) -> Tensor:
        """Unit rows with their centroid left where it is, `(B, D)` float32."""
        return unit(embedding.to(self._get(f"mean:{modality}").device, torch.float32), dim=1)
