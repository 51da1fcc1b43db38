from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffgap_lightning.functional.pairs import hash_ids, pair_indices


@given(st.lists(st.integers(-3, 3), max_size=12), st.lists(st.integers(-3, 3), max_size=12))
def test_pairs_are_exactly_the_equal_ids(source: list[int], target: list[int]) -> None:
    i, j = pair_indices(torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64))
    expected = [(a, b) for a, x in enumerate(source) for b, y in enumerate(target) if x == y]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


def test_hashed_ids_are_stable_distinct_and_non_negative() -> None:
    ids = hash_ids(["clip a", "clip b", "clip a", "é", 7])
    assert ids[0] == ids[2] == 4787028411938213703
    assert len(set(ids.tolist())) == 4
    assert (ids >= 0).all()
