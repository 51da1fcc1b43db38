"""Gives few pairs back to the closed forms what early stopping held out.

Of a few hundred clips, a fifth that only decides when to stop is dear: the closed forms gain more from these clips than
a network gains from being trained. So, once a run is over, the network is put to the test on the validation rows,

    gain_i = |y_i - closed form(x_i)|^2 - |y_i - posterior mean(x_i)|^2,

and unless its mean gain over the pairs, averaged over ids, exceeds `tolerance` standard errors it is left out and the
refiner is measured on training and validation rows together. That needs no validation rows: fusion weights and
restoring factors come from folds of the rows themselves (see `DiffGAPRefiner.measure`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.callbacks.save_refiner import SaveRefiner
from diffgap_lightning.training.module import DiffGAPModule

Rows = dict[str, Tensor]


class GiveBackValidation(Callback):
    """Replace what `SaveRefiner` wrote by closed forms of all rows, where the network does not clearly beat them.

    Nothing happens with more pairs than the module's `few_pairs`, with sequences, without a datamodule that has `rows`,
    or where the run went on from another refiner. Checkpoints are left as they are.

    Args:
        tolerance: Standard errors of the mean gain by which the network must win; 1.645 is one-sided 5 %.
    """

    def __init__(self, tolerance: float = 1.645) -> None:
        self.tolerance = tolerance

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, and write."""
        saver = next((c for c in trainer.callbacks if isinstance(c, SaveRefiner)), None)  # type: ignore[attr-defined]
        rows = getattr(getattr(trainer, "datamodule", None), "rows", None)
        if saver is None or rows is None or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, DiffGAPModule) or not pl_module.measured_here:
            return
        folder = saver.path(trainer)
        if trainer.fast_dev_run or not folder.exists() or not trainer.val_dataloaders:  # type: ignore[attr-defined]
            return
        trained = DiffGAPRefiner.from_pretrained(folder)
        train, val = (rows(split, max_rows=pl_module.max_rows) for split in ("train", "val"))
        embeddings, ids = together((train.embeddings, train.ids), (val.embeddings, val.ids))
        pairs = trained.config.pairs
        if trained.config.frames or any(len(pair_indices(ids[s], ids[t])[0]) > pl_module.few_pairs for s, t in pairs):
            return
        gain, error = gain_of_network(trained, val.embeddings, val.ids)
        verdict = f"the network changes the validation error by {-gain:+.4f} (standard error {error:.4f})"
        if gain > self.tolerance * error:
            rank_zero_info(f"{verdict}: it is kept")
            return
        self._measure(pl_module, trained, embeddings, ids, folder)
        rank_zero_info(f"{verdict}, no clear gain: {folder} holds closed forms of training and validation rows instead")

    @staticmethod
    def _measure(module: DiffGAPModule, trained: DiffGAPRefiner, embeddings: Rows, ids: Rows, folder: Path) -> None:
        refiner = DiffGAPRefiner.measure(
            embeddings, ids, trained.config.pairs, module.rank, few_pairs=module.few_pairs,
            encoder=trained.config.encoder, **module.choices,
        )  # fmt: skip
        refiner.save_pretrained(folder)


def together(first: tuple[Rows, Rows], second: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    """Rows and ids of both, once each: class prompts, for instance, are in every split."""
    embeddings, ids = {}, {}
    for m in first[0]:
        known = {(i, x.tobytes()) for i, x in zip(first[1][m].tolist(), first[0][m].numpy(), strict=True)}
        rows = zip(second[1][m].tolist(), second[0][m].numpy(), strict=True)
        new = torch.tensor([(i, x.tobytes()) not in known for i, x in rows], dtype=torch.bool)
        embeddings[m] = torch.cat([first[0][m], second[0][m][new]])
        ids[m] = torch.cat([first[1][m], second[1][m][new]])
    return embeddings, ids


@torch.no_grad()
def gain_of_network(refiner: DiffGAPRefiner, embeddings: Rows, ids: Rows) -> tuple[float, float]:
    """By how much the networks lower the mean squared error of a coordinate's posterior mean, and its standard error.

    Summed over the directions; the error is that of the mean over ids.
    """
    gains, numbers = [], []
    for source, target in refiner.directions:
        i, j = pair_indices(ids[source], ids[target])
        cdm = refiner.cdm_of(source, target)
        condition, x0 = (
            refiner.space.encode(embeddings[source][i], source),
            refiner.space.encode(embeddings[target][j], target),
        )
        errors = [
            (x0 - mean).square().mean(1) for mean in (cdm.closed_form.mean(condition), cdm.posterior_mean(condition))
        ]
        gains.append(errors[0] - errors[1])
        numbers.append(ids[source][i])
    gain, (_, unit) = torch.cat(gains).double(), torch.unique(torch.cat(numbers), return_inverse=True)
    count = int(unit.max()) + 1
    mean = gain.new_zeros(count).index_add_(0, unit, gain) / torch.bincount(unit)
    mean = mean * len(refiner.directions)
    return float(mean.mean()), float(mean.std() / count**0.5) if count > 1 else float("inf")
