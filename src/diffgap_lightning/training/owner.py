"""`RefinerOwner`: a LightningModule's refiner, from where it comes to where a checkpoint keeps it.

It is measured on the training rows when a fit starts (the same on all ranks), loaded from a folder, or built from a
checkpoint. Where the datamodule has `rows("train", max_rows=...)` the closed forms are measured on these rows,
otherwise on those that the training loader yields first. A checkpoint holds the refiner's configuration beside its
weights and never brings settings; what it holds is refused where it is another model or was trained on other data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.recorded import Capture, RecordedTraining
from diffgap_lightning.training.restore import confine_files, read_checkpoint

M = TypeVar("M", bound="RefinerOwner")
_CHECKPOINT_KEY = "diffgap"
SCHEMA_VERSION = 1  # of what a checkpoint holds under this key; raised when older versions could not read it


class RefinerOwner(RecordedTraining):
    """Holds `refiner`, None until it is measured or loaded.

    Args:
        refiner: Folder of a refiner to go on from.
        pairs: (source, target) pairs to measure.
        rank: See `EmbeddingSpace.fit`.
        max_rows: Rows of each modality on which the closed forms are measured.
        few_pairs: See `DiffGAPRefiner.measure`.
        choices: Other fields of the refiner's configuration.
        capture: See `RecordedTraining`.
        skip_non_finite: See `RecordedTraining`.
    """

    def __init__(
        self,
        refiner: str | None,
        pairs: list[tuple[str, str]] | None,
        rank: int | Literal["auto", "full"],
        max_rows: int,
        few_pairs: int,
        choices: dict[str, Any],
        capture: Capture,
        skip_non_finite: int,
    ) -> None:
        super().__init__(capture, skip_non_finite)
        self.pairs = None if pairs is None else [(s, t) for s, t in pairs]
        self.rank, self.max_rows, self.few_pairs, self.choices = rank, max_rows, few_pairs, choices
        self.refiner: DiffGAPRefiner | None = None if refiner is None else DiffGAPRefiner.from_pretrained(refiner)
        self.measured_here = False  # whether the closed forms are of this run's own training rows

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
        cls: type[M], checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", strict: bool = True,
        weights_only: bool = True, **settings: Any,
    ) -> M:  # fmt: skip
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
