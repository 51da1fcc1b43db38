"""A picture of the validation rows before and after refinement, now and then in training.

It is written to `plots/` in the run's folder and shown to every logger that takes figures, as TensorBoard does. The
module offers its refiner as `pl_module.refiner`, the datamodule its rows as `rows("val", max_rows)`, the same on every
rank; so the first rank draws alone. What the refiner draws at random comes from a generator made here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from diffgap_lightning.plotting import SpaceView, space_figure


class EmbeddingMap(Callback):
    """Draws `plotting.space_figure` at the first validation and at those that come n epochs or more after a picture.

    Args:
        every_n_epochs: n. A validation outside of `fit` always draws.
        max_points: Use at most so many validation rows of each modality.
        folder: Where to write; by default `plots/` in the run's folder (`Trainer.default_root_dir`).
    """

    def __init__(self, every_n_epochs: int = 10, max_points: int = 1000, folder: str | None = None) -> None:
        if every_n_epochs < 1 or max_points < 2:
            raise ValueError(
                f"EmbeddingMap: got every_n_epochs={every_n_epochs}, max_points={max_points}; "
                "expected at least 1 and at least 2"
            )
        self.every_n_epochs, self.max_points, self.folder = every_n_epochs, max_points, folder
        self._last_epoch: int | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw once an epoch.

        Between the first and the last validation batch, averaged weights are in place whichever comes first in the
        trainer's list, this callback or the averaging one; at the start and the end of the epoch that is not so.
        """
        last, epoch = self._last_epoch, trainer.current_epoch
        due = trainer.state.fn != "fit" or last is None or epoch - last >= self.every_n_epochs
        if batch_idx or dataloader_idx or trainer.sanity_checking or not due or not trainer.is_global_zero:
            return
        self._last_epoch = epoch
        with torch.no_grad():
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: Any) -> None:
        table = trainer.datamodule.rows("val", max_rows=self.max_points)  # type: ignore[attr-defined]
        views = [
            SpaceView.of(pl_module.refiner, table.embeddings, table.ids, source, target, seed=0)
            for source, target in pl_module.refiner.directions
        ]
        figure = space_figure(views, title=f"validation rows, epoch {trainer.current_epoch}")
        folder = Path(self.folder or Path(trainer.default_root_dir) / "plots")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"epoch-{trainer.current_epoch:04d}.png")
        for logger in trainer.loggers:
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if callable(add_figure):
                add_figure("embedding_map", figure, global_step=trainer.global_step, close=False)
