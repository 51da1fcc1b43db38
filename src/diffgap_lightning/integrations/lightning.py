"""Callbacks that put a refiner into another LightningModule: frozen, or trained together with it.

    Trainer(callbacks=[RefineConditioning("runs/refiner", method="get_learned_conditioning")])
    Trainer(callbacks=[FinetuneRefiner("runs/refiner", method="...", paired="audio_embedding")])

`RefineConditioning` attaches to a conditioning method (see `methods.py`) for the stages that are named, and detaches
after them, after an exception too. The refiner stays out of the module: its checkpoints and optimizers do not change.

`FinetuneRefiner` makes the refiner a part of the module for the run: its parameters are trained, checkpointed and
synchronised with the module's own. Gradients of the module's loss reach it through the one-step estimate (`strength=0`)
or through all sampler steps, and its own loss on the batch's pairs is added (see `joint.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from diffgap_lightning.bridges import load_bridge
from diffgap_lightning.checkpoint import checkpoint_kind
from diffgap_lightning.integrations.attach import Attachment, check_space
from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.joint import pair_loss, trained_parameters
from diffgap_lightning.integrations.methods import find
from diffgap_lightning.integrations.seam import override
from diffgap_lightning.refiner import DiffGAPRefiner

Stage = Literal["train", "validate", "test", "predict"]
_STAGES = ("train", "validate", "test", "predict")


class RefineConditioning(Callback):
    """Refine what a module's conditioning method returns, in the stages named.

    Args:
        refiner: A refiner, a bridge, or the folder of one.
        method: Path of the method from the module, e.g. `"get_learned_conditioning"` or `"model.encode"`.
        stages: `"train"`, `"validate"`, `"test"`, `"predict"`; sanity checking counts as validation.
        source: Modality of the module's embeddings.
        target: Modality that they are to look like.
        strength: As in `DiffGAPRefiner.refine`.
        num_samples: Samples whose normalised mean is used.
        guidance_scale: The refiner's own guidance.
        num_steps: The refiner's sampler steps.
        start: The refiner's start.
        per_frame: Refine each frame of a sequence as an embedding of its own.
        refine_input: Refine what the method is given instead of what it returns.
        encoder: Fingerprint of the module's contrastive encoder; a refiner of another's space is refused.
        seed: Of the refiner's noise; it is drawn anew for each training step, and the same in each validation.
    """

    def __init__(
        self,
        refiner: str | os.PathLike[str] | nn.Module,
        method: str = "get_learned_conditioning",
        stages: Sequence[Stage] = ("validate", "test", "predict"),
        source: str = "text",
        target: str = "audio",
        strength: float | None = None,
        num_samples: int = 1,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        start: Literal["posterior_mean", "source"] | None = None,
        per_frame: bool = False,
        refine_input: bool = False,
        encoder: str | None = None,
        seed: int = 0,
    ) -> None:
        wrong = [s for s in ([stages] if isinstance(stages, str) else stages) if s not in _STAGES]
        if wrong or not stages or isinstance(stages, str):
            raise ValueError(f"stages: got {stages!r}, expected a list of some of {', '.join(_STAGES)}")
        self.stages = tuple(stages)
        self.method, self.source, self.target, self.seed = method, source, target, seed
        self.refine_input, self.encoder = refine_input, encoder
        self.options: dict[str, Any] = {
            "strength": strength, "num_samples": num_samples, "guidance_scale": guidance_scale,
            "num_steps": num_steps, "start": start, "per_frame": per_frame,
        }  # fmt: skip
        self._given = refiner
        self._loaded: nn.Module | None = refiner if isinstance(refiner, nn.Module) else None
        self._attached: Attachment | None = None
        self._noise = torch.Generator()

    @property
    def refiner(self) -> Any:
        """The refiner; a folder is read at the first use."""
        if self._loaded is None:
            assert not isinstance(self._given, nn.Module)
            bridge = checkpoint_kind(self._given) != DiffGAPRefiner.__name__
            self._loaded = load_bridge(self._given) if bridge else DiffGAPRefiner.from_pretrained(self._given)
        return self._loaded

    def _conditioner(self, stage: str) -> Conditioner:
        return Conditioner(
            self.refiner, source=self.source, target=self.target, generator=self._noise, per_candidate=True,
            **self.options,
        )  # fmt: skip

    def _enter(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Attach or detach as this stage wants it."""
        self._leave()
        if stage not in self.stages:
            return
        if isinstance(self.refiner, nn.Module):
            self.refiner.to(module.device)
        self._noise.manual_seed(_mix(self.seed, trainer.global_rank))
        conditioner, seam = self._conditioner(stage), find(module, self.method, self.refine_input)
        check_space(conditioner, seam, self.encoder)
        self._attached = Attachment(conditioner, seam).attach()

    def _leave(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.detach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach for training."""
        self._enter(trainer, pl_module, "train")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Noise that depends on the step alone, so that a resumed run draws what it would have drawn."""
        self._noise.manual_seed(_mix(self.seed, trainer.global_rank, trainer.global_step, batch_idx))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach for validation, or detach what training had attached."""
        self._enter(trainer, pl_module, "validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to what training wants, or detach."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        self._enter(trainer, pl_module, "train" if training else "")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach for testing."""
        self._enter(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._leave()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach for prediction."""
        self._enter(trainer, pl_module, "predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, whatever happened."""
        self._leave()


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


def _mix(*numbers: int) -> int:
    """A seed of several numbers; close ones give unlike seeds."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed
