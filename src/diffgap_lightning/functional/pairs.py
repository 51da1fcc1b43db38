"""Positive pairs: rows of two modalities belong together exactly where their ids are equal.

Several captions of one clip and many clips of one class are both expressed by repeated ids, so pairing is many-to-many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def pair_indices(source_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """All positive pairs between two lists of ids, ordered by source row and then target row.

    Args:
        source_ids: `(N,)` int64.
        target_ids: `(M,)` int64.

    Returns:
        `(i, j)`, both `(P,)` int64, with `source_ids[i] == target_ids[j]`; P may be 0.

    Example:
        >>> pair_indices(torch.tensor([7, 8]), torch.tensor([8, 7, 7]))
        (tensor([0, 0, 1]), tensor([1, 2, 0]))
    """
    order = torch.argsort(target_ids, stable=True)
    sorted_ids = target_ids[order].contiguous()
    lo = torch.searchsorted(sorted_ids, source_ids.contiguous(), right=False)
    hi = torch.searchsorted(sorted_ids, source_ids.contiguous(), right=True)
    count = hi - lo
    i = torch.repeat_interleave(torch.arange(len(source_ids), device=source_ids.device), count)
    start = torch.cumsum(count, 0) - count
    offset = torch.arange(len(i), device=i.device) - start[i]
    return i, order[lo[i] + offset]


def hash_ids(ids: Iterable[object]) -> Tensor:
    """Map string ids to `(N,)` non-negative int64, the same in every process (BLAKE2b, 63 bits)."""
    values = [int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "big") >> 1 for i in ids]
    return torch.tensor(values, dtype=torch.int64)
