"""The checkpoint folder: bit-equal, strict about what fits, and never executed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffgap_lightning.refiner import DiffGAPRefiner

TA = {"source": "text", "target": "audio"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(rows, own, tmp_path: Path) -> Path:
    own.calibrate(*rows(n=40, seed=2))  # weights that no decimal writes exactly
    own.config = replace(own.config, encoder="encoder-1")
    return own.save_pretrained(tmp_path / "refiner")


def rewrite(folder: Path, **changes: object) -> None:
    """Change the record, or, under "config", the configuration, and keep the record's digest true."""
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["config"].update(changes.pop("config", {}))
    record["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps(record | changes))


def test_a_refiner_comes_back_bit_equal(rows, own, folder: Path) -> None:
    before = torch.get_rng_state()
    loaded = DiffGAPRefiner.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == own.config
    assert not loaded.training
    state = loaded.state_dict()
    assert set(state) == set(own.state_dict())
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in own.state_dict().items())
    x = rows(n=9, seed=1)[0]
    for options in ({}, {"strength": 0.7, "num_samples": 2, "guidance_scale": 1.5, "sampler": "ddpm"}):
        pair = [r.refine(x["text"], **TA, **options, generator=generator()) for r in (own, loaded)]
        assert torch.equal(*pair)
    assert torch.equal(own.score(x["text"], x["audio"], **TA), loaded.score(x["text"], x["audio"], **TA))


def test_other_tensors_may_be_saved_in_place_of_the_present_ones(excite, own, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in own.state_dict().items()}
    excite(own, seed=9)
    loaded = DiffGAPRefiner.from_pretrained(own.save_pretrained(tmp_path / "averaged", state))
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


def test_another_encoder_is_refused(folder: Path) -> None:
    assert DiffGAPRefiner.from_pretrained(folder, encoder="encoder-1").config.encoder == "encoder-1"
    with pytest.raises(ValueError, match="in the space of encoder 'encoder-1', got 'encoder-2'; use that encoder"):
        DiffGAPRefiner.from_pretrained(folder, encoder="encoder-2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema_version 2, this version reads 1 to 1; upgrade"),
        ({"kind": "RidgeBridge"}, "holds a RidgeBridge, expected a DiffGAPRefiner"),
        (
            {"config": {"width": 24}},
            r"the tensors do not fit the configuration .*no_condition: \[20\], expected \[30\]",
        ),
        ({"config": {"width": 10**6}}, "the tensors do not fit the configuration"),  # 4 TB a layer
        (
            {"config": {"dims": {"text": 10**9, "audio": 16}}},
            "the tensors do not fit the configuration .space.text_mean",
        ),
        ({"config": {"dims": {"text": 10**30, "audio": 16}}}, "dims text: got 10*, expected a whole number from 1"),
        ({"config": {"depth": 2}}, "the tensors do not fit the configuration .*blocks.1.modulation.weight: missing"),
        ({"config": {"depth": 10**9}}, "the tensors do not fit the configuration .depth 1000000000 of"),
        ({"config": {"num_steps": 10**12}}, "num_steps: got 1000000000000, expected a whole number from 1 to 10000"),
        ({"config": {"typical": {"audio": [1.0, 0.0, 1.0]}}}, "typical audio: got .*expected three positive numbers"),
        ({"config": {"restore": [1.0]}}, r"restore: got \[1.0\], expected names and their values"),
        ({"config": {"encoder": {"a": 1}}}, "encoder: got .*expected a fingerprint, or null"),
        ({"config": {"ranks": {"audio": 16}}}, r"ranks: got those of \['audio'\], expected of \['audio', 'text'\]"),
        ({"config": {"ranks": {"text": 17, "audio": 16}}}, "ranks: got 17 for text, expected at most its dimension"),
        ({"config": {"width": "__import__('os').system('false')"}}, 'width: got "__import__'),
        ({"config": {"start": "posterior"}}, "start: got 'posterior'"),
        ({"config": {"prediction": "x1"}}, "prediction: got 'x1'"),
        ({"config": {"pairs": [["text", "video"]]}}, "pairs: got"),
        (
            {"config": {"bridges": {}}},
            "fusion text->audio: got .*expected a positive weight and only",
        ),
        ({"config": {"bridges": {"os.system": {}}}}, "do not know os.system"),
        ({"config": {"restore": {"audio->text": 1.0}}}, "restore, fusion or bridges lack or do not know text->audio"),
        ({"config": {"fusion": {}}}, "restore, fusion or bridges lack or do not know text->audio"),
        ({"config": {"later": 1}}, "the configuration does not fit this version .*'later'"),
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_refused_in_one_line(folder: Path, changes, words) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=words) as error:
        DiffGAPRefiner.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_missing_field_is_refused(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    del record["config"]["dims"]
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not fit this version .*'dims'"):
        DiffGAPRefiner.from_pretrained(folder)


def test_altered_and_truncated_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="the file was altered or truncated"):
            DiffGAPRefiner.from_pretrained(folder)
    tensors = load_file(_restored(path, whole))
    tensors.pop("space.text_mean")
    save_file(tensors, path)
    rewrite(folder)
    with pytest.raises(ValueError, match="the tensors do not fit the configuration .*space.text_mean"):
        DiffGAPRefiner.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="expected a folder written by save_pretrained"):
        DiffGAPRefiner.from_pretrained(folder)


def _restored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Canary:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_loading_executes_nothing(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    rewrite(folder, config={"encoder": f"__import__('pathlib').Path({str(canary)!r}).touch()"})
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        DiffGAPRefiner.from_pretrained(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it would have shown
