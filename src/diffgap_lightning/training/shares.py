"""Which rows of the whole batch a rank holds: every W-th, so that all ranks together train as one process would.

With W ranks of B rows each, a step's batch has W B rows, and rank r's j-th row is number `j W + r` of it. What depends
on the whole batch, the split between the directions and the noise, is made for all of its rows on every rank, and each
takes its own: W times what is used, little beside a step, and no communication. Only dropout is a rank's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


@dataclass(frozen=True)
class Share:
    """Rows `first, first + stride, ...` below `total`: those on this rank of the rows that train a direction."""

    total: int
    first: int = 0
    stride: int = 1

    def __len__(self) -> int:
        """How many are here."""
        return self.before(self.total)

    def before(self, number: int) -> int:
        """How many of those here come before a row number."""
        return len(range(self.first, number, self.stride))

    def of(self, rows: Tensor) -> Tensor:
        """Those here of `(total, ...)` rows."""
        return rows[self.first :: self.stride]


def own_rows(rows: slice, rank: int, world: int) -> tuple[slice, Share]:
    """Some rows of the whole batch as seen from a rank.

    Returns:
        Where in its own batch those lie that it holds, and which of the rows they are.
    """
    share = Share(rows.stop - rows.start, (rank - rows.start) % world, world)
    start = (rows.start + share.first - rank) // world
    return slice(start, start + len(share)), share


def of_all_ranks(rows: Tensor, world: int) -> Tensor:
    """The rows `(B, ...)` of all ranks one after another, without gradients to theirs; B may differ."""
    return rows if world == 1 else torch.cat(gather_all_tensors(rows))
