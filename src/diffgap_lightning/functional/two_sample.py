r"""Can a classifier tell produced rows from true ones? Its accuracy on rows that it has not seen, 0.5 where it cannot.

The classifier two-sample test (Lopez-Paz & Oquab 2017) with kernel ridge classification: labels +1 and -1, a Gaussian
kernel exp(-|a - b|^2 / median^2) with the true rows' median distance, classes of equal weight,

    (K + penalty diag(1 / w)) a = labels,       label of a new row = sign(k' a)

(no intercept: the weighted mean of the labels is 0) solved once for each fold of a cross-validation. It sees a shift of
the mean as well as too little spread, or spread in the wrong directions. A produced row and the true row that it stands
for are alike by purpose, so whole ids go to one fold: otherwise the classifier would be asked about a row whose true
partner it was taught as the other class. Where the sets are alike, accuracies scatter around 0.5, and those below it
are as good as 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffgap_lightning.functional.mmd import check_rows, median_bandwidth, squared_distances
from diffgap_lightning.functional.precision import column_mean, true_float, widest

MAX_ROWS = 2048  # of each set: a kernel matrix of all


@torch.no_grad()
def classifier_accuracy(
    source: Tensor,
    target: Tensor,
    source_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    *,
    num_folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
) -> float:
    """Cross-validated balanced accuracy of telling produced rows from true ones.

    Args:
        source: `(N, D)` produced rows; of more than 2048 a fixed random subset is taken.
        target: `(M, D)` true rows.
        source_ids: `(N,)` int64; None for both: row numbers, which then stand for the same thing in both.
        target_ids: `(M,)` int64.
        num_folds: Of the cross-validation.
        penalty: Of the regression.
        seed: Of the folds.

    Raises:
        TypeError, ValueError: rows that `check_embeddings` refuses, ids of another length, fewer ids than folds.
    """
    check_rows(source, "source")
    check_rows(target, "target", dim=source.shape[1])
    if (source_ids is None) != (target_ids is None):
        raise ValueError("ids: got those of one side, expected both or neither")
    if num_folds < 2:
        raise ValueError(f"num_folds: got {num_folds}, expected at least 2")
    sides = []
    for name, rows, ids in (("source", source, source_ids), ("target", target, target_ids)):
        ids = torch.arange(len(rows)) if ids is None else ids.cpu()
        if ids.shape != (len(rows),):
            raise ValueError(f"{name}_ids: got shape {tuple(ids.shape)}, expected ({len(rows)},)")
        kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_ROWS].sort().values
        sides.append((rows[kept.to(rows.device)], ids[kept]))
    (x, x_ids), (y, y_ids) = sides
    distinct, unit = torch.unique(torch.cat([x_ids, y_ids]), return_inverse=True)
    if len(distinct) < num_folds:
        raise ValueError(f"ids: got {len(distinct)} different ones, expected at least num_folds={num_folds}")
    fold = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[unit] % num_folds
    centre = column_mean(target)
    rows = torch.cat([widest(true_float(side, centre)).double().cpu() for side in (x, y)])
    kernel = torch.exp(-squared_distances(rows, rows) / (2 * median_bandwidth(target) ** 2))
    labels = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).double()
    return _accuracy(kernel, labels, fold, num_folds, penalty)


def _accuracy(kernel: Tensor, labels: Tensor, fold: Tensor, num_folds: int, penalty: float) -> float:
    right = torch.zeros(len(labels), dtype=torch.float64)
    for k in range(num_folds):
        rest, held = fold != k, fold == k
        weight = torch.where(labels[rest] > 0, 1 / (labels[rest] > 0).sum(), 1 / (labels[rest] < 0).sum()).double()
        weight = weight / weight.mean()
        system = kernel[rest][:, rest] + penalty * torch.diag(1 / weight)
        found = kernel[held][:, rest] @ torch.linalg.solve(system, labels[rest])
        right[held] = (found.sign() == labels[held]).double()
    return float((right[labels > 0].mean() + right[labels < 0].mean()) / 2)
