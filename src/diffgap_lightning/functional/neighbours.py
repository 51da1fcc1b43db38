r"""Precision and recall of produced rows, from nearest neighbours (Kynkaanniemi et al. 2019).

A row lies on a set's manifold if it is no farther from some row of the set than that row's k-th neighbour within it:

    precision   share of produced rows on the manifold of the true ones     what is produced could be real
    recall      share of true rows on the manifold of the produced ones     what is real could be produced

Regression to the mean keeps the first and loses the second. Both grow with k and with the number of rows, so methods
are compared on the same rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffgap_lightning.functional.mmd import check_rows, squared_distances
from diffgap_lightning.functional.precision import column_mean, full_float32, true_float


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


@torch.no_grad()
def neighbour_precision_recall(
    source: Tensor, target: Tensor, num_neighbours: int = 5, *, chunk_size: int = 1024
) -> PrecisionRecall:
    """Precision and recall of produced rows against true ones.

    Args:
        source: `(N, D)` produced rows, more than `num_neighbours`.
        target: `(M, D)` true rows, likewise.
        num_neighbours: k.
        chunk_size: Rows of one block of distances.

    Raises:
        TypeError, ValueError: rows that `check_embeddings` refuses, or too few of them.
    """
    check_rows(source, "source")
    check_rows(target, "target", dim=source.shape[1])
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours: got {num_neighbours}, expected at least 1")
    for name, rows in (("source", source), ("target", target)):
        if len(rows) <= num_neighbours:
            raise ValueError(f"{name}: got {len(rows)} rows, expected more than num_neighbours={num_neighbours}")
    centre = column_mean(target)  # distances do not depend on it, their rounding does
    x, y = true_float(source, centre), true_float(target, centre)
    with full_float32(x.device):
        radius = [_radius(rows, num_neighbours, chunk_size) for rows in (x, y)]
        inside = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for start in range(0, len(x), chunk_size):
            part = slice(start, start + chunk_size)
            distances = squared_distances(x[part], y)
            covered[part] = (distances <= radius[1]).any(1)
            inside |= (distances <= radius[0][part, None]).any(0)
    return PrecisionRecall(covered.double().mean().item(), inside.double().mean().item())


def _radius(rows: Tensor, num_neighbours: int, chunk_size: int) -> Tensor:
    """Squared distance of every row to its k-th neighbour among the others, `(N,)`."""
    found = []
    for start in range(0, len(rows), chunk_size):
        part = rows[start : start + chunk_size]
        distances = squared_distances(part, rows)
        own = torch.arange(len(part), device=rows.device)
        distances[own, own + start] = torch.inf
        found.append(distances.kthvalue(num_neighbours, dim=1).values)
    return torch.cat(found)
