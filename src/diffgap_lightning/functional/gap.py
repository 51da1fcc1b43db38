r"""How far two modalities lie apart: the figures of the modality gap, for rows x (N, D) and y (M, D).

    centroid distance   |mean x - mean y|                                 (Liang et al. 2022)
    paired cosine       mean of cos(x_i, y_j) over pairs of equal ids     faithfulness
    unpaired cosine     the same over pairs of different ids              what a wrong pair gets
    alignment           mean of |x_i - y_j|^2 over pairs of equal ids     (Wang & Isola 2020)
    uniformity          log mean_{i != j} exp(-t |x_i - x_j|^2), t = 2    (Wang & Isola 2020)

and the distances of distributions `mmd2` and `frechet_distance` from their own files. Sums over pairs are taken by id,
sum_{pairs} <x_i, y_j> = sum_{id} <sum of its x, sum of its y>, so that neither the N x M pairs nor the list of positive
pairs is ever written down. Cosines normalise their rows; the other measures take them as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.frechet import frechet_distance, ledoit_wolf_shrinkage
from diffgap_lightning.functional.mmd import check_rows, kernel_mean, median_bandwidth, mmd2
from diffgap_lightning.functional.precision import column_mean, true_float

__all__ = [
    "alignment",
    "centroid_distance",
    "frechet_distance",
    "ledoit_wolf_shrinkage",
    "median_bandwidth",
    "mmd2",
    "paired_cosine",
    "uniformity",
    "unpaired_cosine",
]


@torch.no_grad()
def centroid_distance(source: Tensor, target: Tensor) -> float:
    """Distance between the mean rows of `(N, D)` and `(M, D)`."""
    check_embeddings(source, "source")
    check_embeddings(target, "target", dim=source.shape[1])
    return (column_mean(source) - column_mean(target)).norm().item()


@torch.no_grad()
def paired_cosine(
    source: Tensor, target: Tensor, source_ids: Tensor | None = None, target_ids: Tensor | None = None
) -> float:
    """Mean cosine of all positive pairs.

    Args:
        source: `(N, D)`.
        target: `(M, D)`.
        source_ids: `(N,)` int64; None for both: rows are aligned pairs, N = M.
        target_ids: `(M,)` int64.

    Raises:
        TypeError, ValueError: rows that `check_embeddings` refuses, ids of another length, no positive pair.
    """
    pairs = _Pairs(source, target, source_ids, target_ids)
    return pairs.inner(*_unit(source, target)) / pairs.count


@torch.no_grad()
def unpaired_cosine(
    source: Tensor, target: Tensor, source_ids: Tensor | None = None, target_ids: Tensor | None = None
) -> float:
    """Mean cosine of all pairs of different ids; arguments as for `paired_cosine`."""
    pairs = _Pairs(source, target, source_ids, target_ids)
    negatives = len(source) * len(target) - pairs.count
    if negatives == 0:
        raise ValueError("unpaired_cosine: all ids are equal, so there is no unpaired row to compare with")
    x, y = _unit(source, target)
    everything = (column_mean(x) @ column_mean(y)).item() * len(x) * len(y)
    return (everything - pairs.inner(x, y)) / negatives


@torch.no_grad()
def alignment(
    source: Tensor, target: Tensor, source_ids: Tensor | None = None, target_ids: Tensor | None = None
) -> float:
    """Mean squared distance of all positive pairs; `2 - 2 paired_cosine` for unit rows. Arguments as there."""
    pairs = _Pairs(source, target, source_ids, target_ids)
    centre = column_mean(target)
    x, y = true_float(source, centre), true_float(target, centre)
    x_squares, y_squares = (z.square().sum(1).cpu().double() for z in (x, y))
    squares = (x_squares * pairs.source_partners.cpu()).sum() + (y_squares * pairs.target_partners.cpu()).sum()
    return max(0.0, (squares.item() - 2 * pairs.inner(x, y)) / pairs.count)


@torch.no_grad()
def uniformity(x: Tensor, t: float = 2.0, *, chunk_size: int = 1024) -> float:
    """Log of the mean Gaussian potential of two different rows of `(N, D)`, N >= 2; lower is more even, 0 collapsed."""
    check_rows(x, "uniformity")
    potential = kernel_mean(true_float(x, column_mean(x)), None, [t], chunk_size)
    return math.log(potential) if potential > 0 else -math.inf


class _Pairs:
    """Positive pairs by id: how many there are, how many partners a row has, sums of inner products over them."""

    def __init__(self, source: Tensor, target: Tensor, source_ids: Tensor | None, target_ids: Tensor | None) -> None:
        check_embeddings(source, "source")
        check_embeddings(target, "target", dim=source.shape[1])
        if source_ids is None and target_ids is None:
            if len(source) != len(target):
                raise ValueError(
                    f"got {len(source)} source and {len(target)} target rows: give ids unless rows are pairs"
                )
            source_ids = target_ids = torch.arange(len(source), device=source.device)
        if source_ids is None or target_ids is None:
            raise ValueError("got the ids of one side, expected source_ids and target_ids, or neither")
        for name, ids, rows in (("source_ids", source_ids, source), ("target_ids", target_ids, target)):
            if ids.shape != rows.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(ids.shape)}, expected ({len(rows)},): one id a row")
        unique, inverse = torch.cat([source_ids, target_ids]).unique(return_inverse=True)
        self._groups = len(unique)
        self._source, self._target = inverse.split([len(source), len(target)])
        self.source_partners = torch.bincount(self._target, minlength=self._groups)[self._source]
        self.target_partners = torch.bincount(self._source, minlength=self._groups)[self._target]
        self.count = int(self.source_partners.sum())
        if self.count == 0:
            raise ValueError("ids: source and target have no id in common, expected equal ids for positive pairs")

    def inner(self, x: Tensor, y: Tensor) -> float:
        """Sum of `<x_i, y_j>` over all positive pairs."""
        x_sums = x.new_zeros(self._groups, x.shape[1]).index_add_(0, self._source, x)
        y_sums = y.new_zeros(self._groups, y.shape[1]).index_add_(0, self._target, y)
        return (x_sums * y_sums).sum(1).cpu().double().sum().item()


def _unit(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (torch.nn.functional.normalize(true_float(rows), dim=1) for rows in (source, target))
    return x, y
