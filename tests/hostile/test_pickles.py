"""Pickles that would run code, wherever a stranger could put one: nothing runs, and the refusal names the file."""

from __future__ import annotations

import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.encoders.weights import read_weights
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.module import DiffGAPModule
from diffgap_lightning.training.restore import confine_files, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_canary_sings_when_it_is_really_unpickled(corpus: ModuleType, tmp_path: Path) -> None:
    for number, load in enumerate((pickle.loads, lambda data: np.load(_file(tmp_path, data), allow_pickle=True))):
        path = tmp_path / f"sung{number}"
        load((corpus.pickled, corpus.object_npy)[number](path))
        assert path.exists()


def _file(folder: Path, data: bytes) -> Path:
    (folder / "x.npy").write_bytes(data)
    return folder / "x.npy"


def payloads(corpus: ModuleType, canary: Path, folder: Path) -> dict[str, bytes]:
    """One payload in every wrapping."""
    plain, array = corpus.pickled(canary), corpus.object_npy(canary)
    saved = corpus.torch_file(folder / "evil.pt", {"state_dict": corpus.Canary(canary)}).read_bytes()
    old = corpus.torch_file(folder / "old.pt", corpus.Canary(canary), _use_new_zipfile_serialization=False)
    names = ("s0.audio.npy", "s0.audio.pyd", "s0.text.pickle", "s0.text.pth", "s0.audio.pt", "s0.text.npy")
    members = dict.fromkeys(names, plain) | {"s0.audio.npy": array, "s0.cbor": plain, "s0.json": plain, "s0.txt": plain}
    block = corpus.block_members() | {"000000.audio.npy": array, "000000.evil.pyd": plain}
    fields = {"audio.npy": array, "audio_id.npy": array, "text.npy": corpus.npy(np.eye(2)), "text_id.npy": plain}
    return {
        "pickle": plain,
        "object array": array,
        "torch.save": saved,
        "torch.save of old": old.read_bytes(),
        "classic tar": corpus.tar(corpus.classic_members() | members),
        "block": corpus.tar(block),
        "npz": corpus.npz(fields),
        "npz of pickles": corpus.npz({"audio.npy": plain, "data.pkl": plain}),
        "safetensors": corpus.safetensors(plain),
    }


