"""Exact ranks in both directions from one pass over square tiles of the score matrix.

Text to audio and audio to text read the same inner products, S = X Y^T, once along rows and once along columns. Each
tile of S is computed once, held in the cache, and counted both ways:

    above_row[i] += #{j in tile: S_ij > s_i},        above_column[j] += #{i in tile: S_ij > s_j}

where s_i and s_j are the scores of the positives. These have to be known before the first tile is counted, and to the
last bit, or ties would break: so both sides are sorted by id, which gathers all positives in the few tiles along a
staircase, and these are computed first, by the same product of the same shape. Memory beyond sorted copies of the
features is a tile. With several ranks each takes every n-th row of tiles and the counts are added up.

Definitions of ranks and of average precision: `functional.retrieval`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.precision import full_float32
from diffgap_lightning.functional.retrieval import (
    MAX_DEPTH,
    RetrievalRanks,
    check_ids,
    count_above,
    pad_rows,
    ranks_from_counts,
    top_positives,
)


@torch.no_grad()
def mutual_retrieval_ranks(
    source: Tensor,
    target: Tensor,
    source_ids: Tensor,
    target_ids: Tensor,
    *,
    tile_size: int | None = None,
    distributed: bool = False,
) -> tuple[RetrievalRanks, RetrievalRanks]:
    """Rank both galleries at once: every source row among the targets, every target row among the sources.

    A row without a partner on the other side asks no query and stays a candidate.

    Args:
        source: `(N, F)` floating features; ranked in float32 whatever their dtype and whatever autocast says.
        target: `(M, F)`, on the same device.
        source_ids: `(N,)` int64.
        target_ids: `(M,)` int64; rows with equal ids are positives.
        tile_size: Rows and columns of a tile; default 1024 on a CPU (a tile stays in its cache), 8192 on a GPU.
        distributed: Share the tiles among the ranks of the process group, all of which hold the same rows; every rank
            gets the same result.

    Returns:
        Ranks of the source rows that have a partner, in their order, and the same for the target rows.

    Raises:
        TypeError: features that are not floating, ids that are not int64.
        ValueError: empty, NaN, infinite or zero rows; lengths that differ; no id in common.

    Example:
        >>> text, audio = torch.eye(3)[:2], torch.eye(3)
        >>> forward, backward = mutual_retrieval_ranks(text, audio, torch.tensor([7, 9]), torch.tensor([7, 8, 9]))
        >>> forward.best, backward.best
        (tensor([1, 2]), tensor([1, 1]))
    """
    check_embeddings(source, "source")
    check_embeddings(target, "target", dim=source.shape[1])
    check_ids("source_ids", source_ids, len(source))
    check_ids("target_ids", target_ids, len(target))
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size: got {tile_size}, expected at least 1")
    if not torch.isin(source_ids, target_ids).any():
        raise ValueError("source_ids, target_ids: no id in common, expected equal ids for positive pairs")
    size = tile_size or (1024 if source.device.type == "cpu" else 8192)
    x = _Side.sort(source, source_ids.to(source.device), target_ids.to(source.device), size)
    y = _Side.sort(target, target_ids.to(source.device), source_ids.to(source.device), size)
    with full_float32(source.device):
        for i, j in _staircase(x, y):
            _keep_positives(x, y, i, j, _scores(x, y, i, j))
        for i in _own_tiles(x, distributed):
            for j in y.tiles():
                scores = _scores(x, y, i, j)
                x.count(i, scores)
                y.count(j, scores.T)
    if distributed:
        x.above, y.above = _sum_over_ranks(x.above, y.above)
    return x.ranks(), y.ranks()


@dataclass
class _Side:
    """One modality's rows, sorted by id, and what has been counted for each of them.

    Attributes:
        rows: `(N', F)` float32 features, padded with zero rows so that all tiles have one shape.
        ids: `(N,)`, ascending.
        order: `(N,)` where each sorted row was.
        positives: `(N,)` number of partners.
        top: `(N, K)` best scores of positives, falling; K <= 10, filled with minus infinity.
        above: `(N, K)` number of scores above each of them.
        size: Rows of a tile.
    """

    rows: Tensor
    ids: Tensor
    order: Tensor
    positives: Tensor
    top: Tensor
    above: Tensor
    size: int

    @classmethod
    def sort(cls, features: Tensor, ids: Tensor, partner_ids: Tensor, size: int) -> _Side:
        order = torch.argsort(ids, stable=True)
        ids = ids[order].contiguous()
        partners = partner_ids.sort().values
        positives = torch.searchsorted(partners, ids, right=True) - torch.searchsorted(partners, ids)
        rows = features[order].float()
        rows = pad_rows(rows, size if len(rows) > size else 64)
        shape = (len(ids), min(MAX_DEPTH, int(positives.max())))
        top = rows.new_full(shape, -torch.inf)
        return cls(rows, ids, order, positives, top, torch.zeros(shape, dtype=torch.int64, device=rows.device), size)

    def tiles(self) -> list[slice]:
        """The rows in runs of at most `size`."""
        return [slice(k, min(k + self.size, len(self.ids))) for k in range(0, len(self.ids), self.size)]

    def count(self, tile: slice, scores: Tensor) -> None:
        """Add what the scores `(tile, ...)` have above the positives of the tile's rows."""
        top = self.top[tile]
        self.above[tile] += torch.stack([count_above(scores, top[:, k]) for k in range(top.shape[1])], dim=1)

    def ranks(self) -> RetrievalRanks:
        """Of the rows that have a partner, in their first order."""
        asks = (self.positives > 0).nonzero()[:, 0]
        asks = asks[self.order[asks].argsort()]
        return ranks_from_counts(self.top[asks], self.above[asks], self.positives[asks])


def _scores(x: _Side, y: _Side, i: slice, j: slice) -> Tensor:
    """One tile; the product always has the padded shape, so that equal rows score equally in every tile."""
    scores = x.rows[i.start : i.start + x.size] @ y.rows[j.start : j.start + y.size].T
    return scores[: i.stop - i.start, : j.stop - j.start]


def _own_tiles(side: _Side, distributed: bool) -> list[slice]:
    return side.tiles()[dist.get_rank() :: dist.get_world_size()] if distributed else side.tiles()


def _staircase(x: _Side, y: _Side) -> Iterator[tuple[slice, slice]]:
    """The tiles that may hold positives, found from the first and last id of each run of rows."""
    columns = y.tiles()
    for i in x.tiles():
        low = int(torch.searchsorted(y.ids, x.ids[i.start]))
        high = int(torch.searchsorted(y.ids, x.ids[i.stop - 1], right=True))
        for j in columns[low // y.size : -(-high // y.size)]:
            yield i, j


def _keep_positives(x: _Side, y: _Side, i: slice, j: slice, scores: Tensor) -> None:
    """Merge the positives of a tile into the best ones so far, on both sides."""
    a, b = x.ids[i.start : i.stop], y.ids[j.start : j.stop]
    for side, tile, own, other, s in ((x, i, a, b, scores), (y, j, b, a, scores.T)):
        if torch.isin(own, other).any():
            found = torch.cat([side.top[tile], top_positives(s, *pair_indices(own, other))], dim=1)
            side.top[tile] = found.topk(side.top.shape[1], dim=1).values


def _sum_over_ranks(*counts: Tensor) -> tuple[Tensor, ...]:
    """Element-wise sums; as objects, which every backend can send wherever the tensors are."""
    parts: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, [c.cpu() for c in counts])
    return tuple(
        torch.stack(same).sum(0).to(c.device) for same, c in zip(zip(*parts, strict=True), counts, strict=True)
    )
