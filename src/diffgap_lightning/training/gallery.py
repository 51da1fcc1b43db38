"""Everything a validation epoch produced, row by row: collected in batches, completed across ranks at its end.

Full-gallery retrieval and the fusion weights need all rows at once, but they must be *produced* batch by batch, while
averaged weights (EMA) are in place. So each batch adds what it computed, and the end of the epoch only joins it:
ranks exchange their parts, rows that a sampler repeated are dropped, and every rank holds the same gallery in the same
order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Gallery:
    """Named per-row values `(B, ...)` of each modality, on the CPU."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, dict[str, Tensor]]] = {}

    def add(self, modality: str, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add the values of some rows.

        Args:
            modality: Whose rows.
            rows: `(B,)` row numbers, unique in the modality; a repeated one keeps its first values.
            values: Name to `(B, ...)`.
        """
        parts = self._parts.setdefault(modality, {})
        columns = {name: value.detach().cpu() for name, value in values.items()}
        parts[len(parts)] = {"row": rows.cpu(), **columns}

    def complete(self) -> dict[str, dict[str, Tensor]]:
        """Modality to all values `(N, ...)` of all ranks, in the order of the row numbers, and `"row"` `(N,)`."""
        own = {
            modality: {name: torch.cat([p[name] for p in parts.values()]) for name in parts[0]}
            for modality, parts in self._parts.items()
        }
        ranks = _all_gather(own)
        joined: dict[str, dict[str, Tensor]] = {}
        for modality in sorted({m for rank in ranks for m in rank}):
            shares = [rank[modality] for rank in ranks if modality in rank]
            values = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
            order = _first_occurrences(values["row"])
            joined[modality] = {name: value[order] for name, value in values.items()}
        return joined


def _first_occurrences(rows: Tensor) -> Tensor:
    """Positions of each distinct row number's first occurrence, by ascending row number."""
    order = torch.argsort(rows, stable=True)
    ordered = rows[order]
    first = torch.ones(len(rows), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def _all_gather(own: dict[str, dict[str, Tensor]]) -> list[dict[str, dict[str, Tensor]]]:
    """Every rank's values; a rank may hold none."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    ranks: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, own)
    return ranks
