"""Which rows the bridges pair, hold out and leave out."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import pairs as module
from diffgap_lightning.bridges.pairs import PairedRows


def paired(first_ids, second_ids):
    a, b = torch.tensor(first_ids), torch.tensor(second_ids)
    return PairedRows.find(a[:, None] * 1.0, b[:, None] * 10.0, a, b, "a and b")


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
    folds = list(rows.held_out(3, max_units=100))
    seen = torch.cat([fold.first_ids for fold in folds])
    assert sorted(seen.tolist()) == [0, 0, 1, 2, 3, 4, 5, 5, 6]
    for fold in folds:
        assert set(fold.first_ids.tolist()) == set(fold.second_ids.tolist())
        assert torch.equal(fold.x * 10, fold.y)
        rest = rows.of(~torch.isin(rows.first_ids[rows.i], fold.first_ids))
        assert len(rest.i) + len(fold.i) == len(rows.i)
        assert not set(rest.first_ids.tolist()) & set(fold.first_ids.tolist())


def test_held_out_ids_are_limited_and_the_same_every_time():
    rows = paired(list(range(40)), list(range(40)))
    folds = [fold.first_ids for fold in rows.held_out(5, max_units=3)]
    assert [len(f) for f in folds] == [3] * 5
    again = [fold.first_ids for fold in rows.held_out(5, max_units=3)]
    assert all(torch.equal(a, b) for a, b in zip(folds, again, strict=True))
    other = [fold.first_ids for fold in rows.held_out(5, max_units=3, seed=1)]
    assert not all(torch.equal(a, b) for a, b in zip(folds, other, strict=True))


def test_where_ids_are_classes_rows_of_the_larger_side_are_held_out():
    prompts, clips = [0, 1], [0, 1] * 10
    for rows in (paired(prompts, clips), paired(clips, prompts)):
        folds = list(rows.held_out(5, max_units=100))
        assert [len(fold.i) for fold in folds] == [4] * 5
        assert sum(len({len(fold.first), len(fold.second)} & {4}) for fold in folds) == 5
        held, rest = rows.split(0.2, max_units=100)
        assert (len(held.i), len(rest.i)) == (4, 16)
        assert set(rest.first_ids.tolist()) == {0, 1}


def test_a_split_holds_out_whole_ids_and_at_least_one():
    rows = paired([0, 0, 1, 2, 3], [0, 1, 2, 3])
    held, rest = rows.split(0.5, max_units=100)
    assert not set(held.first_ids.tolist()) & set(rest.first_ids.tolist())
    assert len(torch.unique(held.first_ids)) == 2
    assert len(rows.split(0.01, max_units=100)[0].i) >= 1
    assert len(torch.unique(rows.split(0.9, max_units=1)[0].first_ids)) == 1
    assert rows.split(0.0, max_units=100) == (None, rows)
    assert paired([4, 4], [4]).split(0.5, max_units=9)[0] is None


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
