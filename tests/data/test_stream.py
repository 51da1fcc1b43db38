from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from diffgap_lightning.data.losses import LossLedger
from diffgap_lightning.data.plan import EvalPlan, TrainPlan
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.stream import EvalStream, TrainStream
from diffgap_lightning.data.stream_loader import EvalLoader, TrainLoader

Ids = list[list[int]]


def train(spec: object, batch: int = 8, rank: int = 0, workers: int = 0, **options) -> TrainLoader:
    shards = open_shards(spec)
    names = ("world", "seed", "steps", "window_rows", "lanes")
    plan_options = {k: options.pop(k) for k in names if k in options}
    plan = TrainPlan(
        shards.manifest.block_rows[:, 0], batch, **{"window_rows": 32, "lanes": max(1, workers)} | plan_options
    )
    ledger = LossLedger("train", plan.total, options.pop("budget", 0.0), rank)
    return TrainLoader(TrainStream(shards, plan, rank), ledger, num_workers=workers, **options)


def evaluate(
    spec: object, batch: int = 8, rank: int = 0, world: int = 1, workers: int = 0, budget: float = 0
) -> EvalLoader:
    shards = open_shards(spec)
    plan = EvalPlan(tuple(shards.manifest.num_rows.values()), batch, world)
    return EvalLoader(EvalStream(shards, plan, rank), LossLedger("val", 100, budget, rank), num_workers=workers)


def ids(loader: TrainLoader, epochs: int = 1) -> Ids:
    return [batch["audio_id"].tolist() for _ in range(epochs) for batch in loader]


def test_batches_are_aligned_pairs_with_their_own_rows(shards: Callable, table: Callable) -> None:
    source, loader = table(100), train(shards(100, count=3))
    assert len(loader) == 12
    seen: list[int] = []
    for batch in loader:
        assert sorted(batch) == ["audio", "audio_id", "text", "text_id"]
        assert batch["audio"].dtype == torch.float32
        assert batch["audio_id"].dtype == torch.int64
        assert torch.equal(batch["audio_id"], batch["text_id"])
        for m in ("audio", "text"):
            assert torch.equal(batch[m], source.embeddings[m][batch[f"{m}_id"]])
        seen += batch["audio_id"].tolist()
    assert len(seen) == len(set(seen)) == 96


def test_iterating_again_is_the_next_epoch_in_another_order(shards: Callable) -> None:
    folder = shards(64)
    loader = train(folder)
    first, second = ids(loader), ids(loader)
    assert first != second
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(64))
    assert ids(train(folder), 2) == first + second
    assert ids(train(folder, seed=1)) != first


def test_an_epoch_told_from_outside_wins(shards: Callable) -> None:
    folder, now = shards(64), [1]
    assert ids(train(folder, epoch=lambda: now[0])) == ids(train(folder), 2)[8:]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_no_difference_to_their_lanes(shards: Callable, workers: int) -> None:
    folder = shards(100, count=2)
    loader = train(folder, workers=workers, lanes=3)
    assert ids(loader, 2) == ids(train(folder, lanes=3), 2)
    loader.close()


def test_a_consumer_may_stop_early_and_start_again(shards: Callable) -> None:
    loader = train(shards(100), workers=2)
    whole = ids(train(shards(100, name="again"), lanes=2))
    assert next(iter(loader))["audio_id"].tolist() == whole[0]
    assert ids(loader) == whole
    loader.close()


@pytest.mark.parametrize(
    ("stop", "workers"), [(0, 0), (1, 0), (5, 0), (11, 0), (12, 0), (13, 0), (30, 0), (5, 2), (13, 2)]
)
def test_resuming_continues_the_sequence_with_any_number_of_workers(shards: Callable, stop: int, workers: int) -> None:
    folder = shards(100, count=2)
    whole = ids(train(folder, lanes=2), 3)
    first = train(folder, lanes=2)
    got: Ids = []
    while len(got) < stop:
        for batch in first:
            got.append(batch["audio_id"].tolist())
            if len(got) == stop:
                break
    state = first.state_dict()
    assert state["epoch"] * 12 + state["position"] == stop
    second = train(folder, workers=workers, lanes=max(1, workers))
    second.load_state_dict(state)
    while len(got) < len(whole):
        got += ids(second)
    assert got == whole
    second.close()


def test_prefetching_workers_do_not_run_ahead_of_the_saved_position(shards: Callable) -> None:
    loader = train(shards(200), workers=2)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    assert loader.state_dict()["position"] == 3
    loader.close()


def test_another_plan_is_told(shards: Callable) -> None:
    folder = shards(100)
    state = train(folder).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(folder).load_state_dict(state)
        train(folder, lanes=3).load_state_dict(state)
    for options, words in (
        ({"batch": 4}, "batch_size 8 -> 4"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"world": 2}, "world 1 -> 2"),
    ):
        with pytest.warns(UserWarning, match=words):
            train(folder, **options).load_state_dict(state)
    with pytest.warns(UserWarning, match="data .* rows may repeat or be left out"):
        train(shards(100, name="other", seed=5)).load_state_dict(state)


@pytest.mark.parametrize("count", range(1, 10))
def test_two_ranks_share_an_epoch_whatever_the_number_of_shards(shards: Callable, count: int) -> None:
    folder = shards(150, count=count)
    loaders = [train(folder, rank=r, world=2, lanes=2) for r in range(2)]
    assert [len(loader) for loader in loaders] == [9, 9]
    parts = [ids(loader) for loader in loaders]
    assert [[len(b) for b in part] for part in parts] == [[8] * 9] * 2
    everything = sum(sum(parts, []), [])
    assert len(set(everything)) == len(everything) == 144


@pytest.mark.parametrize("kind", ["pairs", "rows"])
@pytest.mark.parametrize(("world", "batch", "pairs"), [(1, 7, 40), (2, 8, 41), (3, 64, 5), (4, 8, 3)])
def test_evaluation_reads_every_row_once(
    shards: Callable, kind: str, world: int, batch: int, pairs: int, table: Callable
) -> None:
    folder, source = shards(pairs, count=2, kind=kind, captions=3), table(pairs, captions=3)
    loaders = [evaluate(folder, batch, r, world) for r in range(world)]
    batches = [list(loader) for loader in loaders]
    assert [len(b) for b in batches] == [len(loaders[0])] * world
    for m in ("audio", "text"):
        rows = torch.cat([b[f"{m}_row"] for part in batches for b in part])
        got_ids = torch.cat([b[f"{m}_id"] for part in batches for b in part])
        values = torch.cat([b[m] for part in batches for b in part])
        total = 3 * pairs if kind == "pairs" or m == "text" else pairs
        assert sorted(rows.tolist()) == list(range(total))
        assert max(len(b[m]) for part in batches for b in part) <= batch
        assert values.shape == (total, source.embeddings[m].shape[1])
        if kind == "rows":
            order = torch.argsort(rows)
            assert torch.equal(got_ids[order], source.ids[m])
            assert torch.equal(values[order], source.embeddings[m])


def test_evaluation_is_the_same_every_time_and_with_workers(shards: Callable) -> None:
    folder = shards(50, kind="rows")
    loader = evaluate(folder, workers=2)
    first, second = ([b["text_row"].tolist() for b in loader] for _ in range(2))
    assert first == second
    assert sorted(sum(first, [])) == list(range(50))
    loader.close()


def test_classic_tars_stream_like_blocks(classic: Callable, table: Callable) -> None:
    from diffgap_lightning.functional.pairs import hash_ids

    paths = classic(30, count=3)
    source, keys = table(30), hash_ids([f"s{i:04d}" for i in range(30)]).tolist()
    batches = list(train(paths, batch=5))
    assert sorted(i for b in batches for i in b["audio_id"].tolist()) == sorted(keys)
    for b in batches:
        index = torch.tensor([keys.index(i) for i in b["text_id"].tolist()])
        assert torch.equal(b["text"], source.embeddings["text"][index])
    rows = [i for b in evaluate(paths) for i in b["audio_row"].tolist()]
    assert sorted(rows) == list(range(30))


def test_half_precision_rows_come_as_float32(shards: Callable, table: Callable) -> None:
    source, batch = table(20), next(iter(train(shards(20, dtype="float16"))))
    assert batch["audio"].dtype == torch.float32
    torch.testing.assert_close(batch["audio"], source.embeddings["audio"][batch["audio_id"]], atol=5e-4, rtol=0)


def test_a_batch_is_the_callers_own(shards: Callable) -> None:
    """Changing a batch in place does not change what the stream gives next time."""
    stream = train(shards(20)).stream
    kept = {name: value.clone() for name, value in stream[0, 0][0].items()}
    for value in stream[0, 0][0].values():
        value.zero_()
    assert all(torch.equal(value, stream[0, 0][0][name]) for name, value in kept.items())


def test_a_block_that_all_modalities_need_is_read_once(shards: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches go through a block in several steps, and a modality's next block does not push out the other's."""
    loader = evaluate(shards(64, kind="rows", block=16, captions=2), batch=4)
    reader, read = loader.stream.reader, []
    monkeypatch.setattr(reader, "read", lambda index, own=reader.read: read.append(index) or own(index))
    list(loader)
    assert sorted(read) == list(range(len(reader)))


def test_a_position_belongs_to_its_epoch(shards: Callable) -> None:
    folder = shards(64)
    loader = train(folder, epoch=lambda: 2)
    loader.load_state_dict(train(folder).state_dict() | {"epoch": 1, "position": 5})
    assert ids(loader) == ids(train(folder), 3)[16:]


def test_one_modality_is_enough(shards: Callable) -> None:
    manifest = open_shards(shards(20))
    plan = TrainPlan(manifest.manifest.block_rows[:, 0], 4)
    batch = next(iter(TrainLoader(TrainStream(manifest, plan, modalities=["text"]), LossLedger("t", 20))))
    assert sorted(batch) == ["text", "text_id"]
