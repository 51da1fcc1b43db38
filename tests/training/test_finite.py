"""A step with a gradient that is not finite never was: weights, moments and counts of steps are as without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffgap_lightning.data.datamodules import SyntheticDataModule
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.training.finite import FiniteSteps, step_unless
from diffgap_lightning.training.module import DiffGAPModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*val_dataloader.*"),
]
NAN, INF = float("nan"), float("inf")
Optimizer = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=True),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def take(gradients: list[float], make: Optimizer, how: str) -> tuple[list[Tensor], dict[str, Any], FiniteSteps]:
    """Weights and optimizer state after steps with these gradients, each in one entry of two parameters."""
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.arange(2.0))]
    optimizer, finite = make(parameters), FiniteSteps(20)
    for gradient in gradients:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[1].grad[1] = gradient
        if how == "prevent":
            finite.prevent(optimizer)
            optimizer.step()
        else:
            step_unless(optimizer, finite.look(optimizer))
    return parameters, optimizer.state_dict()["state"], finite


@pytest.mark.parametrize("how", ["prevent", "without looking"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("gradients", [[1, NAN, 2], [1, INF, -INF, 2, NAN], [NAN, 1, 2]], ids=str)
def test_a_step_that_is_passed_over_leaves_no_trace(gradients: list[float], make: Optimizer, how: str) -> None:
    found, state, finite = take(gradients, make, how)
    expected, clean, _ = take([g for g in gradients if g in (1, 2)], make, how)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, clean, rtol=0, atol=0)
    with pytest.warns(UserWarning, match=f"step 9: {len(gradients) - 2} steps were passed over"):
        assert finite.tell(9) == len(gradients) - 2
    assert finite.tell(10) == len(gradients) - 2  # told once


def test_too_many_in_a_row_stop_the_run() -> None:
    optimizer, finite = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), FiniteSteps(2)
    for gradient in (NAN, NAN, 1.0, NAN, NAN):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([gradient])
        finite.look(optimizer)
    with pytest.warns(UserWarning, match="4 steps were passed over"):
        finite.tell(5)
    finite.look(optimizer)
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row; .*raise model.skip_non_finite"):
        finite.tell(6)
    with pytest.raises(ValueError, match="skip_non_finite: got -1"):
        FiniteSteps(-1)


class Weights(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]).clone())


def fit(folder: Path, bad: list[int], **options: Any) -> tuple[DiffGAPModule, list[Tensor], dict[str, Tensor]]:
    """A fit of 8 steps on plain batches, of which some have a NaN in one row."""
    world = SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24)
    data = SyntheticDataModule(90, 0, 0, batch_size=10, world=world)
    data.setup()
    batches = list(data.train_dataloader())
    for number in bad:
        batches[1 + number]["audio"][3, 5] = NAN
    torch.manual_seed(0)
    module = DiffGAPModule(width=16, depth=1, max_rows=1, **options)  # measured on the first batch alone
    weights = Weights()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, log_every_n_steps=1, gradient_clip_val=1.0,
        callbacks=[weights],
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module, weights.seen, dict(trainer.callback_metrics)


@pytest.mark.parametrize("options", [{"capture": "off"}, {"capture": "dry"}], ids=str)
def test_a_nan_in_a_batch_costs_that_step_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="1 steps were passed over, a gradient was not finite"):
        module, seen, figures = fit(tmp_path, bad=[3], **options)
    changed = [not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert changed == [number != 3 for number in range(8)]
    assert seen[-1].isfinite().all()
    assert figures["train/skipped_steps"] == 1
    assert module.refiner is not None
    assert not module.refiner.training


@pytest.mark.filterwarnings("ignore:.*passed over.*")
@pytest.mark.parametrize(("allowed", "words"), [(2, "not finite in 3 steps in a row"), (0, "not finite in 1 steps")])
def test_rows_that_stay_bad_stop_the_run(tmp_path: Path, allowed: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, bad=[3, 4, 5, 6, 7], skip_non_finite=allowed)
