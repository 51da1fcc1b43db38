"""Which regularisation CCA should have: chosen by the contrastive loss of held-out rows.

Whole ids are held out (where ids are classes, rows: see `PairedRows.units`). For every setting the exact solution on
the other rows scores the held-out ones, and the least symmetric InfoNCE, at its best temperature, wins. That loss is
smooth where R@1 of a few dozen rows is not. Settings share what they can: the moments of the fitted rows are all
moments less the held-out ones, each fold has one eigendecomposition a side, and settings that differ in exponent or
centred weight alone have one solution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import canonical_in_basis, principal_directions, second_moment

Auto = Literal["auto"]
Moments = Sequence[Tensor]  # x'x, y'y, x'y over pairs, float64
Solution = tuple[Tensor, Tensor, Tensor]  # W_x, W_y, correlations, float64

_GRIDS: tuple[tuple[float, ...], ...] = (
    (32, 64, 128, 256),
    (0.001, 0.03, 0.1, 0.3, 0.5, 0.8),
    (0.5, 1.0),
    (0.0, 0.3, 1.0, 2.0),
)
_TEMPERATURES = (8.0, 16.0, 32.0)
_NUM_FOLDS = 5
_MAX_HELD_OUT = 500  # ids, or rows; with many more pairs than that one fold is enough
unit = nn.functional.normalize


class CCAChoice(NamedTuple):
    """One setting of CCA.

    Attributes:
        rank: Principal directions kept of each modality.
        shrinkage: 0 to 1, of the covariances towards the sphere.
        power: Exponent of the correlations in the weighted cosine.
        centred_weight: Weight of the centred cosine in the score.
    """

    rank: int
    shrinkage: float
    power: float
    centred_weight: float


def moments_of(rows: PairedRows) -> Moments:
    """Second moments of the pairs."""
    x, y = rows.x, rows.y
    return second_moment(x), second_moment(y), second_moment(x, y)


def open_choices(
    rank: int | Auto = "auto",
    shrinkage: float | Auto = "auto",
    power: float | Auto = "auto",
    centred_weight: float | Auto = "auto",
) -> list[CCAChoice]:
    """All settings that the options leave open."""
    options = (rank, shrinkage, power, centred_weight)
    grids = [grid if option == "auto" else (option,) for option, grid in zip(options, _GRIDS, strict=True)]
    return [CCAChoice(int(r), float(s), float(p), float(w)) for r, s, p, w in product(*grids)]


def best_choice(choices: list[CCAChoice], rows: PairedRows, moments: Moments, seed: int) -> CCAChoice:
    """The setting of least held-out loss; the only one, without any work, if there is one."""
    if len(choices) == 1:
        return choices[0]
    loss = dict.fromkeys(choices, 0.0)
    num_folds = _NUM_FOLDS if len(rows.i) <= 2 * _NUM_FOLDS * _MAX_HELD_OUT else 1
    for held in rows.held_out(num_folds, _MAX_HELD_OUT, seed):
        rest = [m - h for m, h in zip(moments, moments_of(held), strict=True)]
        for choice, value in _held_out_losses(choices, held, [m / (len(rows.i) - len(held.i)) for m in rest]):
            loss[choice] += value
    return min(loss, key=loss.__getitem__)


def solve(choice: CCAChoice, moments: Moments, number: int) -> Solution:
    """`(W_x (D_x, k), W_y (D_y, k), correlations (k,))` in float64 from the moments of `number` pairs."""
    return next(_solutions([choice], [m / number for m in moments]))[1]


def _solutions(choices: list[CCAChoice], covariances: Moments) -> Iterator[tuple[list[CCAChoice], Solution]]:
    """Solve once for all settings that share rank and shrinkage."""
    (values_x, basis_x), (values_y, basis_y) = (
        principal_directions(c, max(choice.rank for choice in choices)) for c in covariances[:2]
    )
    cross = basis_x.T @ covariances[2] @ basis_y
    for rank, shrinkage in dict.fromkeys((c.rank, c.shrinkage) for c in choices):
        group = [c for c in choices if (c.rank, c.shrinkage) == (rank, shrinkage)]
        w_x, w_y, correlations = canonical_in_basis(values_x[:rank], values_y[:rank], cross[:rank, :rank], shrinkage)
        yield group, (basis_x[:, :rank] @ w_x, basis_y[:, :rank] @ w_y, correlations)


def _held_out_losses(
    choices: list[CCAChoice], held: PairedRows, covariances: Moments
) -> Iterator[tuple[CCAChoice, float]]:
    positive = held.first_ids[:, None] == held.second_ids
    centred = torch.zeros(())
    if any(c.centred_weight for c in choices):
        centred = unit(held.first, dim=1) @ unit(held.second, dim=1).T
    for group, (w_x, w_y, correlations) in _solutions(choices, covariances):
        for power in dict.fromkeys(c.power for c in group):
            weight = correlations**power
            u, v = held.first @ (w_x * weight).float(), held.second @ (w_y * weight).float()
            cosine = unit(u, dim=1) @ unit(v, dim=1).T
            for choice in (c for c in group if c.power == power):
                yield choice, _contrastive_loss(cosine + choice.centred_weight * centred, positive)


def _contrastive_loss(scores: Tensor, positive: Tensor) -> float:
    """Symmetric InfoNCE of `(n, m)` scores at the best of a few temperatures; all positives of a row count together."""
    losses = []
    for temperature in _TEMPERATURES:
        logits = temperature * scores
        kept = logits.masked_fill(~positive, -torch.inf)
        losses.append(sum(float((logits.logsumexp(d) - kept.logsumexp(d)).mean()) for d in (0, 1)))
    return min(losses)
