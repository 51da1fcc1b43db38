"""Exact ranks over a full gallery, in chunks of queries, so that the Q x G score matrix never exists.

The score of a query and a gallery row is the float32 inner product of their features (normalise them for a cosine).
Rows with equal ids are positives, and a query may have several. With its positives in order of falling score
s_1 >= s_2 >= ..., and ties counted in the query's favour,

    rank_i = i + #{negatives with a score > s_i},   best = rank_1 = 1 + #{gallery rows with a score > s_1},
    AP@10  = (1 / #positives) * sum over i with rank_i <= 10 of i / rank_i.

This is the convention of the caption datasets (AudioCaps, Clotho): text to audio, every caption is a query with one
positive; audio to text, a clip counts by the best of its five captions, and mAP@10 divides by five.

Because ties favour the query, a gallery of equal rows gives R@1 = 1: look at the gap measures beside the ranks.
Positive and negative scores are read from the same matrix product, since another summation order would break ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.precision import full_float32

MAX_DEPTH = 10  # of the average precision
_MAX_SCORES = 2**25  # elements of one score block (128 MiB), which bounds the memory for large galleries
_GALLERY_MULTIPLE = 64  # see pad_rows


@dataclass(frozen=True)
class RetrievalRanks:
    """What every retrieval figure is computed from; one entry a query, in the order of the queries.

    Attributes:
        best: `(Q,)` int64, the 1-based rank of the best positive.
        average_precision_at_10: `(Q,)` float32 in [0, 1].
    """

    best: Tensor
    average_precision_at_10: Tensor


@torch.no_grad()
def retrieval_ranks(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, *, chunk_size: int = 1024
) -> RetrievalRanks:
    """Rank the whole gallery for every query by inner product.

    Args:
        query: `(Q, F)` floating; ranked in float32 whatever its dtype and whatever autocast says.
        gallery: `(G, F)`.
        query_ids: `(Q,)` int64.
        gallery_ids: `(G,)` int64; positives are the rows with the query's id.
        chunk_size: Most queries in one product; fewer are taken where the gallery is large.

    Raises:
        TypeError: features that are not floating, ids that are not int64.
        ValueError: empty, NaN, infinite or zero rows; lengths that differ; a query without a positive.

    Example:
        >>> gallery = torch.eye(3)
        >>> query = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.1, 0.3]])
        >>> retrieval_ranks(query, gallery, torch.tensor([7, 9]), torch.tensor([7, 8, 9])).best
        tensor([1, 2])
    """
    check_embeddings(query, "query")
    check_embeddings(gallery, "gallery", dim=query.shape[1])
    _check_queries(query_ids, gallery_ids, len(query), len(gallery))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    columns = pad_rows(gallery.float(), _GALLERY_MULTIPLE).T
    rows = max(1, min(chunk_size, _MAX_SCORES // columns.shape[1]))
    parts = []
    with full_float32(query.device):
        for start in range(0, len(query), rows):
            chunk = slice(start, start + rows)
            scores = (query[chunk].float() @ columns)[:, : len(gallery)]
            parts.append(_rank_block(scores, query_ids[chunk], gallery_ids))
    return _concatenate(parts)


@torch.no_grad()
def retrieval_ranks_from_scores(scores: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> RetrievalRanks:
    """Rank the gallery for every query by a score matrix that exists already.

    Args:
        scores: `(Q, G)` float32 or float64; minus infinity excludes a row.
        query_ids: `(Q,)` int64.
        gallery_ids: `(G,)` int64.

    Raises:
        TypeError: scores in half precision, whose rounding makes ties; ids that are not int64.
        ValueError: wrong shape, NaN, or a query without a positive.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in (torch.float32, torch.float64):
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: got {got}, expected float32 or float64, since rounded scores tie; compute in float32")
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected (Q, G) with at least one entry")
    if scores.isnan().any():
        raise ValueError(
            f"scores: {int(scores.isnan().sum())} entries are NaN and have no rank; remove or recompute them"
        )
    _check_queries(query_ids, gallery_ids, *scores.shape)
    rows = max(1, _MAX_SCORES // scores.shape[1])
    blocks = range(0, len(scores), rows)
    return _concatenate([_rank_block(scores[k : k + rows], query_ids[k : k + rows], gallery_ids) for k in blocks])


def recall_at_k(best: Tensor, k: int) -> float:
    """Share of queries whose best positive is among the first k; `best` is `(Q,)` 1-based ranks."""
    return (_ranks(best) <= k).double().mean().item()


def median_rank(best: Tensor) -> float:
    """Median of `(Q,)` 1-based ranks; the mean of the two middle ones if Q is even."""
    ordered = _ranks(best).sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]).item() / 2


