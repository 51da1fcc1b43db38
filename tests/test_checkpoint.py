from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffgap_lightning.checkpoint import checkpoint_kind, load_folder, save_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(
        tmp_path / "model", "Thing", {"rank": 3, "name": "é"}, {"w": torch.randn(3, 4), "n": torch.arange(2)}
    )


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    w = torch.randn(5, 7)
    save_folder(tmp_path / "m", "Thing", {"a": [1, 2]}, {"w": w, "view": w[1:, ::2]})
    config, tensors = load_folder(tmp_path / "m", "Thing")
    assert config == {"a": [1, 2]}
    assert torch.equal(tensors["w"], w)
    assert torch.equal(tensors["view"], w[1:, ::2])
    assert checkpoint_kind(tmp_path / "m") == "Thing"


def test_saving_again_replaces_and_leaves_no_temporary_files(folder: Path) -> None:
    save_folder(folder, "Thing", {"rank": 4}, {"w": torch.zeros(1)})
    assert load_folder(folder, "Thing")[0] == {"rank": 4}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_failed_save_keeps_the_old_checkpoint(folder: Path) -> None:
    with pytest.raises(TypeError):
        save_folder(folder, "Thing", {"rank": object()}, {"w": torch.zeros(1)})
    assert load_folder(folder, "Thing")[0]["rank"] == 3
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds no config.json"):
        save_folder(tmp_path / "mine", "Thing", {}, {"w": torch.zeros(1)})
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_altered_tensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="altered or truncated"):
        load_folder(folder, "Thing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "schema_version 99, this version reads 1 to 1; upgrade"),
        ({"schema_version": "1; import os"}, "schema_version"),
        ({"kind": "Other"}, "holds a Other, expected a Thing"),
        ({"config": None}, "not a diffgap-lightning checkpoint"),
    ],
)
def test_altered_records_are_refused(folder: Path, change: dict, words: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        load_folder(folder, "Thing")


def test_truncated_json_and_missing_files_are_named(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        load_folder(folder, "Thing")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: not found"):
        load_folder(folder, "Thing")
