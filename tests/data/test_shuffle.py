from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from diffgap_lightning.data.shuffle import Rows, reblock, shuffle_rows


def numbered(n: int, strings: bool = False, start: int = 0) -> Rows:
    records = np.zeros(n, [("x", np.float32, (3,)), ("id", np.int64)])
    records["id"] = np.arange(start, start + n)
    records["x"] = records["id"][:, None]
    return Rows(records, [[f"name {i}\n", "é"] for i in range(start, start + n)] if strings else [])


def ids(chunks: list[Rows]) -> list[int]:
    return [int(i) for chunk in chunks for i in chunk.records["id"]]


@pytest.mark.parametrize("memory", [1 << 20, 3000])
def test_all_rows_come_once_in_another_order_that_the_seed_decides(memory: int, tmp_path: Path) -> None:
    def run(seed: int) -> list[Rows]:
        parts = [numbered(100, True), numbered(5, True, 100), numbered(195, True, 105)]
        return list(shuffle_rows(parts, seed, buckets=4, memory=memory, folder=tmp_path))

    first = run(0)
    assert sorted(ids(first)) == list(range(300))
    assert ids(first) == ids(run(0))
    assert ids(first) != ids(run(1))
    assert all(c.records["x"][:, 1].tolist() == c.records["id"].tolist() for c in first)
    assert all(s == [f"name {i}\n", "é"] for c in first for i, s in zip(c.records["id"], c.strings, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_memory_bounds_the_chunks_that_come_out() -> None:
    big = [len(c.records) for c in shuffle_rows([numbered(4000)], 0, buckets=4, memory=4000)]
    assert max(big) * numbered(1).records.itemsize <= 4000


def test_every_order_is_equally_likely() -> None:
    counts = dict.fromkeys(permutations(range(3)), 0)
    for seed in range(600):
        counts[tuple(ids(list(shuffle_rows([numbered(3)], seed, buckets=2))))] += 1
    expected = 600 / 6
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < 20.5  # 99.9 % quantile of chi^2 with 5 degrees of freedom is 20.5


def test_reblock_keeps_order_and_cuts_evenly() -> None:
    parts = [numbered(5, True), numbered(1, True, 5), numbered(17, True, 6), numbered(0, True)]
    blocks = list(reblock(parts, 4))
    assert [len(b.records) for b in blocks] == [4, 4, 4, 4, 4, 3]
    assert ids(blocks) == list(range(23))
    assert all(len(b.strings) == len(b.records) for b in blocks)
