"""A step in one call is Lightning's step: same losses, weights, schedule, clipping and checkpoints; and so compiled."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from diffgap_lightning.data.datamodules import SyntheticDataModule
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.training.callbacks import AverageWeights
from diffgap_lightning.training.module import DiffGAPModule
from diffgap_lightning.training.recorded import WholeStep, obstacle

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*WeightAveraging.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
    pytest.mark.filterwarnings("ignore:.*val_dataloader.*"),
]
STEPS = 50


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"])


class Gradients(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        pass


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings = {"accelerator": "cpu", "max_steps": STEPS, "max_epochs": -1, "gradient_clip_val": 0.05}
    return Trainer(
        **{**settings, **options}, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), num_sanity_val_steps=0,
        log_every_n_steps=7, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


def module(**options: Any) -> DiffGAPModule:
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 1, "dropout": 0.1, "rank": "full", "contrastive_weight": 0.1}
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=9, gamma=0.7)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return DiffGAPModule(**{**settings, "optimizer": optimizer, "lr_scheduler": schedule, **options})


def fit(folder: Path, resume: str | None = None, checkpoint: bool = False, **options: Any) -> dict[str, Any]:
    """Losses, weights and counters of 50 steps; without `drop_last`, another batch size ends every epoch."""
    world = SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24)
    ragged = not options.pop("drop_last", False)
    data = SyntheticDataModule(187, 0, 0, batch_size=30, world=world, drop_last=not ragged)
    on = {k: options.pop(k) for k in ("accelerator", "max_steps") if k in options}
    losses, saving = Losses(), ModelCheckpoint(folder, "last", every_n_train_steps=20, save_top_k=-1)
    made, watchers = module(**options), [losses, AverageWeights(0.8), *([saving] if checkpoint else [])]
    run = trainer(folder, *watchers, **on)
    run.fit(made, datamodule=data, ckpt_path=resume)
    state = {k: v.cpu() for k, v in made.state_dict().items()}
    figures = {k: v.cpu() for k, v in run.callback_metrics.items()}
    return {"losses": torch.stack(losses.values).cpu(), "state": state, "figures": figures, "step": run.global_step}


def check_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one["step"] == other["step"] == STEPS
    assert one["figures"].keys() == other["figures"].keys() >= {"train/loss", "train/denoising/text_to_audio"}
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["bst", "alternate"])
def test_a_step_in_one_call_is_lightnings_step(tmp_path: Path, split: str) -> None:
    whole, parts = (fit(tmp_path, capture=capture, split=split) for capture in ("dry", "off"))
    assert len(whole["losses"].unique()) == STEPS
    check_same(whole, parts, tolerance=0.0)


@pytest.mark.slow
def test_either_resumes_the_other(tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight", capture="off")
    for first, second in (("dry", "off"), ("off", "dry")):
        fit(tmp_path / first, capture=first, checkpoint=True, max_steps=20)
        rest = fit(tmp_path / first, str(tmp_path / first / "last.ckpt"), capture=second)
        assert len(rest["losses"]) == STEPS - 20
        del rest["losses"]
        check_same(rest, {k: v for k, v in straight.items() if k != "losses"}, tolerance=0.0)


@pytest.mark.slow
def test_a_compiled_loss_is_the_loss(tmp_path: Path) -> None:
    """Without dropout, whose random numbers a compiler draws in another order."""
    one = {"dropout": 0.0, "split": "forward", "drop_last": True}  # one graph to compile
    plain, compiled = (fit(tmp_path, compile=c, **one) for c in (False, True))
    assert not torch.equal(plain["losses"], compiled["losses"])  # that is, it was compiled
    check_same(plain, compiled, tolerance=1e-4)


def test_what_cannot_be_recorded_is_taken_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain, failing = (
        WholeStep(lambda batch, kind, w=w: {"loss": ((w - batch["x"]) ** 2).sum()}, torch.optim.AdamW([w], lr=0.1))
        for w in weights
    )
    failing._record = True  # as on a GPU, but for the streams that only a GPU has
    monkeypatch.setattr(failing, "_aside", failing._step)

    def refuse(batch: Any, kind: int) -> Any:
        failing._losses(batch, kind)["loss"].backward()  # a recording that is broken off leaves gradients behind
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(failing, "_capture", refuse)
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs: operation not permitted when stream is captur"):
        taken = [failing({"x": torch.full((3,), float(i))}, 0)["loss"] for i in range(6)]
    assert taken == [plain({"x": torch.full((3,), float(i))}, 0)["loss"] for i in range(6)]
    assert torch.equal(*weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("split", ["bst", "alternate", "joint"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_step_is_lightnings_step(tmp_path: Path, split: str, compiled: bool) -> None:
    options = {"accelerator": "gpu", "split": split, "dropout": 0.0 if compiled else 0.1}
    recorded = fit(tmp_path, capture="auto", compile=compiled, **options)
    check_same(recorded, fit(tmp_path, capture="off", **options), tolerance=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_run_resumes_from_and_on_a_cpu(tmp_path: Path) -> None:
    for first, second in (("gpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu")):
        folder = tmp_path / f"{first}-{second}"
        fit(folder, accelerator=first, checkpoint=True, max_steps=20)
        rest = fit(folder, str(folder / "last.ckpt"), accelerator=second)
        assert rest["step"] == STEPS
        assert rest["losses"].isfinite().all()


def test_what_needs_a_step_in_parts_is_named(tmp_path: Path) -> None:
    whole, made = trainer(tmp_path), module()
    whole.strategy.optimizers = [torch.optim.AdamW(made.parameters())]
    assert obstacle(whole, made) is None
    whole.strategy.optimizers = [torch.optim.SGD(made.parameters(), lr=0.1)]
    assert "SGD has no option `capturable`" in str(obstacle(whole, made))
    for options, reason in (({"accumulate_grad_batches": 2}, "accumulated"), ({"devices": 2}, "several processes")):
        assert reason in str(obstacle(trainer(tmp_path, **options), made))
    watched = trainer(tmp_path, Gradients())
    watched.strategy.optimizers = [torch.optim.AdamW(made.parameters())]
    assert "Gradients.on_before_optimizer_step" in str(obstacle(watched, made))


def test_a_fit_that_needs_a_step_in_parts_gets_it(tmp_path: Path) -> None:
    optimizer = partial(torch.optim.SGD, lr=1e-2)
    whole, parts = (fit(tmp_path, capture=c, optimizer=optimizer, max_steps=STEPS) for c in ("dry", "off"))
    check_same(whole, parts, tolerance=0.0)


def test_an_unknown_capture_is_refused() -> None:
    with pytest.raises(ValueError, match="capture: got 'on', expected 'auto'"):
        module(capture="on")
