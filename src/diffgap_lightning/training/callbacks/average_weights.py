"""`AverageWeights`: an exponential moving average of the weights, at the cost of one pass over them.

    mean <- decay * mean + (1 - decay) * weights        after every step, starting at the weights of the first one

Validation, checkpoints and the refiner use the mean. Lightning's `EMAWeightAveraging` does the same, parameter by
parameter, and copies all buffers at every step; a refiner's buffers are its measured space and closed forms, larger
than its networks and fixed. Here all parameters are averaged in one call and the buffers are shared.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AverageWeights(WeightAveraging):
    """Average the weights over the steps, exponentially.

    Its checkpoints are those of Lightning's `EMAWeightAveraging`, and either resumes from them.

    Args:
        decay: Share of the old mean that is kept at every step, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected a number from 0 (no averaging) to below 1")
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._follow = get_ema_multi_avg_fn(decay)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the mean where the weights are; what does not change need not be held, or copied, twice."""
        average = self._average_model
        assert average is not None
        average.to(pl_module.device)
        # Only now are both on their device and, in a resumed run, loaded.
        for ours, theirs in zip(average.module.modules(), pl_module.modules(), strict=True):
            for name, buffer in theirs._buffers.items():
                ours._buffers[name] = buffer
        started = bool(average.n_averaged > 0)  # read once: at every step it would make a GPU wait
        self._pairs = self._parameters(pl_module) if started else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Move the mean towards the weights, once an optimizer step."""
        if trainer.global_step <= self._latest_update_step:
            return
        average = self._average_model
        assert average is not None
        if self._pairs is None:
            average.update_parameters(pl_module)  # the first mean is the weights themselves
            self._pairs = self._parameters(pl_module)
        else:
            self._follow(*self._pairs, average.n_averaged)
            average.n_averaged.add_(1)
        self._latest_update_step = trainer.global_step

    def _parameters(self, pl_module: LightningModule) -> tuple[list[Tensor], list[Tensor]]:
        """The mean's tensors and the weights', which are only ever changed in place."""
        assert self._average_model is not None
        mean, weights = self._average_model.module.parameters(), pl_module.parameters()
        pairs = [(m.detach(), w.detach()) for m, w in zip(mean, weights, strict=True) if torch.is_floating_point(m)]
        return [m for m, _ in pairs], [w for _, w in pairs]