@pytest.mark.parametrize("reader", ["shards", "table", "checkpoint"])
def test_no_reader_runs_any_payload(
    reader: str, corpus: ModuleType, fuzz: ModuleType, canary: Path, tmp_path: Path
) -> None:
    for data in payloads(corpus, canary, tmp_path).values():
        for kind in range(len(fuzz.READERS[reader])):
            fuzz.run_one(reader, bytes([kind]) + data)  # raises whatever is no refusal
            assert not canary.exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_weights_and_checkpoints_say_what_they_refuse(old: bool, corpus, canary, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": False} if old else {}
    path = corpus.torch_file(tmp_path / "evil.ckpt", {"state_dict": {}, "x": corpus.Canary(canary)}, **options)
    with pytest.raises(ValueError, match=r"evil.ckpt: holds more than tensors .* and would run code when loaded"):
        read_weights(path)
    for load in (read_checkpoint, DiffGAPModule.load_from_checkpoint):
        with pytest.raises(ValueError, match=r"evil.ckpt: holds more than tensors .* and is not read"):
            load(path)
    with pytest.raises(ValueError, match="weights_only: got False"):
        DiffGAPModule.load_from_checkpoint(path, weights_only=False)


def test_a_table_of_objects_is_refused(corpus, canary, tmp_path: Path) -> None:
    fields = {f"{name}.npy": corpus.npy(value) for name, value in corpus.table_fields().items()}
    (tmp_path / "x.npz").write_bytes(corpus.npz(fields | {"text_caption.npy": corpus.object_npy(canary)}))
    with pytest.raises(ValueError, match="text_caption: holds Python objects, which are never unpickled"):
        EmbeddingTable.read(tmp_path / "x.npz")


def test_a_refiner_s_folder_holds_no_other_file_that_is_read(corpus, canary, honest: Path, tmp_path: Path) -> None:
    """What other libraries look for beside the weights is passed over."""
    folder = shutil.copytree(honest / "refiner", tmp_path / "refiner")
    for name in ("pytorch_model.bin", "model.pt", "config.pkl", ".metadata"):
        (folder / name).write_bytes(corpus.pickled(canary))
    (folder / "modeling_refiner.py").write_text(f"open({str(canary)!r}, 'w')")
    assert isinstance(DiffGAPRefiner.from_pretrained(folder), DiffGAPRefiner)


def test_settings_and_class_paths_in_a_checkpoint_are_not_read(
    honest: Path, canary: Path, tmp_path, monkeypatch
) -> None:
    """Lightning's loader would import the class that a checkpoint's hyper-parameters name."""
    (tmp_path / "evil_optimizer.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = torch.load(honest / "x.ckpt", weights_only=True)
    content["hyper_parameters"] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "diffgap_lightning.training.module.DiffGAPModule",
        "optimizer": {"class_path": "evil_optimizer.Optimizer"},
        "width": 7,
        "refiner": str(tmp_path / "elsewhere"),
    }
    content["hparams"] = content["module_arguments"] = {"optimizer": "evil_optimizer.Optimizer", "seed": 7}
    torch.save(content, tmp_path / "x.ckpt")
    module = DiffGAPModule.load_from_checkpoint(tmp_path / "x.ckpt", seed=3)
    assert (module.seed, module.choices["width"], module.optimizer) == (3, 512, None)
    assert "evil_optimizer" not in sys.modules


def test_a_checkpoint_cannot_have_foreign_files_deleted(tmp_path: Path) -> None:
    """A `ModelCheckpoint` deletes the files that its state lists as worse; `..` would lead it out of its folder."""
    folder, victim = tmp_path / "checkpoints", tmp_path / "thesis.tex"
    folder.mkdir()
    victim.write_text("years of work")
    lying = f"{folder}/../thesis.tex"
    own = str(folder / "epoch=0.ckpt")
    state = {
        "dirpath": str(folder), "best_model_score": torch.tensor(0.1), "best_model_path": lying,
        "best_k_models": {lying: torch.tensor(0.1), own: torch.tensor(0.2), "/etc/x": torch.tensor(0.3), 5: 1.0},
        "kth_best_model_path": lying, "kth_value": torch.tensor(0.1), "last_model_path": "/etc/x",
    }  # fmt: skip
    checkpoint = {"callbacks": {"ModelCheckpoint": state, "EMA": {"n": 1}, "other": None}}
    confine_files(checkpoint)
    assert state["best_k_models"] == {own: torch.tensor(0.2)}
    assert (state["kth_best_model_path"], state["last_model_path"]) == ("", "")

    def removed(given: dict) -> bool:
        callback = ModelCheckpoint(dirpath=folder, monitor="x", save_top_k=1, mode="max")
        callback.load_state_dict(given)
        return callback._should_remove_checkpoint(Trainer(logger=False, accelerator="cpu"), lying, own)

    assert removed(state)  # Lightning's own guard takes `..` for a folder: the list must not name it
    for damaged in (None, [], {"ModelCheckpoint": {"best_k_models": None, "dirpath": 3}}):
        confine_files({"callbacks": damaged})


def test_a_compressed_checkpoint_is_refused_before_it_unpacks(honest: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(honest / "x.ckpt") as source, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as out:
        for info in source.infolist():
            out.writestr(info.filename, source.read(info) + bytes(1 << 16), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"x.ckpt: \d+ bytes claim to unpack to \d+; torch.save does not compress"):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="torch.save does not compress"):
        read_weights(tmp_path / "x.ckpt")


def test_a_directory_that_spans_disks_is_one_error(honest: Path, tmp_path: Path) -> None:
    """`zipfile.is_zipfile` raises where an archive says that it goes on elsewhere."""
    data = bytearray((honest / "zip.pt").read_bytes())
    at = data.rindex(b"PK\x06\x07")  # the locator of the 64-bit end record, which `torch.save` always writes
    data[at + 16 : at + 20] = b"\2\0\0\0"  # the number of disks
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match="x.pt: not a readable PyTorch file .*multiple disks"):
        read_weights(tmp_path / "x.pt")


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    for content in ([1], {"a": 1}, {"state_dict": 3}):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="no checkpoint: lacks a state_dict"):
            read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "y.ckpt")
