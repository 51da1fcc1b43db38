"""`FinetuneRefiner`: the refiner as a trained part of the LightningModule that it conditions.

    Trainer(callbacks=[FinetuneRefiner("runs/refiner", method="...", paired="audio_embedding")])

For the run its parameters are trained, checkpointed and synchronised with the module's own. Gradients of the module's
loss reach it through the one-step estimate (`strength=0`) or through all sampler steps, and its own loss on the batch's
pairs is added (see `joint.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.joint import pair_loss, trained_parameters
from diffgap_lightning.integrations.lightning.refine_conditioning import RefineConditioning, Stage
from diffgap_lightning.integrations.seam import override
from diffgap_lightning.refiner import DiffGAPRefiner


class FinetuneRefiner(RefineConditioning):
    """Train the refiner as a part of the module that it conditions.

    Args:
        refiner: A `DiffGAPRefiner` or the folder of one.
        method: As in `RefineConditioning`.
        stages: As in `RefineConditioning`; `"train"` must be among them.
        source: As in `RefineConditioning`.
        target: As in `RefineConditioning`.
        paired: Where the batch's target embeddings `(B, D)` are: its key in the batch, or a method of the module that
            finds them in it. Without it the refiner's own loss is left out.
        loss_weight: Weight of the refiner's own loss.
        strength: 0 trains through the one-step estimate, more through the sampler's steps.
        num_steps: Sampler steps where `strength` is above 0.
        start: As in `RefineConditioning`.
        refine_input: As in `RefineConditioning`.
        encoder: As in `RefineConditioning`.
        seed: As in `RefineConditioning`.
        optimizer: Which of the module's optimizers gets the refiner's parameters, if `configure_optimizers` left them
            out: they join its first parameter group, with its learning rate and schedule.
        folder: Where to write the trained refiner when the fit ends; None writes none.
    """

    NAME = "diffgap_refiner"

    def __init__(
        self,
        refiner: str | os.PathLike[str] | DiffGAPRefiner,
        method: str = "get_learned_conditioning",
        stages: Sequence[Stage] = ("train", "validate", "test", "predict"),
        source: str = "text",
        target: str = "audio",
        paired: str | None = None,
        loss_weight: float = 1.0,
        strength: float = 0.0,
        num_steps: int | None = None,
        start: Literal["posterior_mean", "source"] = "posterior_mean",
        refine_input: bool = False,
        encoder: str | None = None,
        seed: int = 0,
        optimizer: int = 0,
        folder: str | None = None,
    ) -> None:
        super().__init__(
            refiner, method, stages, source, target, strength=strength, num_steps=num_steps, start=start,
            refine_input=refine_input, encoder=encoder, seed=seed,
        )  # fmt: skip
        if "train" not in self.stages:
            raise ValueError(
                f"stages: got {list(stages)}, expected 'train' among them; RefineConditioning does the rest"
            )
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight: got {loss_weight}, expected a number >= 0")
        self.paired, self.loss_weight, self.optimizer, self.folder = paired, loss_weight, optimizer, folder
        self._source_rows: list[tuple[Tensor, Sequence[int] | None]] = []  # of the present step
        self._own = ExitStack()

    @property
    def _with_pairs(self) -> bool:
        return self.paired is not None and self.loss_weight > 0

    def _conditioner(self, stage: str) -> Conditioner:
        options = dict(self.options, generator=self._noise, per_candidate=True, differentiable=stage == "train")
        conditioner = Conditioner(self.refiner, source=self.source, target=self.target, **options)
        if stage == "train":
            conditioner.observe = lambda rows, selected: self._source_rows.append((rows, selected))
        return conditioner

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the refiner a part of the module, before its checkpoint is read and its optimizers are built."""
        refiner = self.refiner
        if not isinstance(refiner, DiffGAPRefiner):
            raise TypeError(f"refiner: got {type(refiner).__name__}, expected a DiffGAPRefiner: it is to be trained")
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__}: optimizes by hand, so no loss can be added; use joint.pair_loss and "
                "refiner.refine_with_grad in its training_step"
            )
        self.teardown(trainer, pl_module, stage)  # of a run that was cut off
        trained = {id(p) for p in trained_parameters(refiner, self.source, self.target, self._with_pairs)}
        for parameter in refiner.parameters():
            self._own.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in trained)
        refiner.train(stage == "fit")  # Lightning keeps the mode that it finds
        pl_module.add_module(self.NAME, refiner)
        self._own.callback(pl_module._modules.pop, self.NAME)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was; `refiner` is the trained one."""
        self._own.close()
        self.refiner.eval()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the refiner's parameters into an optimizer that has not got them."""
        known = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        missing = [p for p in self.refiner.parameters() if p.requires_grad and id(p) not in known]
        if missing:
            if not 0 <= self.optimizer < len(trainer.optimizers):
                raise ValueError(f"optimizer: got {self.optimizer}, but the module has {len(trainer.optimizers)}")
            trainer.optimizers[self.optimizer].param_groups[0]["params"].extend(missing)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and add the refiner's loss to what the module's training step returns."""
        super().on_train_start(trainer, pl_module)
        plain = pl_module.training_step

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._source_rows.clear()
            out = plain(batch, *args, **kwargs)
            loss: Any = out["loss"] if isinstance(out, dict) else out
            if loss is None:
                return None
            loss = loss + self._added(pl_module, batch)
            return {**out, "loss": loss} if isinstance(out, dict) else loss

        self._own.enter_context(override(pl_module, "training_step", training_step, mark=False))

    def _added(self, module: LightningModule, batch: Any) -> Tensor:
        """The weighted loss on the batch's pairs; and a zero of all parameters, for which DDP would wait."""
        zero = torch.stack([p.sum() for p in self.refiner.parameters() if p.requires_grad]).sum() * 0.0
        if not self._with_pairs:
            return zero
        if not self._source_rows:
            raise ValueError(f"paired: the training step did not call {self.method}, so there is nothing to pair up")
        (rows, selected), targets = self._source_rows[0], self._targets(module, batch)
        targets = targets if selected is None else targets[list(selected)]
        loss = pair_loss(
            self.refiner, rows.view(len(rows), -1), targets, source=self.source, target=self.target,
            generator=self._noise,
        )  # fmt: skip
        module.log("train/refiner_loss", loss.detach(), batch_size=1)
        return zero + self.loss_weight * loss

    def _targets(self, module: LightningModule, batch: Any) -> Tensor:
        assert self.paired is not None
        if isinstance(batch, dict) and self.paired in batch:
            return batch[self.paired]
        method = getattr(module, self.paired, None)
        if not callable(method):
            keys = (
                f"the batch's keys ({', '.join(map(str, batch))})" if isinstance(batch, dict) else "keys of the batch"
            )
            raise ValueError(f"paired: got {self.paired!r}, expected one of {keys} or a method of the module")
        with torch.no_grad():
            return method(batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the refiner."""
        if self.folder is not None and trainer.is_global_zero:
            self.refiner.save_pretrained(self.folder)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach and leave the module as it was."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")