def mean_rank(best: Tensor) -> float:
    """Mean of `(Q,)` 1-based ranks."""
    return _ranks(best).double().mean().item()


def retrieval_summary(ranks: RetrievalRanks) -> dict[str, float]:
    """The usual figures: `r1`, `r5`, `r10` and `map10` in [0, 1], `median_rank` and `mean_rank` from 1."""
    recalls = {f"r{k}": recall_at_k(ranks.best, k) for k in (1, 5, 10)}
    return recalls | {
        "median_rank": median_rank(ranks.best),
        "mean_rank": mean_rank(ranks.best),
        "map10": ranks.average_precision_at_10.cpu().double().mean().item(),
    }


def ranks_from_counts(top: Tensor, above: Tensor, positives: Tensor) -> RetrievalRanks:
    """Ranks from what was counted.

    Args:
        top: `(Q, K)` best scores of each query's positives, falling, filled with minus infinity; K <= `MAX_DEPTH`.
        above: `(Q, K)` how many of the gallery's scores exceed each of them.
        positives: `(Q,)` number of positives, at least 1.
    """
    positives_above = (top[:, None, :] > top[:, :, None]).sum(2)
    order = torch.arange(1, top.shape[1] + 1, device=top.device)
    rank = order + above - positives_above
    counted = (order <= positives[:, None]) & (rank <= MAX_DEPTH)
    precision = torch.where(counted, order / rank, 0.0).sum(1) / positives
    return RetrievalRanks(rank[:, 0], precision.float())


def top_positives(scores: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Each query's best positive scores, falling, `(q, K)`, filled with minus infinity; K <= `MAX_DEPTH`.

    The k-th positive has at least rank k, so that ten are enough.

    Args:
        scores: `(q, G)`.
        i: `(P,)` rows of the positives, ascending, at least one.
        j: `(P,)` their columns.
    """
    score = scores[i, j]
    order = score.argsort(descending=True)
    order = order[i[order].argsort(stable=True)]
    positives = torch.bincount(i, minlength=len(scores))
    place = torch.arange(len(i), device=i.device) - (positives.cumsum(0) - positives)[i]
    keep = place < MAX_DEPTH
    top = scores.new_full((len(scores), min(MAX_DEPTH, int(positives.max()))), -torch.inf)
    top[i[keep], place[keep]] = score[order][keep]
    return top


def count_above(scores: Tensor, threshold: Tensor) -> Tensor:
    """How many entries of each row of `(q, G)` exceed its threshold `(q,)`; int32 sums are much the fastest on CPU."""
    return (scores > threshold[:, None]).sum(1, dtype=torch.int32).long()


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    """Zero rows up to a multiple of `multiple`, which is itself one of 64 where ties matter.

    Matrix products treat the last few columns by another kernel with another summation order: without padding, equal
    gallery rows get scores that differ in the last bit, and no longer tie.
    """
    missing = -len(rows) % multiple
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _rank_block(scores: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> RetrievalRanks:
    """Ranks for a block `(q, G)` of scores: one counting pass for each of the first ten positives."""
    i, j = pair_indices(query_ids, gallery_ids)
    top = top_positives(scores, i, j)
    above = torch.stack([count_above(scores, top[:, k]) for k in range(top.shape[1])], dim=1)
    return ranks_from_counts(top, above, torch.bincount(i, minlength=len(scores)))


def _concatenate(parts: list[RetrievalRanks]) -> RetrievalRanks:
    best = torch.cat([part.best for part in parts])
    return RetrievalRanks(best, torch.cat([part.average_precision_at_10 for part in parts]))


def check_ids(name: str, ids: Tensor, length: int) -> None:
    """Refuse ids that are not int64 or not one a row."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: got {ids.dtype}, expected int64; map string ids with functional.pairs.hash_ids")
    if ids.shape != (length,):
        raise ValueError(f"{name}: got shape {tuple(ids.shape)}, expected ({length},): one id a row")


def _check_queries(query_ids: Tensor, gallery_ids: Tensor, queries: int, rows: int) -> None:
    check_ids("query_ids", query_ids, queries)
    check_ids("gallery_ids", gallery_ids, rows)
    lone = ~torch.isin(query_ids, gallery_ids)
    if lone.any():
        raise ValueError(
            f"query_ids: {int(lone.sum())} of {queries} queries (first: row {int(lone.nonzero()[0])}, id "
            f"{int(query_ids[lone][0])}) have no positive in the gallery; leave them out or add their partners"
        )


def _ranks(best: Tensor) -> Tensor:
    if best.ndim != 1 or len(best) == 0:
        raise ValueError(f"ranks: got shape {tuple(best.shape)}, expected (Q,) with at least one query")
    return best.cpu()
