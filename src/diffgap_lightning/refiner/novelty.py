"""Is a row of this space at all? Distances from what the space was measured on, in units of held-out training rows.

With z the coordinates of a row, S their shrunk covariance and r what lies outside the basis,

    inside = z' S^-1 z,    outside = |r|^2,    novelty = max(inside / median inside, outside / median outside) / q99

where the medians and q99, the 99 % quantile of the maximum, are those of training rows that were left out of mean,
basis and covariance, by folds of whole ids. So **novelty above 1 refuses 1 % of genuine rows**: that is the threshold.
Another encoder's rows, another modality's, or noise lie far above it; a new kind of sound may lie a little above it and
be none the worse for it. `inside` is the squared Mahalanobis distance, `outside` the reconstruction error of PCA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffgap_lightning.gaussian import shrunk_covariance
from diffgap_lightning.space import EmbeddingSpace

_FOLDS = 3
_MAX_ROWS = 10_000
_LEAST_OUTSIDE = 1e-6  # of unit rows: what rounding to half precision leaves


def distances(space: EmbeddingSpace, modality: str, precision: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`(inside, outside)`, each `(N,)` float32, of unit rows `(N, D)`.

    Args:
        space: The coordinates.
        modality: Of the rows.
        precision: S^-1, `(R, R)`.
        rows: On the device of the space.
    """
    offset = rows.float() - space.mean(modality)
    z = space.coordinates(offset, modality)
    inside = ((z @ precision.to(z)) * z).sum(1)
    return inside, (offset - space.offset(z, modality)).square().sum(1)


def novelty(inside: Tensor, outside: Tensor, typical: list[float]) -> Tensor:
    """`(N,)`; above 1 where a row is farther out than 99 % of held-out training rows."""
    middle_inside, middle_outside, most = typical
    return torch.maximum(inside / middle_inside, outside / middle_outside) / most


@torch.no_grad()
def typical_distances(rows: Tensor, ids: Tensor, rank: int, num_pairs: int) -> list[float]:
    """`[median inside, median outside, q99]` of training rows `(N, D)` that were left out, by folds of whole ids.

    Args:
        rows: Unit rows; a fixed draw of 10000 of them is used.
        ids: `(N,)`.
        rank: R of the space.
        num_pairs: On which the closed form was fitted; it decides how much its covariance was shrunk.
    """
    if len(rows) > _MAX_ROWS:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MAX_ROWS].to(rows.device)
        rows, ids = rows[chosen], ids[chosen]
    unique, index = torch.unique(ids, return_inverse=True)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(1)).to(index.device)
    fold = order[index] % _FOLDS
    found: list[tuple[Tensor, Tensor]] = []
    for k in range(_FOLDS):
        kept, held = rows[fold != k], rows[fold == k]
        if len(kept) < 3 or len(held) == 0:
            continue
        space = EmbeddingSpace.fit({"row": kept}, min(rank, len(kept) - 1))
        found.append(distances(space, "row", shrunk_precision(space.encode(kept, "row"), num_pairs), held))
    if not found:  # a handful of rows: nothing can be left out
        space = EmbeddingSpace.fit({"row": rows}, min(rank, len(rows) - 1))
        found = [distances(space, "row", shrunk_precision(space.encode(rows, "row"), num_pairs), rows)]
    inside, outside = (torch.cat(parts) for parts in zip(*found, strict=True))
    middle = [float(inside.median().clamp(min=1e-6)), float(outside.median().clamp(min=_LEAST_OUTSIDE))]
    return [*middle, float(novelty(inside, outside, [*middle, 1.0]).quantile(0.99).clamp(min=1e-6))]


def shrunk_precision(z: Tensor, num_pairs: int) -> Tensor:
    """Inverse of the covariance of coordinates `(N, R)`, shrunk as a closed form's of so many pairs: `(R, R)`."""
    return torch.linalg.inv(shrunk_covariance(z, num_pairs))
