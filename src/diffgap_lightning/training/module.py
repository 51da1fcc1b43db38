"""`DiffGAPModule`: trains a refiner's denoisers with Lightning; the refiner itself is `module.refiner`.

The closed-form half of the refiner (space, Gaussian denoisers, bridges) is measured from the training rows when the fit
starts, the same on all ranks. Training then improves the networks, each batch split between the directions (BST).
Validation ranks the full gallery with the fused score, whose weights are fitted there, and measures the gap; the best
refiner is what `callbacks.SaveRefiner` writes.

A batch is `{modality: (B, D), "<modality>_id": (B,)}`; in evaluation also `"<modality>_row"`. Sequences `(B, T, D)`
train a refiner of sequences. Anything that yields such batches can train a refiner. Where the datamodule has
`rows("train", max_rows=...)` the closed forms are measured on these rows, otherwise on those that the training loader
yields first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from diffgap_lightning.diffusion.prediction import Prediction
from diffgap_lightning.diffusion.schedule import ScheduleName
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.precision import tensor_float32
from diffgap_lightning.losses import Split, Weighting, split_batch
from diffgap_lightning.refiner import DiffGAPRefiner, Direction, Start
from diffgap_lightning.training.gallery import Gallery
from diffgap_lightning.training.measures import PairMean, gallery_measures, gallery_parts, gallery_values, target_noise
from diffgap_lightning.training.objective import Objective, ObjectiveName
from diffgap_lightning.training.recorded import Capture, RecordedTraining
from diffgap_lightning.training.restore import confine_files, read_checkpoint
from diffgap_lightning.training.seeded import seeded
from diffgap_lightning.training.shares import of_all_ranks, own_rows

Batch = Mapping[str, Tensor]
_CHECKPOINT_KEY = "diffgap"
SCHEMA_VERSION = 1  # of what a checkpoint holds under this key; raised when older versions could not read it


class DiffGAPModule(RecordedTraining):
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
        super().__init__(capture, skip_non_finite)
        # Settings come from the caller or the YAML, never from a checkpoint, so no hyper-parameters are saved.
        self.pairs = None if pairs is None else [(s, t) for s, t in pairs]
        self.choices: dict[str, Any] = {
            "width": width, "depth": depth, "dropout": dropout, "prediction": prediction, "schedule": schedule,
            "start": start, "strength": 0.0 if objective == "regression" else strength, "num_steps": num_steps,
            "blend": blend,
        }  # fmt: skip
        self.rank, self.split, self.seed, self.max_rows, self.few_pairs = rank, split, seed, max_rows, few_pairs
        self.objective = Objective(
            objective, loss_weighting, contrastive_weight, condition_dropout, condition_noise, share_of_noise
        )
        self._loss = torch.compile(self.objective.loss, dynamic=False) if compile else self.objective.loss
        self.optimizer, self.lr_scheduler = _kept_whole(optimizer), _kept_whole(lr_scheduler)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.refiner: DiffGAPRefiner | None = None if refiner is None else DiffGAPRefiner.from_pretrained(refiner)
        self.measured_here = False  # whether the closed forms are of this run's own training rows
        self._gallery, self._pair_mean = Gallery(), PairMean()
        self._generators: dict[torch.device, torch.Generator] = {}

    # ---- the refiner ----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Measure the closed forms on the training rows when a fit starts."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._measure_if_missing()
            refiner = self._same_encoder().train()  # a refiner that was loaded is in inference mode
            if refiner.config.encoder is None:
                refiner.config = replace(refiner.config, encoder=self._data_encoder())

    def on_fit_end(self) -> None:
        """Leave a refiner that can be used at once, without dropout."""
        self._ready().eval()

    def _measure_if_missing(self) -> None:
        if self.refiner is not None:
            return
        embeddings, ids, encoder = self._training_rows()
        with torch.inference_mode(False):  # what a validation measures can be trained afterwards
            refiner = DiffGAPRefiner.measure(
                embeddings, ids, self.pairs, self.rank, few_pairs=self.few_pairs, encoder=encoder, **self.choices
            )
            state = self.trainer.strategy.broadcast((asdict(refiner.config), refiner.state_dict()))
            self.refiner = DiffGAPRefiner.from_state(*state).to(self.device)
        self.measured_here = True

    def _training_rows(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], str | None]:
        rows = getattr(getattr(self.trainer, "datamodule", None), "rows", None)
        if rows is not None:
            table = rows("train", max_rows=self.max_rows)
            return table.embeddings, table.ids, getattr(table, "encoder", None)
        if self.trainer.state.fn != TrainerFn.FITTING:
            raise ValueError("no refiner yet: give ckpt_path=CHECKPOINT, refiner=FOLDER, or a datamodule with rows()")
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        batches = [] if loader is None else list(islice(loader, 1 + self.max_rows // 256))
        if not batches:
            raise ValueError("the training loader yielded no batch: nothing to measure the space on")
        modalities = [k for k in batches[0] if f"{k}_id" in batches[0]]
        joined = {k: torch.cat([b[k] for b in batches]) for m in modalities for k in (m, f"{m}_id")}
        return {m: joined[m] for m in modalities}, {m: joined[f"{m}_id"] for m in modalities}, None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the refiner's configuration beside its weights."""
        super().on_save_checkpoint(checkpoint)
        if self.refiner is not None:
            checkpoint[_CHECKPOINT_KEY] = {"schema_version": SCHEMA_VERSION, "refiner": asdict(self.refiner.config)}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", strict: bool = True,
        weights_only: bool = True, **settings: Any,
    ) -> DiffGAPModule:  # fmt: skip
        """Build a module with these settings and the checkpoint's refiner; nothing in the file is executed.

        Args:
            checkpoint_path: A `.ckpt` file.
            map_location: Device of the tensors.
            strict: Refuse missing and unexpected weights.
            weights_only: For Lightning's sake; False is refused, because these checkpoints hold only data.
            **settings: The constructor's arguments. The checkpoint never brings any.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another module, or more than tensors and plain values.
        """
        if not weights_only:
            raise ValueError("weights_only: got False; DiffGAP's checkpoints hold only data, leave it out")
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        module = cls(**settings)
        module.on_load_checkpoint(checkpoint)
        try:
            module.load_state_dict(checkpoint["state_dict"], strict=strict)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{checkpoint_path}: its weights do not fit ({' '.join(str(error).split())[:300]})"
            ) from error
        return module

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the refiner that the checkpoint holds, or check that it is the one that was built from the data."""
        confine_files(checkpoint)
        record = checkpoint.get(_CHECKPOINT_KEY)
        if not isinstance(record, dict):
            raise ValueError("checkpoint: holds no DiffGAP refiner; was it written by another LightningModule?")
        version = record.get("schema_version")
        if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"checkpoint: schema_version {version!r}, this version reads 1 to {SCHEMA_VERSION}; "
                "upgrade diffgap-lightning to go on from it"
            )
        prefix = "refiner."
        state = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if str(k).startswith(prefix)}
        if not isinstance(record.get("refiner"), dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError("checkpoint: its refiner has no configuration or no tensors; the file was altered")
        loaded = DiffGAPRefiner.from_state(record["refiner"], state)
        if self.refiner is None:
            self.refiner = loaded.to(self.device)
            return
        _check_same_architecture(self.refiner, loaded)
        fitted = {
            name: getattr(loaded.config, name)
            for name in ("restore", "fusion", "fusion_prior", "fusion_queries", "bridges")
        }
        self.refiner.config = replace(self.refiner.config, **fitted)

    def _data_encoder(self) -> str | None:
        """Fingerprint of the encoder that made the datamodule's rows, where both are known."""
        return getattr(getattr(self.trainer, "datamodule", None), "encoder", None)

    def _same_encoder(self) -> DiffGAPRefiner:
        """The refiner, once it is sure that the data lie in its space."""
        refiner = self._ready()
        refiner.check_encoder(self._data_encoder())
        return refiner

    def _ready(self) -> DiffGAPRefiner:
        if self.refiner is None:
            raise RuntimeError("the refiner is not built yet: fit, or load a checkpoint, or give refiner=FOLDER")
        return self.refiner

    # ---- training -------------------------------------------------------------------------------------------------

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
        z = {m: _encode(refiner, batch[m], m) for m in refiner.space.modalities}
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

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Without a fit or a checkpoint, measure the closed forms: they refine and score untrained."""
        self._measure_if_missing()
        self._same_encoder()

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self._measure_if_missing()
        self._same_encoder()

    def on_predict_start(self) -> None:
        """As `on_validation_start`."""
        self._measure_if_missing()
        self._same_encoder()

    def on_validation_epoch_start(self) -> None:
        """Start an empty gallery and an empty mean."""
        self._gallery, self._pair_mean = Gallery(), PairMean()

    def on_test_epoch_start(self) -> None:
        """Start an empty gallery."""
        self._gallery = Gallery()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect what the rows of this batch produce, and the loss of the pairs within it."""
        self._collect(batch)
        self._pair_mean.add(*self._evaluation_loss(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect what the rows of this batch produce."""
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        """Fit the fusion weights on the whole gallery, then rank it."""
        refiner, gallery = self._ready(), self._gallery.complete()
        self.log("val/loss", self._pair_mean.compute(), rank_zero_only=False)
        if self.trainer.sanity_checking or not gallery:
            return
        if self.trainer.state.fn == TrainerFn.FITTING:
            refiner.calibrate_from(*gallery_parts(refiner, gallery))
        self._log_gallery("val", gallery)

    def on_test_epoch_end(self) -> None:
        """Rank the whole gallery with the weights that validation chose."""
        self._log_gallery("test", self._gallery.complete())

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Refine the rows of this batch in every direction.

        Returns:
            For each direction `"<source>_to_<target>"` `(B_source, D_target)`, and the same with `_id` and `_row`.
        """
        refiner, out = self._ready(), {}
        for source, target in refiner.directions:
            if len(batch.get(source, ())) == 0:
                continue
            name = f"{source}_to_{target}"
            noise = target_noise(refiner, batch[f"{source}_row"], target, self.seed)
            out[name] = refiner.refine(batch[source], source=source, target=target, noise=noise)
            out |= {f"{name}_{key}": batch[f"{source}_{key}"] for key in ("id", "row")}
        return out

    def _collect(self, batch: Batch) -> None:
        refiner = self._ready()
        for modality in refiner.space.modalities:
            if len(batch.get(modality, ())) == 0:
                continue
            rows = batch[f"{modality}_row"]
            values = gallery_values(refiner, batch[modality], modality, rows, self.seed)
            self._gallery.add(modality, rows, values | {"id": batch[f"{modality}_id"]})

    def _log_gallery(self, stage: str, gallery: Mapping[str, Mapping[str, Tensor]]) -> None:
        measures = gallery_measures(self._ready(), gallery)
        self.log_dict({f"{stage}/{name}": value for name, value in measures.items()}, rank_zero_only=False)

    @torch.no_grad()
    def _evaluation_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Loss over the pairs inside the batch; a pair's noise is its own, at every validation and in any batch."""
        refiner, losses, count = self._ready(), [], 0
        for source, target in refiner.directions:
            if len(batch.get(source, ())) == 0 or len(batch.get(target, ())) == 0:
                continue
            i, j = pair_indices(batch[f"{source}_id"], batch[f"{target}_id"])
            if len(i) == 0:
                continue
            condition, x0 = _encode(refiner, batch[source][i], source), _encode(refiner, batch[target][j], target)
            keys = (batch[f"{source}_row"][i] << 32) + batch[f"{target}_row"][j]
            order, draws = self.objective.draw_by_key(condition, x0, keys, self.seed)
            condition, x0, ids = condition[order], x0[order], batch[f"{source}_id"][i][order]
            cdm = refiner.cdm_of(source, target)
            parts = self.objective.loss(cdm, condition, x0, ids, x0, ids, self.logit_scale, draws)
            losses.append(parts["loss"])
            count += len(i)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device), count

    def _generator(self, *key: int) -> torch.Generator:
        """A generator on this device whose state depends on the key alone, so that resuming repeats the noise."""
        if self.device not in self._generators:
            self._generators[self.device] = torch.Generator(self.device)
        return self._generators[self.device].manual_seed(hash(key) & (2**63 - 1))


def _encode(refiner: DiffGAPRefiner, embedding: Tensor, modality: str) -> Tensor:
    """`space.encode` without its checks, which would make a GPU wait: the datamodule has checked the rows."""
    space = refiner.space
    return space.coordinates(embedding.float() - space.mean(modality), modality)


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


def _check_same_architecture(built: DiffGAPRefiner, loaded: DiffGAPRefiner) -> None:
    """Refuse to resume a run with another model or other training data than it was started with."""
    for name in ("pairs", "dims", "ranks", "frames", "width", "depth", "prediction", "schedule", "encoder"):
        ours, theirs = getattr(built.config, name), getattr(loaded.config, name)
        if ours != theirs:
            raise ValueError(
                f"checkpoint: was trained with {name} {theirs}, the present settings or data give {ours}; "
                "resume with the run's own config.yaml, or start a new run"
            )
    shapes = [{k: v.shape for k, v in refiner.state_dict().items()} for refiner in (built, loaded)]
    if shapes[0] != shapes[1]:
        odd = min(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise ValueError(
            f"checkpoint: {odd} has another shape than the present settings or data give; "
            "resume with the run's own config.yaml, or start a new run"
        )
