"""`EvaluatedModule`: validates, tests and predicts with a module's refiner.

Every rank collects what its rows produce (see `gallery.py`); the whole gallery is then ranked with the fused score and
the gap is measured. In a fit, the weights of that score are fitted on it first. Noise is a row's own: figures depend on
neither batches nor ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.gallery import Gallery
from diffgap_lightning.training.measures import PairMean, gallery_measures, gallery_parts, gallery_values, target_noise
from diffgap_lightning.training.objective import Objective
from diffgap_lightning.training.owner import RefinerOwner

Batch = Mapping[str, Tensor]


class EvaluatedModule(RefinerOwner):
    """The evaluation half of `DiffGAPModule`.

    Args:
        objective: Whose loss of the pairs inside a batch is `val/loss`.
        seed: Of the noise.
        **owned: See `RefinerOwner`.
    """

    def __init__(self, objective: Objective, seed: int, **owned: Any) -> None:
        super().__init__(**owned)
        self.objective, self.seed = objective, seed
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self._gallery, self._pair_mean = Gallery(), PairMean()

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
            condition, x0 = (
                encode_rows(refiner, batch[source][i], source),
                encode_rows(refiner, batch[target][j], target),
            )
            keys = (batch[f"{source}_row"][i] << 32) + batch[f"{target}_row"][j]
            order, draws = self.objective.draw_by_key(condition, x0, keys, self.seed)
            condition, x0, ids = condition[order], x0[order], batch[f"{source}_id"][i][order]
            cdm = refiner.cdm_of(source, target)
            parts = self.objective.loss(cdm, condition, x0, ids, x0, ids, self.logit_scale, draws)
            losses.append(parts["loss"])
            count += len(i)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device), count


def encode_rows(refiner: DiffGAPRefiner, embedding: Tensor, modality: str) -> Tensor:
    """`space.encode` without its checks, which would make a GPU wait: the datamodule has checked the rows."""
    space = refiner.space
    return space.coordinates(embedding.float() - space.mean(modality), modality)
