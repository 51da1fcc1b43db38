"""Two gloo ranks with two workers each, under a hard timeout: equal steps, exact validation, resuming after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("stream_ranks.py")
# Spawned workers import torch anew, which takes seconds each: `DIFFGAP_EXHAUSTIVE=1` gives them all shard counts too.
COUNTS = {"fork": range(1, 10), "spawn": range(1, 10) if os.environ.get("DIFFGAP_EXHAUSTIVE") else (1, 9)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(jobs: list[dict[str, Any]], folder: Path, world: int, timeout: float) -> list[int]:
    """Exit status of each rank; all of them are killed when the time is over."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(path)],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr.{r}").open("w"),
            start_new_session=True,
        )
        for r in range(world)
    ]
    try:
        return [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def read(out: Path, rank: int) -> dict[str, Any]:
    """What a rank wrote: steps, validation results, and how it ended."""
    lines = [json.loads(line) for line in out.with_suffix(f".{rank}.jsonl").read_text().splitlines()]
    steps = [line for line in lines if isinstance(line[0], int)]
    return {
        "steps": steps,
        "val": [line[1] for line in lines if line[0] == "val"],
        "end": [line[1] for line in lines if line[0] == "end"],
    }


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module, for the run that needs no second process."""
    spec = importlib.util.spec_from_file_location("stream_ranks", SCRIPT)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_ranks_end_together_with_the_metrics_of_one(shards: Callable, tmp_path: Path, script: Any) -> None:
    jobs = []
    for count in range(1, 10):
        train = shards(150, count=count, name=f"train{count}", block=7)
        val = shards(28, count=count, name=f"val{count}", kind="rows", captions=3, block=5)
        for context in ("fork", "spawn"):
            if count in COUNTS[context]:
                out = str(tmp_path / f"{context}{count}")
                jobs.append({"train": str(train), "val": str(val), "context": context, "out": out})
    script.run(jobs[0] | {"workers": 0, "out": str(tmp_path / "single")}, 0, 1)
    expected = read(tmp_path / "single", 0)["val"]
    assert 0 < expected[0]["text_to_audio/r1"] < 1
    status = launch(jobs, tmp_path, 2, 120 + 20 * len(jobs))
    assert status == [0, 0], (tmp_path / "stderr.0").read_text()
    for job in jobs:
        ranks = [read(Path(job["out"]), rank) for rank in range(2)]
        assert [r["end"] for r in ranks] == [[9], [9]], job
        assert [len(r["steps"]) for r in ranks] == [9, 9]
        seen = [i for r in ranks for _, _, ids in r["steps"] for i in ids]
        assert len(seen) == len(set(seen)) == 144
        assert [r["val"] for r in ranks] == [expected, expected], job


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_ids_on_both_ranks(shards: Callable, tmp_path: Path, runs: Any) -> None:
    def start(jobs: list[dict[str, Any]]) -> list[int]:
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        return runs(tmp_path / "log", str(tmp_path / "jobs.json"), call=[str(SCRIPT), "main"], world=2)

    train, val = shards(150, count=3, name="train", block=7), shards(10, name="val")
    job = {"train": str(train), "val": str(val), "context": "fork", "epochs": 2}
    whole = job | {"out": str(tmp_path / "whole")}
    killed = job | {"out": str(tmp_path / "killed"), "save_at": [1, 2], "die_at": [1, 5]}
    assert set(start([whole, killed])) == {-signal.SIGKILL}, runs.said(tmp_path / "log")
    resumed = job | {"out": str(tmp_path / "resumed"), "ckpt": str(tmp_path / "killed.ckpt")}
    assert start([resumed]) == [0, 0], runs.said(tmp_path / "log")
    for rank in range(2):
        uninterrupted = read(tmp_path / "whole", rank)["steps"]
        assert len(uninterrupted) == 18
        assert read(tmp_path / "killed", rank)["steps"] == uninterrupted[: 9 + 6]
        assert read(tmp_path / "resumed", rank)["steps"] == uninterrupted[9 + 3 :]
        assert read(tmp_path / "resumed", rank)["end"] == [18]
