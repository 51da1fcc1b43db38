"""Ctrl-C in the commands that read and write for long: one line, status 130, whole files, and what goes on goes on.

`fit` is in `test_trainer.py`, `generate` in `test_generate.py`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgap_lightning.cli.main import main
from diffgap_lightning.data import shard_verify
from diffgap_lightning.data.shard_writer import ShardWriter
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.embedding.merge import EmbedSummary
from diffgap_lightning.encoders.hashing import HashingEncoder

pytestmark = pytest.mark.filterwarnings("ignore")
Press = Callable[[Any, str, int], None]


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Press:
    """`press(owner, name, n)`: Ctrl-C arrives in the n-th call of `owner.name`."""

    def at(owner: Any, name: str, number: int) -> None:
        real, calls = getattr(owner, name), []

        def pressing(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, pressing)

    return at


def interrupted(capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 130
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1] == f"diffgap {arguments[0]}: interrupted"
    assert "Traceback" not in error


@pytest.mark.parametrize("workers", ["0", "1"])
def test_embed(workers: str, press: Press, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f"c{i},text {i}\n" for i in range(8)))
    command = ["embed", "--encoder", "hashing", "--catalog", str(tmp_path / "c.csv"), "--out", str(tmp_path / "out")]
    command += ["--part-size", "2", "--batch-size", "2", "--num-workers", workers, "--no-progress"]
    press(HashingEncoder, "embed_text", 3)
    interrupted(capsys, *command)
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert [name for name in left if name.endswith(".npz")] == ["part-0000000.npz", "part-0000001.npz"]
    assert not [name for name in left if name.startswith(".")]
    main(command)
    assert "going on: 2 of 4 parts are finished" in capsys.readouterr().err
    assert EmbedSummary.read(tmp_path / "out").embedded == 8


def test_shards(press: Press, tmp_path: Path, capsys: Any) -> None:
    rows = torch.nn.functional.normalize(torch.randn(60, 4), dim=1)
    ids = dict.fromkeys(("text", "audio"), torch.arange(60))
    EmbeddingTable(dict.fromkeys(ids, rows), ids).write(tmp_path / "t.npz")
    pack = ["shards", "pack", str(tmp_path / "t.npz"), str(tmp_path / "s"), "--rows-per-block", "10"]
    press(ShardWriter, "write", 3)
    interrupted(capsys, *pack)
    assert os.listdir(tmp_path) == ["t.npz"]
    main(pack)
    press(shard_verify, "open_binary", 1)
    interrupted(capsys, "shards", "verify", str(tmp_path / "s"))
    main(["shards", "verify", str(tmp_path / "s")])
    assert "all good" in capsys.readouterr().out
