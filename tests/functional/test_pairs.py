from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffgap_lightning.functional.pairs import frame_rows, hash_ids, pair_indices


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


def sequences(ids: list[int], frames: int, dim: int) -> torch.Tensor:
    """`(N, T, D)` whose values say which sequence and which frame they are of."""
    number = 100 * torch.tensor(ids)[:, None] + torch.arange(frames)
    return number[:, :, None].expand(-1, -1, dim).float()


@pytest.mark.parametrize("most", [None, 12, 100])
def test_frames_pair_up_with_the_same_frame_of_the_sequence_of_the_same_id(most: int | None) -> None:
    own = {"audio": [7, 3, 2**62], "text": [3, 7, 7, 2**62]}
    wide = {"audio": 2, "text": 5}
    data = {m: sequences([i % 1000 for i in ids], 3, wide[m]) for m, ids in own.items()}
    rows, ids, frames = frame_rows(data, {m: torch.tensor(i) for m, i in own.items()}, most)
    assert frames == 3
    assert {m: x.shape for m, x in rows.items()} == {"audio": (9, 2), "text": (12, 5)}
    i, j = pair_indices(ids["audio"], ids["text"])
    assert len(i) == 12
    assert torch.equal(rows["audio"][i, 0], rows["text"][j, 0])


def test_of_many_frames_whole_sequences_are_left_out_in_all_modalities() -> None:
    ids = torch.arange(40)
    data = {"audio": sequences(ids.tolist(), 5, 2), "text": sequences(ids.tolist(), 5, 3)}
    rows, own, _ = frame_rows(data, {"audio": ids, "text": ids}, 50)
    assert torch.equal(rows["audio"][:, 0], rows["text"][:, 0])
    assert torch.equal(own["audio"], own["text"])
    kept, counts = (rows["audio"][:, 0] // 100).unique(return_counts=True)
    assert len(kept) == 10
    assert set(counts.tolist()) == {5}
    assert len(frame_rows(data, {"audio": ids, "text": ids}, 1)[0]["audio"]) == 10  # two sequences at least


def test_embeddings_come_back_as_they_are_and_unequal_frames_are_refused() -> None:
    x, ids = torch.randn(4, 2), torch.arange(4)
    rows, own, frames = frame_rows({"audio": x}, {"audio": ids}, 1)
    assert (rows["audio"] is x, own["audio"] is ids, frames) == (True, True, 0)
    with pytest.raises(ValueError, match="audio of 3 frames, text without frames; expected as many"):
        frame_rows({"audio": torch.randn(4, 3, 2), "text": x}, {"audio": ids, "text": ids})
