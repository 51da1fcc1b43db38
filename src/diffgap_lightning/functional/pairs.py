"""Positive pairs: rows of two modalities belong together exactly where their ids are equal.

Several captions of one clip and many clips of one class are both expressed by repeated ids, so pairing is many-to-many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

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


def frame_rows(
    embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor], most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Sequences as rows: frame t of one modality is the pair of frame t of another where the sequences' ids are equal.

    Args:
        embeddings: Modality to `(N, T, D)`, or to `(N, D)`, which comes back as it is.
        ids: Modality to `(N,)`.
        most: Of longer data a fixed random choice of ids, so that about so many rows are left; None keeps all.

    Returns:
        Rows `(N T, D)`, ids `(N T,)`, and T; 0 for embeddings.

    Raises:
        ValueError: modalities of different numbers of frames.
    """
    frames = {m: x.shape[1] if x.ndim == 3 else 0 for m, x in embeddings.items()}
    if len(set(frames.values())) > 1:
        got = ", ".join(f"{m} {f'of {t} frames' if t else 'without frames'}" for m, t in frames.items())
        raise ValueError(f"sequences: got {got}; expected as many frames in all: pool or resample them")
    length = next(iter(frames.values()), 0)
    if not length:
        return dict(embeddings), dict(ids), 0
    every = torch.unique(torch.cat([ids[m].cpu() for m in embeddings]))
    largest = max(len(x) for x in embeddings.values()) * length
    if most is not None and largest > most:
        draw = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        every = every[draw[: max(2, len(every) * most // largest)]].sort().values
    rows, own = {}, {}
    for modality, x in embeddings.items():
        kept = torch.isin(ids[modality].cpu(), every)
        number = torch.searchsorted(
            every, ids[modality].cpu()[kept]
        )  # ids may be hashes, which leave no room for frames
        own[modality] = (number[:, None] * length + torch.arange(length)).flatten().to(ids[modality].device)
        rows[modality] = (x if kept.all() else x[kept.to(x.device)]).flatten(0, 1)
    return rows, own, length


def hash_ids(ids: Iterable[object]) -> Tensor:
    """Map string ids to `(N,)` non-negative int64, the same in every process (BLAKE2b, 63 bits)."""
    values = [int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "big") >> 1 for i in ids]
    return torch.tensor(values, dtype=torch.int64)
