"""When the refiner of a run is written, and with which weights; a module of one number stands for the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffgap_lightning.training.callbacks import SaveRefiner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
]

NAN = float("nan")


class Refiner(nn.Module):
    """Its weight counts the steps it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weight").write_text(str(float((state or self.state_dict())["weight"])))


class Module(LightningModule):
    """Adds 1 to the weight in every step and reports figures that are given beforehand, one a validation."""

    def __init__(self, figures: list[float]) -> None:
        super().__init__()
        self.refiner, self.figures = Refiner(), iter(figures)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.refiner.weight

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            self.refiner.weight += (
                100  # stands for averaged weights that are swapped out again before the figure is known
            )
        if not self.trainer.sanity_checking:
            self.log("val/r1", next(self.figures))

    def on_validation_end(self) -> None:
        with torch.no_grad():
            self.refiner.weight -= 100

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder: Path, figures: list[float], *callbacks: Any, ckpt_path: str | None = None, **options: Any) -> Trainer:
    """One step an epoch, as many epochs as figures."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": len(figures), "default_root_dir": folder, "log_every_n_steps": 1}
    checkpoints = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(
        **{**quiet, **settings, "enable_checkpointing": checkpoints, **options}, callbacks=list(callbacks)
    )
    loader = DataLoader(torch.zeros(1))
    trainer.fit(Module(figures), loader, loader, ckpt_path=ckpt_path)
    return trainer


def saved(folder: Path) -> int | None:
    """Step whose weights lie in the folder."""
    path = folder / "weight"
    return round(float(path.read_text())) if path.exists() else None


@pytest.mark.parametrize(
    ("mode", "figures", "step"),
    [
        ("max", [0.1, 0.3, 0.2], 2),
        ("max", [0.3, 0.3, 0.3], 1),  # the first of equals
        ("min", [0.3, 0.1, 0.2], 2),
        ("max", [NAN, 0.1, NAN], 2),
        ("min", [0.2, NAN, 0.3], 1),
        ("max", [NAN, NAN], 2),  # never better: what training ended with
        ("max", [-0.5, -0.2], 2),
    ],
    ids=str,
)
def test_the_weights_of_the_best_validation_are_kept(tmp_path: Path, mode, figures, step) -> None:
    fit(tmp_path, figures, SaveRefiner(mode=mode))
    assert saved(tmp_path / "refiner") == step


def test_another_folder(tmp_path: Path) -> None:
    fit(tmp_path, [0.1], SaveRefiner(folder=str(tmp_path / "elsewhere")))
    assert saved(tmp_path / "elsewhere") == 1
    assert not (tmp_path / "refiner").exists()


def test_an_unknown_figure_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SaveRefiner: 'val/r2' was not logged, expected one of val/r1"):
        fit(tmp_path, [0.1], SaveRefiner(monitor="val/r2"))
    with pytest.raises(ValueError, match="mode: got 'best', expected 'max' or 'min'"):
        SaveRefiner(mode="best")


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    fit(tmp_path, [0.1, 0.2, 0.3], SaveRefiner(), limit_val_batches=0)
    assert saved(tmp_path / "refiner") == 3


def test_a_rehearsal_and_a_validation_of_its_own_write_nothing(tmp_path: Path) -> None:
    fit(tmp_path, [0.1], SaveRefiner(), fast_dev_run=1)
    assert saved(tmp_path / "refiner") is None
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[SaveRefiner()], default_root_dir=tmp_path
    )
    trainer.validate(Module([0.1]), DataLoader(torch.zeros(1)), verbose=False)
    assert saved(tmp_path / "refiner") is None


def test_a_resumed_run_remembers_its_best_where_that_lies(tmp_path: Path) -> None:
    fit(tmp_path, [0.5, 0.3], SaveRefiner(), ModelCheckpoint(tmp_path, "last"))
    last = str(tmp_path / "last.ckpt")
    assert torch.load(last, weights_only=True)["callbacks"]["SaveRefiner"] == {"best": 0.5}
    fit(tmp_path, [0.4, 0.4, 0.4], SaveRefiner(), ckpt_path=last)
    assert saved(tmp_path / "refiner") == 1  # still the best
    other = tmp_path / "other"
    fit(other, [0.4, 0.4, 0.4], SaveRefiner(), ckpt_path=last)
    assert saved(other / "refiner") == 3  # the first that was validated there
    fit(tmp_path, [0.6, 0.6, 0.6], SaveRefiner(), ckpt_path=last)
    assert saved(tmp_path / "refiner") == 3


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path: Path) -> None:
    fit(tmp_path, [0.5, 0.6], SaveRefiner())
    fit(tmp_path, [0.2], SaveRefiner())
    assert saved(tmp_path / "refiner") == 1
