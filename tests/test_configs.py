"""Every YAML file that is shipped is parsed by the real command and runs, at a tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffgap_lightning.cli.main import main

pytestmark = pytest.mark.slow
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
OVERLAYS = sorted((Path(__file__).resolve().parents[1] / "configs" / "ablation").glob("*.yaml"))
SMALL = {"SyntheticDataModule": {"num_pairs": 300, "num_val": 50, "num_test": 50, "batch_size": 64}}


def contains(whole: Any, part: Any) -> bool:
    """Whether every value of `part` is in `whole`, at the same place."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return whole == part


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """80 clips with two captions each, as the file that a user would bring."""
    from diffgap_lightning import EmbeddingTable

    g = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(80, 96, generator=g), dim=1)
    text = audio.repeat_interleave(2, 0) + 0.05 * torch.randn(160, 96, generator=g) + 0.1
    rows = {"audio": audio, "text": torch.nn.functional.normalize(text, dim=1)}
    ids = torch.arange(80)
    EmbeddingTable(rows, {"audio": ids, "text": ids.repeat_interleave(2)}).write(tmp_path / "table.npz")
    return tmp_path / "table.npz"


def test_there_are_configs() -> None:
    assert {p.stem for p in CONFIGS} >= {"quickstart", "table"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_accepted_and_every_value_in_it_counts(path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert contains(yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_trains_at_a_tiny_size(path: Path, tmp_path: Path, table: Path) -> None:
    config = yaml.safe_load(path.read_text())
    name = config["data"]["class_path"].rpartition(".")[2]
    data = SMALL.get(name, {"path": str(table)})
    if name == "WebDatasetDataModule":
        main(["shards", "pack", str(table), str(tmp_path), "--val-fraction=0.2", "--test-fraction=0.2"])
        data = {split: str(tmp_path / split) for split in ("train", "val", "test")} | {"batch_size": 64}
    flags = [f"--data.{key}={value}" for key, value in data.items()]
    epochs = config["trainer"].get("check_val_every_n_epoch", 1)  # up to the first validation
    until = f"max_epochs={epochs}" if epochs else f"max_steps={config['trainer']['val_check_interval']}"
    trainer = [
        f"--trainer.{until}",
        f"--trainer.default_root_dir={tmp_path}/run",
        "--trainer.accelerator=cpu",
    ]
    main(["fit", "--config", str(path), *flags, *trainer, "--model.width=16", "--model.depth=1"])
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "refiner", "checkpoints", "plots", "lightning_logs"} <= names
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_an_ablation_changes_the_module_and_nothing_else(path: Path) -> None:
    from diffgap_lightning.refiner.config import RefinerConfig
    from diffgap_lightning.training.module import DiffGAPModule

    overlay = yaml.safe_load(path.read_text())
    assert set(overlay) == {"model"}
    assert f"configs/ablation/{path.name}" in path.read_text()
    module = DiffGAPModule(**overlay["model"])
    RefinerConfig((("text", "audio"),), {"text": 4, "audio": 4}, {"text": 2, "audio": 2}, **module.choices)


def test_an_ablation_lies_over_a_config(capsys) -> None:
    path = next(p for p in OVERLAYS if p.stem == "regression_joint")
    quickstart = next(p for p in CONFIGS if p.stem == "quickstart")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(quickstart), "--config", str(path), "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (model["objective"], model["split"], model["width"]) == ("regression", "joint", 256)
