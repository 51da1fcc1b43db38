"""Keeps the best refiner of a run as a folder that `DiffGAPRefiner.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


class SaveRefiner(Callback):
    """Write `module.refiner` whenever a validation figure improves.

    The weights are those that were validated: with an averaging callback (EMA) the averaged ones, which are in place
    while the validation batches run and gone again when the figure is known.

    Args:
        folder: Where to write; default `refiner/` in the run's folder (`trainer.default_root_dir`).
        monitor: Logged figure that decides.
        mode: Whether more (`"max"`) or less (`"min"`) of it is better.
    """

    def __init__(self, folder: str | None = None, monitor: str = "val/r1", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode: got {mode!r}, expected 'max' or 'min'")
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.best: float | None = None
        self._validated: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A best figure counts only where its refiner is: a run that goes on in another folder has none yet."""
        if not self.path(trainer).exists():
            self.best = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a copy of the weights that are being validated."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and batch_idx == 0 and dataloader_idx == 0 and not _rehearsal(trainer):
            refiner = pl_module.refiner
            assert isinstance(refiner, torch.nn.Module)
            self._validated = {k: v.detach().cpu().clone() for k, v in refiner.state_dict().items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the copy if the figure improved."""
        state, self._validated = self._validated, None
        if state is None:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"SaveRefiner: {self.monitor!r} was not logged, expected one of {known}")
        figure = float(value)
        better = self.best is None or (figure > self.best if self.mode == "max" else figure < self.best)
        if better and figure == figure:  # NaN is never better
            self.best = figure
            if trainer.is_global_zero:
                pl_module.refiner.save_pretrained(self.path(trainer), state)  # type: ignore[union-attr, operator]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without any validation, save what training ended with."""
        if _rehearsal(trainer):
            return
        if self.best is None and trainer.is_global_zero:
            pl_module.refiner.save_pretrained(self.path(trainer))  # type: ignore[union-attr, operator]
        best = "" if self.best is None else f" ({self.monitor} {self.best:.4f})"
        rank_zero_info(f"refiner: {self.path(trainer)}{best}")

    def path(self, trainer: Trainer) -> Path:
        """The folder that is written."""
        return Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "refiner"

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far, for resuming."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's best figure."""
        self.best = state_dict["best"]


def _rehearsal(trainer: Trainer) -> bool:
    """Whether this run is to leave no trace (`Trainer(fast_dev_run=...)`)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
