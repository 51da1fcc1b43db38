r"""Hubs: rows that are near to everything, and a correction of scores that needs no other row of the gallery.

In high dimensions some candidates are among the nearest of far too many queries. With a bank of training rows of the
other modality, how near a row is to rows in general can be told of that row alone:

    b(g) = 1/tau log mean_q exp(tau s(q, g)) over the bank's q,        b(q) likewise over its g,
    score  -b(q) - b(g) = <[-b(q), 1], [1, -b(g)]>

a soft form of cross-domain local scaling (CSLS: Conneau et al. 2018), which is the inverted softmax with a query bank
(Smith et al. 2017; Bogolin et al. 2022). Added with half the weight of s it is CSLS. It is a component of the fused
score like any other, so its weight is fitted, and no test query or candidate ever enters the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.functional.precision import full_float32

MAX_ROWS = 1024  # of a bank
TEMPERATURE = 10.0  # of scores whose scale is 1


class HubCorrection(nn.Module):
    """Banks of features of training rows of the two modalities of a pair.

    Args:
        rows: Rows of both banks, source and target.
        dim: Dimension of the features.
    """

    source: Tensor
    target: Tensor

    def __init__(self, rows: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.register_buffer("source", torch.zeros(rows[0], dim))
        self.register_buffer("target", torch.zeros(rows[1], dim))

    @classmethod
    @torch.no_grad()
    def fit(cls, source: Tensor, target: Tensor) -> HubCorrection:
        """Keep features of training rows, `(N, F)` and `(M, F)`, of which a score is the inner product.

        Features are scaled so that the greatest possible score (of rows of the banks) is about 1; of more than
        `MAX_ROWS` rows a fixed random subset is kept.
        """
        kept = [_some(rows) for rows in (source, target)]
        scale = float(kept[0].norm(dim=1).mean() * kept[1].norm(dim=1).mean())
        self = cls((len(kept[0]), len(kept[1])), source.shape[1]).to(source.device)
        self.source.copy_(kept[0] / scale)
        self.target.copy_(kept[1] / scale)
        return self

    def forward(self, features: Tensor, from_source: bool) -> Tensor:
        """The component's features `(N, 2)` of rows whose features are `(N, F)`; `from_source`: of which modality."""
        bank = self.target if from_source else self.source
        with full_float32(bank.device):
            scores = features.to(bank) @ bank.T
        nearness = (TEMPERATURE * scores).logsumexp(1) - torch.log(torch.tensor(float(len(bank))))
        nearness = (nearness / TEMPERATURE)[:, None].to(features)
        one = torch.ones_like(nearness)
        return torch.cat([-nearness, one] if from_source else [one, -nearness], 1)


def _some(rows: Tensor) -> Tensor:
    if len(rows) <= MAX_ROWS:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_ROWS].to(rows.device)]
