"""What validation collected: each row once, in order, the same on every rank. Also the program that the ranks run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffgap_lightning.training.gallery import Gallery

RANKS, TEXT, AUDIO = 2, 23, 9


def values(rows: Tensor, offset: int = 0) -> dict[str, Tensor]:
    """Two columns that tell the row."""
    return {"id": 100 * rows + offset, "feature": torch.stack([rows, rows + 0.5], dim=1).float()}


def test_rows_come_in_the_order_of_their_numbers_with_all_their_values() -> None:
    gallery = Gallery()
    for part in ([4, 1], [3], [0, 5, 2]):
        gallery.add("text", torch.tensor(part), values(torch.tensor(part)))
    found = gallery.complete()
    assert set(found) == {"text"}
    assert found["text"]["row"].tolist() == [0, 1, 2, 3, 4, 5]
    for name, column in values(torch.arange(6)).items():
        assert torch.equal(found["text"][name], column)
        assert found["text"][name].dtype == column.dtype


def test_a_repeated_row_keeps_its_first_values() -> None:
    gallery = Gallery()
    gallery.add("text", torch.tensor([2, 0, 2]), {"id": torch.tensor([7, 8, 9])})
    gallery.add("text", torch.tensor([0, 1]), {"id": torch.tensor([10, 11])})
    assert gallery.complete()["text"]["id"].tolist() == [8, 11, 7]


def test_modalities_are_kept_apart_and_may_be_missing_in_a_batch() -> None:
    gallery = Gallery()
    assert gallery.complete() == {}
    gallery.add("text", torch.tensor([1, 0]), values(torch.tensor([1, 0])))
    gallery.add("audio", torch.tensor([5]), {"other": torch.ones(1, 3)})
    found = gallery.complete()
    assert found["text"]["row"].tolist() == [0, 1]
    assert set(found["audio"]) == {"row", "other"}


def test_no_graph_is_kept() -> None:
    gallery = Gallery()
    gallery.add("text", torch.tensor([0]), {"feature": torch.ones(1, 2, requires_grad=True) * 2})
    assert not gallery.complete()["text"]["feature"].requires_grad


# Every case: for each rank its batches of row numbers, (text, audio).
CASES: dict[str, list[tuple[list[list[int]], list[list[int]]]]] = {
    "uneven": [
        ([[20, 3, 5], [1]], [[8]]),
        ([sorted(set(range(TEXT)) - {20, 3, 5, 1})], [list(range(8))]),
    ],
    "an empty rank": [([], []), ([list(range(TEXT))], [list(range(AUDIO))])],
    "a modality a rank": [([list(range(TEXT))], []), ([], [list(range(AUDIO))[::-1]])],
    "padded": [
        ([list(range(12)), [0, 1]], [list(range(5)), [4, 4]]),
        ([list(range(12, TEXT)), [0, 12]], [list(range(5, AUDIO)), [0]]),
    ],
}


def main(rank: int, folder: Path) -> None:
    """One rank: complete every case and keep what came out."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    results = {}
    for name, shares in CASES.items():
        gallery = Gallery()
        for modality, batches in zip(("text", "audio"), shares[rank], strict=True):
            for batch in batches:
                gallery.add(modality, torch.tensor(batch), values(torch.tensor(batch), offset=len(modality)))
        results[name] = gallery.complete()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_holds_the_same_whole_gallery(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(RANKS)]
    try:
        assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name in CASES:
        for found in (rank[name] for rank in results):
            assert set(found) == {"text", "audio"}, name
            for modality, count in (("text", TEXT), ("audio", AUDIO)):
                expected = {"row": torch.arange(count), **values(torch.arange(count), offset=len(modality))}
                assert set(found[modality]) == set(expected)
                assert all(torch.equal(found[modality][k], v) for k, v in expected.items()), (name, modality)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
