"""Runs of `diffgap fit` that are told to stop, killed, or lose their disk or data, and go on with the same command.

Everything is compared with one uninterrupted run: the rows of each step, its loss, the figures of each validation, and
at the end weights, averages and optimizer state. The folder's name is hostile, the locale is C, the time zone another.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffgap_lightning.cli.run_folder import RunLock
from diffgap_lightning.data.datamodules import SyntheticDataModule
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.refiner import DiffGAPRefiner

pytestmark = pytest.mark.slow

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  val_check_interval: 3
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: diffgap_lightning.training.callbacks.AverageWeights
      init_args: { decay: 0.8 }
    - class_path: runs.Probe
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: { filename: best, monitor: val/r1, mode: max, enable_version_counter: false }
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: { filename: last, enable_version_counter: false }
    - class_path: diffgap_lightning.training.callbacks.SaveRefiner
    - class_path: diffgap_lightning.training.callbacks.SaveLast
      init_args: { every_n_steps: 2 }
model: { width: 16, depth: 1, dropout: 0.1, rank: full, num_steps: 2 }
data:
  class_path: diffgap_lightning.data.WebDatasetDataModule
  init_args: { batch_size: 10, num_workers: 0, shuffle_buffer: 10 }
"""
WORLD = SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24)
STEPS = 6  # an epoch


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Shards and a configuration in a folder whose name no shell likes."""
    folder = tmp_path_factory.mktemp("hostile") / "Übung 実験 $(touch x);'&"
    folder.mkdir()
    data = SyntheticDataModule(num_pairs=60, num_val=25, num_test=0, world=WORLD)
    data.setup()
    for name, kind in (("train", "pairs"), ("val", "rows")):
        write_embedding_shards(data.rows(name), folder / name, kind=kind, rows_per_block=10, rows_per_shard=30)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return SimpleNamespace(folder=folder, data=[f"--data.{name}={folder / name}" for name in ("train", "val")])


@pytest.fixture(scope="module")
def fit(runs: Any, home: SimpleNamespace) -> Callable[..., list[int]]:
    """`fit(log, probe=..., **job)`: the same command, whatever happened before."""

    def start(log: Path, *flags: str, **job: Any) -> list[int]:
        here = [f"--config={home.folder / 'config.yaml'}", f"--trainer.default_root_dir={log.parent}"]
        return runs(log, "fit", *here, *home.data, "--ckpt_path=auto", *flags, **job)

    return start


@pytest.fixture(scope="module")
def whole(fit: Callable, runs: Any, home: SimpleNamespace) -> SimpleNamespace:
    """The uninterrupted run."""
    log = home.folder / "whole" / "log"
    log.parent.mkdir()
    assert fit(log) == [0], runs.said(log)
    seen = runs.seen(log)
    assert [line[1:3] for line in seen if line[0] == "step"] == [[e, i] for e in range(2) for i in range(STEPS)]
    assert [seen.index(line) for line in seen if line[0] == "val"] == [3, 7, 11, 15]
    return SimpleNamespace(seen=seen, folder=log.parent)


def same_state(a: Any, b: Any, where: str = "") -> None:
    """Every number of two checkpoints is the same; what names a folder or a time may differ."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("loops", "callbacks", "hparams_name"):
                same_state(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_state(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def same_run(folder: Path, whole: SimpleNamespace) -> None:
    """What a run left is what the uninterrupted one left."""
    for name in ("last", "best"):
        a, b = (torch.load(f / "checkpoints" / f"{name}.ckpt", weights_only=True) for f in (folder, whole.folder))
        same_state(a, b, name)
    a, b = (DiffGAPRefiner.from_pretrained(f / "refiner") for f in (folder, whole.folder))
    assert a.config == b.config
    same_state(dict(a.state_dict()), dict(b.state_dict()))
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt"}


def test_told_to_stop_anywhere_it_loses_nothing_and_goes_on_exactly(
    fit: Callable, runs: Any, home: SimpleNamespace, whole: SimpleNamespace
) -> None:
    folder = home.folder / "told"
    folder.mkdir()
    fake = home.folder / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s " "$@" > "$HERE/asked"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "4711", "PATH": f"{fake.parent}:{os.environ['PATH']}", "HERE": str(home.folder)}
    stops = [
        (["SIGTERM", "train", 0, 1], 143, {}),  # between two steps
        (["SIGTERM", "train", 0, 2], 143, {}),  # a validation in mid-epoch is due
        (["SIGUSR1", "val", 0, 0], 138, slurm),  # a validation at the end of an epoch is under way
        (["SIGTERM", "train", 1, 5], 143, {}),  # the last step of all
    ]
    seen: list[Any] = []
    for number, (probe, status, env) in enumerate(stops):
        log = folder / f"log{number}"
        assert fit(log, probe=probe, env=env) == [status], runs.said(log)
        assert "Traceback" not in runs.said(log)
        assert f"stopped by {probe[0]}" in runs.said(log)
        seen += runs.seen(log)
    assert fit(folder / "end") == [0], runs.said(folder / "end")
    assert seen + runs.seen(folder / "end") == whole.seen
    assert "job 4711 is requeued" in runs.said(folder / "log2")
    assert (home.folder / "asked").read_text() == "requeue 4711 "
    same_run(folder, whole)


def test_killed_at_any_point_or_out_of_disk_it_goes_on_from_its_last_checkpoint(
    fit: Callable, runs: Any, home: SimpleNamespace, whole: SimpleNamespace
) -> None:
    folder = home.folder / "killed"
    folder.mkdir()
    # last.ckpt is written after steps 2, 3 (it waits for the validation), 5, 6 ...
    faults = [  # what happens, the status, and after how many lines of the whole log it goes on
        (["SIGKILL", "train", 0, 1], -9, 0),  # before the first checkpoint: from the start
        (["SIGKILL", "val", 0, 1], -9, 2),  # in a validation
        (["SIGKILL", "save", 2, "last.ckpt"], -9, 4),  # while it replaces the checkpoint of step 3 by that of step 5
        (["disk", "train", 0, 3], 2, 4),  # the checkpoint of step 5 does not fit
        (["SIGKILL", "save", 2, "last.ckpt"], -9, 6),
    ]
    at = 0
    for number, (probe, status, then) in enumerate(faults):
        log = folder / f"log{number}"
        assert fit(log, probe=probe) == [status], runs.said(log)
        seen = runs.seen(log)
        assert seen == whole.seen[at : at + len(seen)], probe
        if status == 2:
            assert "checkpoints/last.ckpt" in runs.said(log).splitlines()[-1]
            assert "File too large" in runs.said(log)
            assert "Traceback" not in runs.said(log)
        at = then
        for path in (folder / "checkpoints").glob("*.ckpt"):
            assert zipfile.is_zipfile(path)
    assert fit(folder / "end") == [0], runs.said(folder / "end")
    seen = runs.seen(folder / "end")
    assert seen == whole.seen[len(whole.seen) - len(seen) :]
    same_run(folder, whole)


def test_data_that_vanish_in_mid_run_are_one_line_and_the_run_goes_on_when_they_are_back(
    fit: Callable, runs: Any, home: SimpleNamespace, whole: SimpleNamespace
) -> None:
    folder = home.folder / "vanished"
    shutil.copytree(home.folder / "train", folder / "train")
    shutil.copytree(home.folder / "train", folder / "backup")
    flag = f"--data.train={folder / 'train'}"
    assert fit(folder / "log", flag, probe=[f"remove:{folder / 'train'}", "train", 0, 1]) == [2]
    *_, line = runs.said(folder / "log").strip().splitlines()
    assert line.startswith("diffgap fit: error: ")
    assert "the file is missing" in line
    (folder / "backup").rename(folder / "train")
    assert fit(folder / "end", flag) == [0]
    seen = runs.seen(folder / "end")
    assert seen == whole.seen[-len(seen) :]
    assert len(seen) == len(whole.seen) - 2


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(
    fit: Callable, runs: Any, home: SimpleNamespace
) -> None:
    folder = home.folder / "taken"
    with RunLock(folder):
        assert fit(folder / "log") == [2]
    *_, line = runs.said(folder / "log").strip().splitlines()
    assert f"process {os.getpid()} on " in line
    assert "is training in" in line
    assert not (folder / "checkpoints").exists()


def test_a_measurement_that_is_told_to_stop_does_not_end_as_if_it_were_done(
    runs: Any, home: SimpleNamespace, whole: SimpleNamespace
) -> None:
    log = home.folder / "measured"
    here = [f"--config={whole.folder / 'config.yaml'}", "--data.batch_size=10"]
    assert runs(log, "validate", *here, probe=["SIGTERM", "val", None, 0]) == [143], runs.said(log)


def test_the_hostile_folder_was_a_name_and_nothing_else(home: SimpleNamespace) -> None:
    assert not list(Path.cwd().glob("x"))
    assert json.dumps(home.folder.name).isascii()
