"""Replacing files and folders: killed at every system call, and on a disk that is full.

Each case runs in a forked process, which kills itself when the call of a given number is about to be made, or may not
write files beyond a given size.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgap_lightning import atomic
from diffgap_lightning.atomic import replace_folder, replacing
from diffgap_lightning.checkpoint import load_folder, save_folder
from diffgap_lightning.data.arrays import read_arrays, write_arrays
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.training.checkpoint_io import AtomicCheckpointIO

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym", "tempfile.mkstemp"}
ROWS = 300


def in_a_child(action: Callable[[], object]) -> int:
    """Run an action in a forked process; its status as `os.waitpid` gives it: 0 when it returned."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(number: int, action: Callable[[], object]) -> int:
    """The same, killed when the file system is about to be called for the given time."""
    calls = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in CALLS:
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.addaudithook(count)
        action()

    return in_a_child(run)


def table(value: int) -> EmbeddingTable:
    rows = torch.nn.functional.normalize(torch.full((ROWS, 4), float(value)) + torch.eye(4)[torch.arange(ROWS) % 4])
    ids = torch.arange(ROWS)
    return EmbeddingTable({"audio": rows, "text": rows}, {"audio": ids, "text": ids}, encoder=str(value))


def of_shards(path: Path) -> int:
    assert verify_shards(path) == []
    found = read_embedding_shards(path)
    assert len(found.ids["audio"]) == ROWS
    return int(found.encoder)


# How each kind of thing is written with a value, and what reads the value back and checks that all of it is there.
Case = tuple[str, Callable[[Path, int], object], Callable[[Path], int]]
CASES: dict[str, Case] = {
    "refiner folder": (
        "refiner",
        lambda path, v: save_folder(path, "Thing", {"value": v}, {"x": torch.full((ROWS,), float(v))}),
        lambda path: int(load_folder(path, "Thing")[0]["value"]),
    ),
    "checkpoint": (
        "last.ckpt",
        lambda path, v: AtomicCheckpointIO().save_checkpoint({"x": torch.full((ROWS,), v)}, path),
        lambda path: int(torch.load(path, weights_only=True)["x"][-1]),
    ),
    "table": (
        "table.npz",
        lambda path, v: write_arrays(path, {"x": np.full(ROWS, v)}),
        lambda path: int(read_arrays(path)["x"][-1]),
    ),
    "shards": ("shards", lambda path, v: write_embedding_shards(table(v), path, overwrite=True), of_shards),
}


@pytest.mark.parametrize(("name", "write", "read"), CASES.values(), ids=CASES)
def test_killed_at_every_call_it_leaves_the_old_or_the_new_one_whole(tmp_path: Path, name, write, read) -> None:
    path, seen = tmp_path / name, []
    write(path, 1)
    for number in range(1, 200):
        status = killed_at(number, lambda: write(path, 2))
        seen.append(read(path))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0
    assert len(seen) > 4
    assert seen == sorted(seen)  # once it is the new one, it stays
    write(path, 3)  # what killed processes left behind is in nobody's way
    assert read(path) == 3


@pytest.mark.parametrize(("name", "write", "read"), CASES.values(), ids=CASES)
def test_on_a_full_disk_the_old_one_stays_and_the_error_names_the_file(tmp_path: Path, name, write, read) -> None:
    path, told = tmp_path / name, tmp_path / "told"
    write(path, 1)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        try:
            write(path, 2)
        except OSError as error:
            told.write_text(str(error))

    assert in_a_child(fill) == 0
    assert "File too large" in told.read_text()
    assert name in told.read_text()
    assert read(path) == 1
    assert {p.name for p in tmp_path.iterdir()} == {name, "told"}  # and no half one


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_with_and_without_the_call_that_exchanges(tmp_path: Path, monkeypatch, at_once) -> None:
    if at_once and sys.platform == "linux":
        monkeypatch.setattr(Path, "rename", None)  # a rename would need two calls, and nothing between them
    if not at_once:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    for name in ("new", "old"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "deep" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as work:
            work.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"
