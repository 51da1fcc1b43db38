"""`RefineConditioning`: a frozen refiner at a conditioning method of any LightningModule, for the stages named.

    Trainer(callbacks=[RefineConditioning("runs/refiner", method="get_learned_conditioning")])

It attaches (see `methods.py`) when a stage begins and detaches after it, after an exception too. The refiner stays out
of the module: its checkpoints and optimizers do not change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from diffgap_lightning.bridges import load_bridge
from diffgap_lightning.checkpoint import checkpoint_kind
from diffgap_lightning.integrations.attach import Attachment, check_space
from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.methods import find
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


def _mix(*numbers: int) -> int:
    """A seed of several numbers; close ones give unlike seeds."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed
