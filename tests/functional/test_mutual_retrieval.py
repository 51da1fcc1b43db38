"""Both directions at once; this file is also the program that two processes run, with arguments RANK FOLDER."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.functional import mutual_retrieval as module
from diffgap_lightning.functional.mutual_retrieval import mutual_retrieval_ranks
from diffgap_lightning.functional.retrieval import RetrievalRanks, retrieval_ranks


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def one_way_each(x, y, x_ids, y_ids):
    out = []
    for q, g, q_ids, g_ids in ((x, y, x_ids, y_ids), (y, x, y_ids, x_ids)):
        asks = torch.isin(q_ids, g_ids)
        out.append(retrieval_ranks(q[asks], g, q_ids[asks], g_ids))
    return out


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.best, b.best)
        assert torch.equal(a.average_precision_at_10, b.average_precision_at_10)


@st.composite
def worlds(draw):
    """Integer features (exact products, many ties, negative scores), ids that repeat, and rows without a partner."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m, d = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    largest = draw(st.sampled_from([1, 4, 60]))
    x_ids, y_ids = (rng.integers(-3, largest, k) for k in (n, m))
    y_ids[rng.integers(m)] = x_ids[rng.integers(n)]
    x, y = (rng.integers(-2, 3, (k, d)).astype(np.float32) for k in (n, m))
    x[~x.any(1)], y[~y.any(1)] = 1, -1
    return tuple(torch.from_numpy(a) for a in (x, y, x_ids, y_ids))


@settings(deadline=None, max_examples=150)
@given(worlds(), st.integers(1, 45))
def test_both_directions_equal_the_one_way_ranks_for_every_tile_size(world, tile_size) -> None:
    assert_same(mutual_retrieval_ranks(*world, tile_size=tile_size), one_way_each(*world))


def test_more_positives_than_the_average_precision_looks_at() -> None:
    x, y = torch.sign(unit(70, 6)), torch.sign(unit(90, 6, seed=1))
    world = x, y, torch.arange(70) % 3, torch.arange(90) % 4
    assert_same(mutual_retrieval_ranks(*world, tile_size=16), one_way_each(*world))


def test_real_valued_features_in_any_order() -> None:
    x, y = unit(700, 24), unit(700, 24) + 0.9 * unit(700, 24, seed=1)
    shuffle = torch.randperm(700, generator=torch.Generator().manual_seed(2))
    world = x.double(), y[shuffle].double(), torch.arange(700), shuffle
    assert_same(mutual_retrieval_ranks(*world, tile_size=64), one_way_each(*world))


@pytest.mark.parametrize("rows", [63, 130, 1000])
def test_equal_rows_tie_wherever_they_are(rows) -> None:
    x = unit(1, 512).repeat(rows, 1)
    ids = torch.arange(rows)
    for ranks in mutual_retrieval_ranks(x, x + 0, ids, ids.flip(0), tile_size=128):
        assert ranks.best.tolist() == [1] * rows


def test_each_score_is_computed_once_but_for_the_tiles_with_positives(monkeypatch) -> None:
    products = []
    scores = module._scores
    monkeypatch.setattr(module, "_scores", lambda *a: products.append(1) or scores(*a))
    x, ids = unit(640, 8), torch.arange(640)
    mutual_retrieval_ranks(x, x, ids, ids, tile_size=64)
    assert len(products) == 10 * 10 + 10


def test_the_inputs_are_left_alone() -> None:
    x, y, ids = unit(20, 4), unit(20, 4, seed=1), torch.arange(20).flip(0)
    before = x.clone(), y.clone(), ids.clone()
    mutual_retrieval_ranks(x, y, ids, ids)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, ids), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source_ids": torch.arange(5, 8)}, ValueError, "no id in common"),
        ({"source_ids": torch.arange(3).float()}, TypeError, "source_ids: got torch.float32, expected int64"),
        ({"target_ids": torch.arange(2)}, ValueError, r"target_ids: got shape \(2,\), expected \(3,\)"),
        ({"target": torch.eye(3)[:, :2]}, ValueError, "target"),
        ({"source": torch.full((3, 3), torch.nan)}, ValueError, "source"),
        ({"tile_size": 0}, ValueError, "tile_size: got 0, expected at least 1"),
    ],
)
def test_refusals(change, error, message) -> None:
    good = {
        "source": torch.eye(3),
        "target": torch.eye(3),
        "source_ids": torch.arange(3),
        "target_ids": torch.arange(3),
    }
    with pytest.raises(error, match=message):
        mutual_retrieval_ranks(**good | change)


def several_tiles() -> tuple[torch.Tensor, ...]:
    x, ids = unit(100, 8), torch.arange(100) % 60
    return x, x + 0.5 * unit(100, 8, seed=1), ids, ids.flip(0)


def one_of_two(rank: int, folder: str) -> None:
    """One of the processes that share the tiles."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counted: list[int] = []
    scores = module._scores
    module._scores = lambda *a: counted.append(1) or scores(*a)
    found = mutual_retrieval_ranks(*several_tiles(), tile_size=32, distributed=True)
    torch.save([*[(r.best, r.average_precision_at_10) for r in found], len(counted)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_tiles_and_get_the_ranks_of_one(tmp_path) -> None:
    programs = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [program.wait(240) for program in programs] == [0, 0]
    products = 0
    for rank in (0, 1):
        *found, count = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same([RetrievalRanks(*f) for f in found], mutual_retrieval_ranks(*several_tiles()))
        products += count
    staircase = sum(1 for _ in module._staircase(*sides(*several_tiles())))
    assert products == 4 * 4 + 2 * staircase


def sides(x, y, x_ids, y_ids) -> tuple[module._Side, module._Side]:
    return module._Side.sort(x, x_ids, y_ids, 32), module._Side.sort(y, y_ids, x_ids, 32)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), sys.argv[2])
