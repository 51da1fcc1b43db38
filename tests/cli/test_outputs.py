"""Places that cannot be written to: told in one sentence before a model or data are read, and in mid-run too."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffgap_lightning.atomic import check_replaceable, check_writable
from diffgap_lightning.cli.main import main
from diffgap_lightning.embedding.merge import EmbedSummary
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.callbacks import SaveLast

pytestmark = pytest.mark.filterwarnings("ignore")
Freeze = Callable[[Path, bool], None]


@pytest.fixture
def freeze(tmp_path: Path) -> Iterator[Freeze]:
    """`freeze(folder, True)` lets nothing new into it, `freeze(folder, False)` does again; skips where that cannot be.

    Permissions do not bind root, whose folders are made immutable instead, where the file system knows of that.
    """
    immutable: dict[Path, bool] = {}

    def change(folder: Path, on: bool) -> None:
        if on:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o555)
            immutable[folder] = os.access(folder, os.W_OK)  # permissions do not bind
        if immutable[folder]:
            subprocess.run(["chattr", "+i" if on else "-i", str(folder)], check=True, capture_output=True)
        if not on:
            folder.chmod(0o755)
            del immutable[folder]

    try:
        change(tmp_path / "probe", True)
        change(tmp_path / "probe", False)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"root writes everywhere here, and there are no immutable folders ({error})")
    yield change
    for folder in list(immutable):
        change(folder, False)


@pytest.fixture(params=["below a file", "below a dangling link", "read-only", "below read-only"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that cannot be made or written to."""
    if "read-only" in request.param:
        request.getfixturevalue("freeze")(tmp_path / "frozen", True)
        return tmp_path / "frozen" if request.param == "read-only" else tmp_path / "frozen" / "new" / "out"
    if request.param == "below a file":
        (tmp_path / "file").write_text("x")
    else:
        (tmp_path / "file").symlink_to(tmp_path / "nowhere")
    return tmp_path / "file" / "out"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The last line of a command that ends with status 2 and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


# Models and data that are not there: what is told first is what is looked at first.
COMMANDS = {
    "fit": "fit --config {config} --trainer.default_root_dir {place}",
    "embed": "embed --encoder laion-clap --encoder.checkpoint none --catalog none.csv --out {place}",
    "generate": "generate rain --model none --out {place}",
    "compare": "compare --config none.yaml --out {place}",
    "compare --json": "compare --config none.yaml --json {place}/x.json --out {good}",
    "evaluate": "evaluate {clips} --encoder laion-clap --encoder.checkpoint none --json {place}/x.json",
    "encoders": "encoders check --encoder laion-clap --encoder.checkpoint none --json {place}/x.json",
    "unpack": "shards unpack none {place}/x.npz",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_told_before_anything_is_read(
    command: str, place: Path, tmp_path: Path, tiny_config: Path, make_audio: Callable[..., Path], capsys: Any
) -> None:
    for number in range(2):
        make_audio(tmp_path / "clips" / f"{number}.wav", seconds=0.05)
    before = sorted(tmp_path.rglob("*"))
    good = {"config": tiny_config, "clips": tmp_path / "clips", "good": tmp_path / "good"}
    line = fails(capsys, *(word.format(place=place, **good) for word in COMMANDS[command].split()))
    assert f"{place}: cannot be written to (" in line
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_a_name_that_is_taken_by_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    common = ["--encoder", "laion-clap", "--encoder.checkpoint", "none"]
    line = fails(capsys, "embed", *common, "--catalog", "none.csv", "--out", tmp_path / "file")
    assert f"{tmp_path / 'file'}: is not a folder" in line
    line = fails(capsys, "encoders", "check", *common, "--json", tmp_path)
    assert f"{tmp_path}: is a folder, expected the name of a file" in line
    with pytest.raises(OSError, match="is where a file system is mounted"):
        check_replaceable("/proc", folder=True)
    check_replaceable(tmp_path / "new" / "x.json")
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]


def test_fit_whose_checkpoints_become_read_only(
    tiny_config: Path, tmp_path: Path, freeze: Freeze, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As on a full disk: one line, the older checkpoint intact, and the same command goes on."""
    run = tmp_path / "run"
    command = ["fit", "--config", str(tiny_config), f"--trainer.default_root_dir={run}", "--ckpt_path", "auto"]

    def hook(callback: SaveLast, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            freeze(run / "checkpoints", True)

    with monkeypatch.context() as patch:
        patch.setattr(SaveLast, "on_train_batch_start", hook)
        line = fails(capsys, *command)
    assert str(run / "checkpoints") in line
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    freeze(run / "checkpoints", False)
    main(command)
    assert (run / "refiner" / "config.json").is_file()


def test_embed_whose_parts_become_read_only(
    tmp_path: Path, freeze: Freeze, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f"c{i},text {i}\n" for i in range(8)))
    command = ["embed", "--encoder", "hashing", "--catalog", str(tmp_path / "c.csv"), "--out", str(tmp_path / "out")]
    command += ["--part-size", "2", "--batch-size", "2", "--num-workers", "0", "--no-progress"]
    embed_text, seen = HashingEncoder.embed_text, []

    def embed(encoder: HashingEncoder, texts: list[str]) -> Any:
        seen.append(texts)
        if len(seen) == 3:
            freeze(tmp_path / "out.parts", True)
        return embed_text(encoder, texts)

    with monkeypatch.context() as patch:
        patch.setattr(HashingEncoder, "embed_text", embed)
        assert str(tmp_path / "out.parts") in fails(capsys, *command)
    assert not (tmp_path / "out").exists()
    freeze(tmp_path / "out.parts", False)
    main(command)
    assert "going on: 2 of 4 parts are finished" in capsys.readouterr().err
    assert EmbedSummary.read(tmp_path / "out").embedded == 8


def test_generate_whose_folder_becomes_read_only(
    generator_folder: Path, sound_refiner: DiffGAPRefiner, tmp_path: Path, freeze: Freeze,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    sound_refiner.save_pretrained(tmp_path / "refiner")
    command = ["generate", "rain", "wind", "--model", str(generator_folder), "--refiner", str(tmp_path / "refiner")]
    command += ["--scorer", "hashing", "--scorer.dim", "32", "--steps", "1", "--batch-size", "1", "--device", "cpu"]
    command += ["--no-progress", "--out", str(tmp_path / "out")]
    embed_text = HashingEncoder.embed_text

    def embed(encoder: HashingEncoder, texts: list[str]) -> Any:
        if texts == ["wind"]:
            freeze(tmp_path / "out" / "records", True)
        return embed_text(encoder, texts)

    with monkeypatch.context() as patch:
        patch.setattr(HashingEncoder, "embed_text", embed)
        assert str(tmp_path / "out" / "records") in fails(capsys, *command)
    freeze(tmp_path / "out" / "records", False)
    assert len(os.listdir(tmp_path / "out" / "records")) == 1
    main(command)
    assert "going on: 1 of 2 are finished" in capsys.readouterr().err
    records = [json.loads(path.read_text())["text"] for path in (tmp_path / "out" / "records").iterdir()]
    assert sorted(records) == ["rain", "wind"]
