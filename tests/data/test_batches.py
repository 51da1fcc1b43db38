from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.data.batches import PairBatches, PairIndex, RowBatches, StepLoader, StepSampler
from diffgap_lightning.functional.pairs import pair_indices

Ids = dict[str, torch.Tensor]


def rows_that_name_themselves(ids: Ids) -> dict[str, torch.Tensor]:
    """Row i of a modality is (i, its id), so a batch says where it came from."""
    return {m: torch.stack([torch.arange(len(v)), v], dim=1).float() for m, v in ids.items()}


def tensors(**ids: list[int]) -> Ids:
    return {modality: torch.tensor(values) for modality, values in ids.items()}


def loader(batches: PairBatches | RowBatches, num_workers: int = 0) -> StepLoader:
    return StepLoader(batches, batch_size=None, sampler=StepSampler(len(batches)), num_workers=num_workers)


def pairs_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    assert torch.equal(batch["audio_id"], batch["text_id"])
    assert torch.equal(batch["audio"][:, 1].long(), batch["audio_id"])
    assert torch.equal(batch["text"][:, 1].long(), batch["text_id"])
    return list(zip(batch["audio"][:, 0].int().tolist(), batch["text"][:, 0].int().tolist(), strict=True))


SMALL_IDS = st.lists(st.integers(-2, 3), min_size=1, max_size=9)


@given(SMALL_IDS, SMALL_IDS)
def test_the_pair_index_holds_exactly_the_equal_ids(audio: list[int], text: list[int]) -> None:
    ids = tensors(audio=audio, text=text)
    index = PairIndex(ids)
    rows = index.rows(np.arange(len(index)))
    expected = zip(*(x.tolist() for x in pair_indices(ids["audio"], ids["text"])), strict=True)
    assert sorted(zip(rows["audio"].tolist(), rows["text"].tolist(), strict=True)) == sorted(expected)


def test_three_modalities_make_all_combinations() -> None:
    index = PairIndex(tensors(a=[1, 1, 2], b=[1, 2, 2, 5], c=[2, 1, 5]))
    rows = index.rows(np.arange(len(index)))
    assert sorted(zip(*(rows[m].tolist() for m in "abc"), strict=True)) == [(0, 0, 1), (1, 0, 1), (2, 1, 0), (2, 2, 0)]


def test_a_billion_pairs_are_not_stored() -> None:
    ids = torch.zeros(40_000, dtype=torch.int64)
    batches = PairBatches(rows_that_name_themselves({"audio": ids, "text": ids}), {"audio": ids, "text": ids}, 100)
    assert len(batches.pairs) == 1_600_000_000
    assert len(set(pairs_of(batches[0, len(batches) - 1]))) == 100


