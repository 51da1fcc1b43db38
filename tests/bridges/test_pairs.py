"""Which rows the bridges pair, hold out and leave out."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import pairs as module
from diffgap_lightning.bridges.pairs import PairedRows


def paired(first_ids, second_ids):
    a, b = torch.tensor(first_ids), torch.tensor(second_ids)
    return PairedRows.of(a[:, None] * 1.0, b[:, None] * 10.0, a, b, "a and b")


def test_every_pair_of_equal_ids_is_there_once():
    rows = paired([1, 2, 2, 3], [2, 1, 2, 9])
    assert sorted(zip(rows.i.tolist(), rows.j.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 0), (2, 2)]
    assert torch.equal(rows.x * 10, rows.y)


def test_aligned_rows_are_not_copied():
    rows = paired(list(range(5)), list(range(5)))
    assert rows.x.data_ptr() == rows.first.data_ptr()
    swapped = paired([0, 1, 2], [2, 1, 0])
    assert torch.equal(swapped.x * 10, swapped.y)


@pytest.mark.parametrize("ids", [([1, 2], [3, 4]), ([1, 2], [1, 4])])
def test_fewer_than_two_pairs_are_refused(ids):
    with pytest.raises(ValueError, match="a and b: . positive pairs"):
        paired(*ids)


def test_held_out_rows_are_whole_ids_each_in_one_fold():
    rows = paired([0, 0, 1, 2, 3, 4, 5, 5, 6, 50], [0, 1, 1, 2, 3, 4, 5, 6, 99])
    folds = list(rows.held_out(3, max_ids=100))
    seen = torch.cat([fold.first_ids for fold in folds])
    assert sorted(seen.tolist()) == [0, 0, 1, 2, 3, 4, 5, 5, 6]
    for fold in folds:
        assert set(fold.first_ids.tolist()) == set(fold.second_ids.tolist())
        assert torch.equal(fold.x * 10, fold.y)
        rest = rows.of_ids(torch.unique(fold.first_ids), inside=False)
        assert len(rest.i) + len(fold.i) == len(rows.i)
        assert not set(rest.first_ids.tolist()) & set(fold.first_ids.tolist())


def test_held_out_ids_are_limited_and_the_same_every_time():
    rows = paired(list(range(40)), list(range(40)))
    folds = [fold.first_ids for fold in rows.held_out(5, max_ids=3)]
    assert [len(f) for f in folds] == [3] * 5
    again = [fold.first_ids for fold in rows.held_out(5, max_ids=3)]
    assert all(torch.equal(a, b) for a, b in zip(folds, again, strict=True))
    other = [fold.first_ids for fold in rows.held_out(5, max_ids=3, seed=1)]
    assert not all(torch.equal(a, b) for a, b in zip(folds, other, strict=True))


def test_products_of_large_classes_are_thinned_by_rows_of_each_id(monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRS", 500)
    ids = [0] * 100 + [1] * 100 + [2, 3]
    rows = paired(ids, ids)
    assert 250 < len(rows.i) <= 500
    counts = torch.bincount(rows.first_ids[rows.i])
    assert counts[2] == counts[3] == 1
    assert counts[0] == counts[1]
    again = paired(ids, ids)
    assert torch.equal(rows.i, again.i)
