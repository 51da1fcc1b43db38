"""Rows of two modalities and their positive pairs, as the bridges fit on them.

Pairs come from equal ids, so that a clip with five captions makes five pairs and weighs five times in a regression.
Where classes stand in for clips the number of pairs is the product of two large numbers; then each id keeps a random,
but fixed, few of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgap_lightning.functional.pairs import pair_indices

MAX_PAIRS = 1_000_000
_CLASS_SIZE = 8  # pairs an id, on average, from which on ids are taken for classes


@dataclass(frozen=True)
class PairedRows:
    """Rows of both modalities, and which of them are pairs.

    Attributes:
        first: `(N, D_1)` centred rows.
        second: `(M, D_2)` centred rows.
        first_ids: `(N,)`.
        second_ids: `(M,)`.
        i: `(P,)` rows of `first`.
        j: `(P,)` rows of `second`, its partners.
    """

    first: Tensor
    second: Tensor
    first_ids: Tensor
    second_ids: Tensor
    i: Tensor
    j: Tensor

    @classmethod
    def find(cls, first: Tensor, second: Tensor, first_ids: Tensor, second_ids: Tensor, name: str) -> PairedRows:
        """Find the pairs, at most about `MAX_PAIRS`.

        Raises:
            ValueError: fewer than two pairs.
        """
        first_ids, second_ids = first_ids.to(first.device), second_ids.to(first.device)
        kept = _few_rows(first_ids, second_ids)
        i, j = pair_indices(first_ids[kept[0]], second_ids[kept[1]])
        if len(i) < 2:
            raise ValueError(f"{name}: {len(i)} positive pairs, expected at least 2: rows of both with equal ids")
        return cls(first, second, first_ids, second_ids, kept[0][i], kept[1][j])

    @property
    def x(self) -> Tensor:
        """`(P, D_1)` rows of the first modality, one a pair."""
        return _take(self.first, self.i)

    @property
    def y(self) -> Tensor:
        """`(P, D_2)` their partners."""
        return _take(self.second, self.j)

    def units(self) -> Tensor:
        """What may be held out, as a number for each pair `(P,)`: its id, or a row of its own.

        Ids usually are clips, and new clips are what a bridge will meet. Ids with many rows are classes, of which new
        rows will be met: then each row of the modality with more rows is a unit, whose partners stay on both sides.
        """
        if len(self.i) < _CLASS_SIZE * len(torch.unique(self.first_ids[self.i])):
            return self.first_ids[self.i]
        return self.i if len(torch.unique(self.i)) >= len(torch.unique(self.j)) else self.j

    def held_out(self, num_folds: int, max_units: int, seed: int = 0) -> Iterator[PairedRows]:
        """The held-out rows of a cross-validation by whole units; what is fitted on is all pairs less these.

        Args:
            num_folds: K.
            max_units: Each fold holds out the K-th part of the units, but at most so many.
            seed: Of the assignment of units to folds.
        """
        units = self.units()
        order = _shuffled(units, seed)
        size = min(max_units, -(-len(order) // max(2, num_folds)))
        for k in range(num_folds if len(order) > 1 else 0):
            held = order[k * size : (k + 1) * size]
            if len(held) > 0:
                yield self.of(torch.isin(units, held))

    def split(self, share: float, max_units: int, seed: int = 0) -> tuple[PairedRows | None, PairedRows]:
        """Hold out a share of the units, at least one and at most `max_units`; None if there is nothing to hold out.

        Returns:
            (held out, the rest)
        """
        held = self.held_mask(share, max_units, seed)
        return (self.of(held), self.of(~held)) if held.any() else (None, self)

    def held_mask(self, share: float, max_units: int, seed: int = 0) -> Tensor:
        """The pairs `(P,)` that `split` holds out; none where there is nothing to hold out."""
        units = self.units()
        order = _shuffled(units, seed)
        if share == 0 or len(order) < 2:
            return torch.zeros_like(units, dtype=torch.bool)
        return torch.isin(units, order[: min(max_units, max(1, int(share * len(order))))])

    def of(self, pairs: Tensor) -> PairedRows:
        """Some of the pairs, by a mask `(P,)`, and the rows that are in them."""
        a, i = self.i[pairs].unique(return_inverse=True)
        b, j = self.j[pairs].unique(return_inverse=True)
        return PairedRows(self.first[a], self.second[b], self.first_ids[a], self.second_ids[b], i, j)


def _shuffled(units: Tensor, seed: int) -> Tensor:
    distinct = torch.unique(units)
    return distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).to(units.device)]


def _few_rows(first_ids: Tensor, second_ids: Tensor) -> list[Tensor]:
    """Row numbers of both that are kept so that the pairs number about `MAX_PAIRS` at most; usually all of them."""
    both = (first_ids, second_ids)
    unique, inverse = torch.unique(torch.cat(both), return_inverse=True)
    counts = [torch.bincount(part, minlength=len(unique)).double() for part in inverse.split([len(x) for x in both])]
    limit = float(max(c.max() for c in counts))
    while (counts[0].clamp_max(limit) * counts[1].clamp_max(limit)).sum() > MAX_PAIRS and limit > 1:
        limit = max(1.0, limit * 0.8)
    return [_first_of_each(ids, int(limit)) for ids in both]


def _first_of_each(ids: Tensor, limit: int) -> Tensor:
    """Sorted row numbers of at most `limit` randomly chosen rows of each id."""
    if limit >= len(ids) or limit >= int(torch.unique(ids, return_counts=True)[1].max()):
        return torch.arange(len(ids), device=ids.device)
    shuffle = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).to(ids.device)
    order = shuffle[torch.argsort(ids[shuffle], stable=True)]
    ordered = ids[order]
    start = torch.searchsorted(ordered, ordered)
    return order[torch.arange(len(ids), device=ids.device) - start < limit].sort().values


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`, without a copy where the index names every row in order."""
    if len(rows) == len(index) and bool((index[1:] > index[:-1]).all()):
        return rows
    return rows[index]
