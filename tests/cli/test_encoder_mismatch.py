"""A fingerprint goes from the encoder through shards into a refiner; wherever two meet that differ, both are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from diffgap_lightning.cli.main import main
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.webdataset_module import WebDatasetDataModule
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.integrations import attach
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.module import DiffGAPModule

FIRST, SECOND = (HashingEncoder(dim=12, seed=seed) for seed in (0, 1))
BOTH = rf"(?s)(?=.*{FIRST.fingerprint})(?=.*{SECOND.fingerprint})"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and tables of two encoders, and a run on the first."""
    folder = tmp_path_factory.mktemp("mismatch")
    for name, encoder in (("first", FIRST), ("second", SECOND)):
        texts = [f"sound number {i} of {i % 7}" for i in range(60)]
        rows, other = encoder.embed_text(texts), encoder.embed_text([f"{t} again" for t in texts])
        ids = torch.arange(60)
        table = EmbeddingTable({"text": rows, "audio": other}, {"text": ids, "audio": ids}, encoder=encoder.fingerprint)
        table.write(folder / f"{name}.npz")
        for kind in ("pairs", "rows"):
            write_embedding_shards(table, folder / name / kind, kind=kind)
    main(["fit", *data(folder, "first"), *options(folder), "--trainer.max_epochs", "1"])
    return folder


def data(folder: Path, name: str) -> list[str]:
    flags = ["--data", "diffgap_lightning.data.WebDatasetDataModule", "--data.num_workers", "0"]
    flags += ["--data.train", str(folder / name / "pairs"), "--data.batch_size", "20"]
    return [*flags, *(f"--data.{split}={folder / name / 'rows'}" for split in ("val", "test", "predict"))]


def options(folder: Path) -> list[str]:
    model = ["--model.pairs", "[[text, audio]]", "--model.width", "16", "--model.depth", "1", "--model.rank", "6"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    save = ["--trainer.callbacks", "diffgap_lightning.training.callbacks.SaveRefiner"]
    return [*model, *quiet, *save, "--trainer.default_root_dir", str(folder / "run")]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line that a command prints when it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert FIRST.fingerprint in error
    assert SECOND.fingerprint in error
    return error


def test_the_fingerprint_arrives(work: Path) -> None:
    assert open_shards(work / "first" / "pairs").manifest.encoder == FIRST.fingerprint
    refiner = DiffGAPRefiner.from_pretrained(work / "run" / "refiner", encoder=FIRST)
    assert refiner.config.encoder == FIRST.fingerprint
    refiner.check_encoder(None)


def test_loading_for_another_encoder_is_refused(work: Path) -> None:
    for other in (SECOND, SECOND.fingerprint):
        with pytest.raises(ValueError, match=BOTH):
            DiffGAPRefiner.from_pretrained(work / "run" / "refiner", encoder=other)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_is_not_used_on_another_encoders_rows(
    command: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = (work / "run" / "checkpoints").glob("*.ckpt")
    flags = [*options(work), "--ckpt_path", str(checkpoint)]
    refused(capsys, command, *data(work, "second"), *flags)


def test_a_refiner_is_not_trained_on_another_encoders_rows(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*options(tmp_path), "--model.refiner", str(work / "run" / "refiner")]
    error = refused(capsys, "fit", *data(work, "second"), *flags)
    assert "use that encoder or train a refiner for this one" in error
    assert not (tmp_path / "run" / "refiner").exists()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_refiner_is_not_used_on_another_encoders_rows(stage: str, work: Path) -> None:
    rows = str(work / "second" / "rows")
    module = DiffGAPModule(refiner=str(work / "run" / "refiner"))
    datamodule = WebDatasetDataModule(train=str(work / "second" / "pairs"), val=rows, test=rows, predict=rows)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(ValueError, match=BOTH):
        getattr(trainer, stage)(module, datamodule=datamodule)


def test_a_run_does_not_go_on_with_another_encoders_rows(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = (work / "run" / "checkpoints").glob("*.ckpt")
    refused(capsys, "fit", *data(work, "second"), *options(tmp_path), "--ckpt_path", str(checkpoint))


def test_splits_of_two_encoders_are_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [*data(work, "first"), "--data.val", str(work / "second" / "rows")]
    refused(capsys, "fit", *mixed, *options(tmp_path))
    shards = [str(work / name / "pairs") for name in ("first", "second")]
    with pytest.raises(ValueError, match=BOTH):
        open_shards(shards)


def test_compare_refuses_a_refiner_of_another_encoder(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "data:\n  class_path: diffgap_lightning.data.EmbeddingDataModule\n"
        f"  init_args: {{path: {work / 'second.npz'}, val_fraction: 0.2, test_fraction: 0.3}}\n"
    )
    refused(capsys, "compare", "--config", str(config), "--refiner", str(work / "run" / "refiner"))


@pytest.mark.parametrize("flag", ["encoder", "scorer"])
def test_generate_refuses_another_encoder_before_it_loads_the_generator(
    flag: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "v.mp4"
    video.write_bytes(b"looked at later")
    chosen = [f"--{flag}", "hashing", f"--{flag}.dim", "12", f"--{flag}.seed", "1"]
    inputs = [str(video)] if flag == "encoder" else ["rain"]
    models = ["--model", str(tmp_path / "none"), "--refiner", str(work / "run" / "refiner"), "--device", "cpu"]
    error = refused(capsys, "generate", *inputs, *models, *chosen)
    assert f"--{flag} hashing: {work / 'run' / 'refiner'}: was trained" in error


def test_a_refiner_between_two_encoders_spaces_takes_either(work: Path) -> None:
    refiner = DiffGAPRefiner.from_pretrained(work / "run" / "refiner")
    refiner.config = replace(refiner.config, encoder=f"{FIRST.fingerprint} + {SECOND.fingerprint}")
    for encoder in (FIRST, SECOND, refiner.config.encoder):
        refiner.check_encoder(encoder)
        attach(refiner, torch.nn.Flatten(), method="forward", encoder=encoder)
    with pytest.raises(ValueError, match=BOTH):
        refiner.check_encoder(HashingEncoder(dim=12, seed=2))
    with pytest.raises(ValueError, match=BOTH):
        attach(refiner, torch.nn.Flatten(), method="forward", encoder=HashingEncoder(dim=12, seed=2))


def test_rows_are_not_relabelled(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (work / "first.npz", work / "first" / "pairs"):
        refused(capsys, "shards", "pack", str(source), str(tmp_path / "out"), "--encoder", SECOND.fingerprint)
        assert not (tmp_path / "out").exists()


def test_a_refiner_without_a_fingerprint_takes_that_of_the_rows_it_is_trained_on(work: Path, tmp_path: Path) -> None:
    refiner = DiffGAPRefiner.from_pretrained(work / "run" / "refiner")
    refiner.config = replace(refiner.config, encoder=None)
    refiner.save_pretrained(tmp_path / "unknown")
    flags = [*options(tmp_path), "--model.refiner", str(tmp_path / "unknown"), "--trainer.max_epochs", "1"]
    main(["fit", *data(work, "second"), *flags])
    assert DiffGAPRefiner.from_pretrained(tmp_path / "run" / "refiner").config.encoder == SECOND.fingerprint
