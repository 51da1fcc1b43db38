"""The running average against Lightning's own, step by step, and across a checkpoint that either of them wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from diffgap_lightning.training.callbacks import AverageWeights

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


class Line(LightningModule):
    """A regression with a fixed buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("shift", torch.ones(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.layer(batch) - self.shift).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def fit(folder: Path, callback: WeightAveraging, steps: int, resume: str | None = None) -> Line:
    module = Line()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[callback, ModelCheckpoint(folder, "last", every_n_train_steps=6, enable_version_counter=False)],
    )  # fmt: skip
    rows = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=resume)
    return module


def test_it_is_lightnings_average(tmp_path: Path) -> None:
    for steps in (1, 2, 7):
        ours = fit(tmp_path, AverageWeights(0.8), steps)
        theirs = fit(tmp_path, EMAWeightAveraging(decay=0.8, use_buffers=False), steps)
        torch.testing.assert_close(ours.layer.weight, theirs.layer.weight)


@pytest.mark.parametrize("ours_first", [True, False])
def test_either_resumes_the_other(tmp_path: Path, ours_first: bool) -> None:
    both = [AverageWeights(0.8), EMAWeightAveraging(decay=0.8, use_buffers=False)]
    first, second = both if ours_first else both[::-1]
    fit(tmp_path, first, 6)
    resumed = fit(tmp_path, second, 12, str(tmp_path / "last.ckpt"))
    whole = fit(tmp_path, AverageWeights(0.8), 12)
    torch.testing.assert_close(resumed.layer.weight, whole.layer.weight)


def test_buffers_are_held_once(tmp_path: Path) -> None:
    callback = AverageWeights(0.8)
    module = fit(tmp_path, callback, 3)
    assert callback._average_model is not None
    assert callback._average_model.module.shift is module.shift
    assert torch.equal(module.shift, torch.ones(2))


def test_a_decay_outside_its_range_is_refused() -> None:
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay: got"):
            AverageWeights(decay)