@settings(max_examples=60, deadline=None)
@given(SMALL_IDS, SMALL_IDS, st.integers(1, 7), st.integers(1, 3), st.booleans())
def test_each_pair_comes_once_an_epoch_over_all_ranks(
    audio: list[int], text: list[int], batch_size: int, world_size: int, drop_last: bool
) -> None:
    ids = tensors(audio=audio, text=text)
    number = len(PairIndex(ids))
    if number == 0:
        with pytest.raises(ValueError, match="no id occurs in all of audio, text"):
            PairBatches(rows_that_name_themselves(ids), ids, batch_size)
        return
    ranks = [
        PairBatches(
            rows_that_name_themselves(ids), ids, batch_size, drop_last=drop_last, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) >= 1
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(len(ranks[0])):
        batches = [pairs_of(rank[1, step]) for rank in ranks]
        assert len({len(batch) for batch in batches}) == 1
        assert 1 <= len(batches[0]) <= batch_size
        seen.update(pair for batch in batches for pair in batch)
    if drop_last and number >= batch_size * world_size:
        assert seen.total() == number - number % (batch_size * world_size)
        assert max(seen.values()) == 1
    else:
        assert len(seen) == number
        assert seen.total() - number < world_size


def test_order_depends_on_seed_and_epoch_only() -> None:
    ids = tensors(audio=list(range(50)), text=list(range(50)))
    x = rows_that_name_themselves(ids)

    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        batches = PairBatches(x, ids, 10, seed=seed)
        return [pair for step in range(5) for pair in pairs_of(batches[epoch, step])]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


def test_a_batch_can_be_changed_without_changing_the_table() -> None:
    ids = tensors(audio=[1, 2], text=[1, 2])
    x = rows_that_name_themselves(ids)
    for batches in (PairBatches(x, ids, 2), RowBatches(x, ids, 2)):
        for tensor in batches[0].values():
            tensor.fill_(-1)
        assert all((tensor >= 0).all() for tensor in batches[0].values())
    assert x["audio"].tolist() == [[0, 1], [1, 2]]
    assert ids["text"].tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(SMALL_IDS, SMALL_IDS, st.integers(1, 5), st.integers(1, 4))
def test_every_row_comes_once_with_its_number_over_all_ranks(
    audio: list[int], text: list[int], batch_size: int, world_size: int
) -> None:
    ids = tensors(audio=audio, text=text)
    x = rows_that_name_themselves(ids)
    ranks = [RowBatches(x, ids, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    seen: dict[str, list[int]] = {"audio": [], "text": []}
    for rank in ranks:
        for step in range(len(rank)):
            batch = rank[0, step]
            for modality, rows in seen.items():
                assert len(batch[modality]) <= batch_size
                assert torch.equal(batch[modality][:, 0].long(), batch[f"{modality}_row"])
                assert torch.equal(batch[modality][:, 1].long(), batch[f"{modality}_id"])
                rows += batch[f"{modality}_row"].tolist()
    assert sorted(seen["audio"]) == list(range(len(audio)))
    assert sorted(seen["text"]) == list(range(len(text)))


def test_partners_meet_in_an_evaluation_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    audio = torch.randperm(60, generator=generator)
    text = torch.arange(60).repeat_interleave(5)[torch.randperm(300, generator=generator)]
    batches = RowBatches(rows_that_name_themselves({"audio": audio, "text": text}), {"audio": audio, "text": text}, 50)
    for step in range(len(batches)):
        batch = batches[step]
        assert set(batch["audio_id"].tolist()) == set(batch["text_id"].tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_epochs_that_it_is_told(num_workers: int) -> None:
    ids = tensors(audio=list(range(12)), text=list(range(12)))
    batches = PairBatches(rows_that_name_themselves(ids), ids, 4)
    stream = loader(batches, num_workers)
    for epoch in (0, 1, 5):
        stream.sampler.set_epoch(epoch)
        assert len(stream) == 3
        assert [pairs_of(b) for b in stream] == [pairs_of(batches[epoch, step]) for step in range(3)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_after_the_stored_step_once(num_workers: int) -> None:
    ids = tensors(audio=list(range(12)), text=list(range(12)))
    batches = PairBatches(rows_that_name_themselves(ids), ids, 3)
    first = loader(batches, num_workers)
    first.sampler.set_epoch(2)
    running = iter(first)
    next(running)
    state = first.state_dict()
    assert state == {"epoch": 2, "step": 1, "num_steps": 4}
    second = loader(batches, num_workers)
    second.load_state_dict(state)
    second.sampler.set_epoch(2)
    assert [pairs_of(b) for b in second] == [pairs_of(b) for b in running]
    assert len(list(second)) == 4
    third = loader(batches)
    third.load_state_dict(state)
    third.sampler.set_epoch(3)
    assert len(list(third)) == 4


def test_state_of_another_epoch_length_begins_the_epoch_again() -> None:
    ids = tensors(audio=list(range(12)), text=list(range(12)))
    stream = loader(PairBatches(rows_that_name_themselves(ids), ids, 3))
    with pytest.warns(UserWarning, match="had 9 steps, now it has 4"):
        stream.load_state_dict({"epoch": 1, "step": 5, "num_steps": 9})
    assert len(list(stream)) == 4
