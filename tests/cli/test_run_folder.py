from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from diffgap_lightning.cli.run_folder import RunLock, resolve_checkpoint


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A run's checkpoints, whose times say the opposite of their steps."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for age, (name, step) in enumerate({"other": 30, "best": 20, "last": 30, "first": 5}.items()):
        torch.save({"global_step": step, "x": torch.zeros(3)}, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (2e9 + age, 2e9 + age))
    return folder


def test_the_furthest_checkpoint_is_found_whatever_the_clock_says(checkpoints: Path) -> None:
    run = str(checkpoints.parent)
    assert resolve_checkpoint("auto", run, "fit") == str(checkpoints / "last.ckpt")
    (checkpoints / "last.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes()[:-300])
    with pytest.warns(UserWarning, match=r"last.ckpt: passed over, it cannot be read"):
        assert resolve_checkpoint("auto", run, "fit") == str(checkpoints / "other.ckpt")


def test_a_run_that_has_none_starts_anew_and_is_not_measured(tmp_path: Path) -> None:
    assert resolve_checkpoint("auto", str(tmp_path), "fit") is None
    assert resolve_checkpoint(None, str(tmp_path), "fit") is None
    with pytest.raises(FileNotFoundError, match="auto not found; train first"):
        resolve_checkpoint("auto", str(tmp_path), "test")


def test_a_lock_is_given_back_and_left_by_a_killed_process(tmp_path: Path) -> None:
    def taken() -> bool:
        """Whether another process is refused."""
        child = os.fork()
        if child == 0:
            try:
                with RunLock(tmp_path):
                    os._exit(0)  # without giving it back, as a killed process would
            except ValueError:
                os._exit(1)
        return os.waitpid(child, 0)[1] != 0

    with RunLock(tmp_path):
        assert taken()
    assert not taken()
    assert not taken()
