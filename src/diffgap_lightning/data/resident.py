"""Training rows that stay on the GPU: the loader names rows, and they are gathered where they are used.

A batch of 1024 pairs of 512-d embeddings is 4 MB, its row numbers are 16 kB. Copying the former costs as much as the
training step. Which rows make a batch is still decided by `PairBatches`: batches are the same, resident or not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SHARE = 0.25  # of the free memory that tables may take


class ResidentRows:
    """Rows of all modalities on one device.

    Args:
        embeddings: Modality -> `(N_m, D_m)`.
        ids: Modality -> `(N_m,)` int64.
        device: Where they are kept.
    """

    def __init__(self, embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor], device: torch.device) -> None:
        self.embeddings = {m: x.to(device) for m, x in embeddings.items()}
        self.ids = {m: x.to(device) for m, x in ids.items()}

    def gather(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch that row numbers `"<modality>_row"` `(B,)` stand for; its rows are aligned pairs."""
        found: dict[str, Tensor] = {}
        for m, x in self.embeddings.items():
            rows = batch[f"{m}_row"]
            found |= {m: x.index_select(0, rows), f"{m}_id": self.ids[m].index_select(0, rows)}
        return found


def fits(embeddings: Mapping[str, Tensor], device: torch.device) -> bool:
    """Whether the device is a GPU and a quarter of its free memory would hold the rows."""
    if device.type != "cuda":
        return False
    size = sum(x.numel() * x.element_size() for x in embeddings.values())
    return size <= _SHARE * torch.cuda.mem_get_info(device)[0]
