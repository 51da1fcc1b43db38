"""`DiffGAPModule`: trains a refiner's denoisers with Lightning; the refiner itself is `module.refiner`.

The closed-form half of the refiner (space, Gaussian denoisers, bridges) is measured from the training rows when the fit
starts (see `owner.py`). Training then improves the networks, each batch split between the directions (BST), on any
number of ranks as on one. Validation ranks the full gallery (see `evaluated.py`); the best refiner is what
`callbacks.SaveRefiner` writes.

A batch is `{modality: (B, D), "<modality>_id": (B,)}`; in evaluation also `"<modality>_row"`. Sequences `(B, T, D)`
train a refiner of sequences. Anything that yields such batches can train a refiner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from diffgap_lightning.diffusion.prediction import Prediction
from diffgap_lightning.diffusion.schedule import ScheduleName
from diffgap_lightning.functional.precision import tensor_float32
from diffgap_lightning.losses import Split, Weighting, split_batch
from diffgap_lightning.refiner import Direction, Start
from diffgap_lightning.training.evaluated import EvaluatedModule, encode_rows
from diffgap_lightning.training.objective import Objective, ObjectiveName
from diffgap_lightning.training.recorded import Capture
from diffgap_lightning.training.seeded import seeded
from diffgap_lightning.training.shares import of_all_ranks, own_rows

Batch = Mapping[str, Tensor]


class DiffGAPModule(EvaluatedModule):
    """Bidirectional training of a `DiffGAPRefiner`.

    Args:
        pairs: (source, target) pairs; each also trains its reverse. Default: text to audio, or all where the data has
            not both.
        width: Width of the denoisers.
        depth: Residual blocks of the denoisers.
        dropout: In the denoisers.
        rank: Coordinates that are diffused: `"auto"`, `"full"` or a number; see `EmbeddingSpace.fit`.
        prediction: What the denoisers' outputs stand for.
        schedule: Noise schedule.
        split: How a batch is shared between the directions; see `losses.split_batch`.
        objective: `"diffusion"` (CDM), or `"regression"` for the ablation without it.
        loss_weighting: See `losses.snr_weight`.
        contrastive_weight: Weight of the contrastive term; 0 leaves it out.
        condition_dropout: Share of the rows that train the unconditional model.
        condition_noise: Standard deviation of the noise added to conditions; regularises where pairs are few.
        share_of_noise: Share of the rows that train the posterior mean.
        start: Where `refine` starts by default.
        strength: How far back it is noised by default.
        num_steps: Sampler steps by default.
        blend: Share of the centred source in the posterior-mean start; see `RefinerConfig`.
        refiner: Folder of a refiner to go on from; its space, architecture and defaults of `refine` replace those named
            here.
        optimizer: Default AdamW with learning rate 5e-4 and weight decay 0.01.
        lr_scheduler: None keeps the learning rate.
        seed: Of the training noise and of the validation's samples.
        max_rows: Rows of each modality on which the closed forms are measured.
        few_pairs: See `DiffGAPRefiner.measure`.
        skip_non_finite: Steps in a row that are passed over because a gradient is NaN or infinite, the weights left as
            they are, before the run stops; 0 stops at the first. A warning and `train/skipped_steps` count them.
        capture: On a GPU, `"auto"` records training steps as CUDA graphs; see `recorded.py`.
        compile: Fuse the small operations of a loss with `torch.compile`. The first steps take a minute.
    """

    def __init__(
        self,
        pairs: list[tuple[str, str]] | None = None,
        width: int = 512,
        depth: int = 3,
        dropout: float = 0.1,
        rank: int | Literal["auto", "full"] = "auto",
        prediction: Prediction = "x0",
        schedule: ScheduleName = "cosine",
        split: Split = "bst",
        objective: ObjectiveName = "diffusion",
        loss_weighting: Weighting = "x0",
        contrastive_weight: float = 0.0,
        condition_dropout: float = 0.1,
        condition_noise: float = 0.0,
        share_of_noise: float = 0.25,
        start: Start = "posterior_mean",
        strength: float = 0.2,
        num_steps: int = 10,
        blend: float | None = None,
        refiner: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_rows: int = 100_000,
        few_pairs: int = 2000,
        skip_non_finite: int = 20,
        capture: Capture = "auto",
        compile: bool = False,
    ) -> None:
        # Settings come from the caller or the YAML, never from a checkpoint, so no hyper-parameters are saved.
        choices = {
            "width": width, "depth": depth, "dropout": dropout, "prediction": prediction, "schedule": schedule,
            "start": start, "strength": 0.0 if objective == "regression" else strength, "num_steps": num_steps,
            "blend": blend,
        }  # fmt: skip
        loss = Objective(
            objective, loss_weighting, contrastive_weight, condition_dropout, condition_noise, share_of_noise
        )
        super().__init__(
            loss, seed, refiner=refiner, pairs=pairs, rank=rank, max_rows=max_rows, few_pairs=few_pairs,
            choices=choices, capture=capture, skip_non_finite=skip_non_finite,
        )  # fmt: skip
        self.split = split
        self._loss = torch.compile(loss.loss, dynamic=False) if compile else loss.loss
        self.optimizer, self.lr_scheduler = _kept_whole(optimizer), _kept_whole(lr_scheduler)
        self._generators: dict[torch.device, torch.Generator] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch of aligned pairs, summed over the directions that share it."""
        refiner = self._ready()
        key = (self.seed, self.global_step, batch_idx)
        self._generator(*key, 0)  # the same on all ranks
        rows = {name: batch[name] for m in refiner.space.modalities for name in (m, f"{m}_id")}
        step = self._whole_step or self.losses
        with seeded(hash((*key, self.global_rank, 1)), self.device):
            parts = step(rows, self.global_step % len(refiner.directions))
        every = max(int(getattr(self.trainer, "log_every_n_steps", 50)), 1)
        if (self.global_step + 1) % every == 0:  # logging costs more than a step
            named = {f"train/{name}": x.detach().clone() for name, x in parts.items()}
            self.log_dict(named, batch_size=1, sync_dist=self._world > 1)
        return parts["loss"]

    def losses(self, batch: Batch, kind: int) -> dict[str, Tensor]:
        """`"loss"` and its parts; `kind` is the step's number, modulo the number of directions."""
        refiner, generator, world = self._ready(), self._generators[self.device], self._world
        z = {m: encode_rows(refiner, batch[m], m) for m in refiner.space.modalities}
        ids = {m: batch[f"{m}_id"] for m in z}
        whole = split_batch(world * len(next(iter(z.values()))), refiner.directions, self.split, kind)
        contrasted = world if self.objective.contrastive_weight > 0 else 1  # with the targets on every rank
        targets = dict.fromkeys(target for _, target in whole)
        gallery = {t: (of_all_ranks(z[t], contrasted), of_all_ranks(ids[t], contrasted)) for t in targets}
        parts, here = {}, []
        for (s, t), numbers in whole.items():
            rows, share = own_rows(numbers, self.global_rank, world)
            here += [(s, t)] if len(share) else []
            condition, x0 = z[s][rows], z[t][rows]
            draws = self.objective.draw(condition, x0, generator, share)
            with tensor_float32(self.device):  # the closed form, whose noise is far above the rounding
                parts[s, t] = self._loss(
                    refiner.cdm_of(s, t), condition, x0, ids[t][rows], *gallery[t], self.logit_scale, draws
                )
        loss = torch.stack([p["loss"] for p in parts.values()]).sum() + self._idle_parameters(here)
        return {"loss": loss} | {f"{name}/{s}_to_{t}": x for (s, t), p in parts.items() for name, x in p.items()}

    def generators(self) -> list[torch.Generator]:
        """The one that `losses` draws from, which `training_step` has seeded."""
        return [self._generator(self.seed)]

    @property
    def _world(self) -> int:
        """Number of ranks."""
        return 1 if self._trainer is None else self.trainer.world_size

    def _idle_parameters(self, here: Collection[Direction]) -> Tensor:
        """Zero, of every parameter that this step leaves out: DDP would wait for their gradients."""
        refiner = self._ready()
        idle = [p for d in refiner.directions if d not in here for p in refiner.cdm_of(*d).network.parameters()]
        idle += [] if self.objective.contrastive_weight > 0 else [self.logit_scale]
        if self.objective.condition_dropout == 0:
            idle += [refiner.cdm_of(*d).network.no_condition for d in here]
        return 0.0 * torch.stack([p.sum() for p in idle]).sum() if idle else torch.zeros((), device=self.device)

    def configure_optimizers(self) -> Any:
        """AdamW unless an optimizer was given."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer is None:
            # One kernel for all parameters. Where float16's scaler is in use, it could not clip.
            fused = self.trainer.precision != "16-mixed"
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01, fused=fused)
        else:
            optimizer = self.optimizer(parameters)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def _generator(self, *key: int) -> torch.Generator:
        """A generator on this device whose state depends on the key alone, so that resuming repeats the noise."""
        if self.device not in self._generators:
            self._generators[self.device] = torch.Generator(self.device)
        return self._generators[self.device].manual_seed(hash(key) & (2**63 - 1))


class _Whole:
    """A callable that copies of the module share.

    What a command line builds from YAML holds its parser, and through it everything that was built, the trainer and the
    rows included: averaging weights deep-copies the module, and would copy all of that.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Whole:
        return self


def _kept_whole(make: Callable[..., Any] | None) -> _Whole | None:
    return None if make is None else _Whole(make)
