"""Everything in a refiner that is fitted without training, from the rows of a data set and the coordinates given.

    bridges      closed-form maps between modalities, components of the fused score
    denoisers    the Gaussian denoiser of each direction; of few pairs its mean may be a kernel regression, of many it
                 is that of a mixture of concepts where one was found
    hubs         banks of training rows for the hub correction of each pair

`held_out` deals the rows of a pair into folds, so that all of this can be fitted on some and looked at on the others:
whole ids, or, where ids are classes, rows of the modality that has more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgap_lightning.bridges import (
    Bridge,
    CCABridge,
    CentreBridge,
    MixtureBridge,
    ProcrustesBridge,
    RestoredRidgeBridge,
    RidgeBridge,
)
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.mixture_denoiser import MixtureDenoiser
from diffgap_lightning.refiner.hubness import HubCorrection
from diffgap_lightning.space import EmbeddingSpace

Direction = tuple[str, str]
Rows = Mapping[str, Tensor]
_CLASS_SIZE = 8  # pairs an id from which on ids are taken for classes, of which new rows will come
# What the fused score may draw on.
BRIDGES: dict[str, type[Bridge]] = {
    "centre": CentreBridge,
    "ridge": RidgeBridge,
    "restored": RestoredRidgeBridge,
    "procrustes": ProcrustesBridge,
    "cca": CCABridge,
    "mixture": MixtureBridge,
}
HUB_BRIDGE = "restored"  # whose features tell how near a candidate is to everything


@dataclass(frozen=True)
class ClosedForms:
    """What was fitted: bridges by name, denoisers by direction, hub corrections by pair."""

    bridges: Mapping[str, Bridge]
    denoisers: Mapping[Direction, GaussianDenoiser]
    hubs: Mapping[Direction, HubCorrection]


def fit_closed_forms(
    space: EmbeddingSpace,
    embeddings: Rows,
    ids: Rows,
    pairs: Sequence[Direction],
    bridges: Mapping[str, Bridge],
    max_pairs: int,
    few_pairs: int,
    known: ClosedForms | None = None,
) -> ClosedForms:
    """Fit on all rows given.

    Args:
        space: The coordinates.
        embeddings: Modality to unit rows.
        ids: Modality to `(N,)`.
        pairs: (source, target).
        bridges: Unfitted, by name.
        max_pairs: Of more positive pairs a fixed random subset is taken.
        few_pairs: Up to so many, the denoisers' means may be kernel regressions.
        known: An earlier fit on more rows, whose choices are taken over.
    """
    directions = [d for s, t in pairs for d in ((s, t), (t, s))]
    fitted = {name: bridge.fit(embeddings, ids, directions) for name, bridge in bridges.items()}
    coordinates = {m: space.encode(x, m) for m, x in embeddings.items() if any(m in p for p in pairs)}
    denoisers: dict[Direction, GaussianDenoiser] = {}
    mixture = fitted.get("mixture")
    for source, target in directions:
        i, j = some_pairs(ids[source], ids[target], max_pairs, f"{source} and {target}")
        condition, x0 = coordinates[source][i], coordinates[target][j]
        if isinstance(mixture, MixtureBridge) and mixture.num_components(source, target) > 1:
            denoisers[source, target] = MixtureDenoiser.of(mixture, space, source, target, condition, x0)
            continue
        penalty = None if known is None else known.denoisers[source, target].penalty
        few = len(i) <= few_pairs if known is None else penalty is not None
        guess = None
        if few and space.dims[source] == space.dims[target]:
            guess = space.basis(source).T @ space.basis(target) * space.scale(source) / space.scale(target)
        units = _units(ids[source], i, j)
        denoisers[source, target] = GaussianDenoiser.fit(condition, x0, guess, units, penalty)
    hubs = {}
    if HUB_BRIDGE in fitted:
        for s, t in pairs:
            features = (
                fitted[HUB_BRIDGE].score_features(embeddings[m], modality=m, source=s, target=t) for m in (s, t)
            )
            hubs[s, t] = HubCorrection.fit(*features)
    return ClosedForms(fitted, denoisers, hubs)


def some_pairs(source_ids: Tensor, target_ids: Tensor, most: int, what: str) -> tuple[Tensor, Tensor]:
    """Positive pairs, at most so many of them: always the same ones."""
    i, j = pair_indices(source_ids, target_ids)
    if len(i) < 2:
        raise ValueError(
            f"{what}: got {len(i)} positive pairs, expected at least 2; are the ids those of the same clips?"
        )
    if len(i) > most:
        chosen = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))[:most].to(i.device)
        i, j = i[chosen], j[chosen]
    return i, j


def held_out(
    source_ids: Tensor, target_ids: Tensor, num_folds: int, seed: int = 0
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Folds of a pair's rows: ((source, target) rows to fit on, (source, target) rows to look at), as masks.

    Rows without a partner are always fitted on.
    """
    i, j = pair_indices(source_ids, target_ids)
    if not _are_classes(source_ids, i):
        folds = _deal(torch.unique(source_ids[i]), num_folds, seed)
        for fold in folds:
            held = torch.isin(source_ids, fold), torch.isin(target_ids, fold)
            yield (~held[0], ~held[1]), held
        return
    many = 0 if len(torch.unique(i)) >= len(torch.unique(j)) else 1
    for fold in _deal(torch.unique((i, j)[many]), num_folds, seed):
        held_rows = [torch.zeros(len(ids), dtype=torch.bool, device=ids.device) for ids in (source_ids, target_ids)]
        held_rows[many][fold] = True
        kept = [~held_rows[k] if k == many else torch.ones_like(held_rows[k]) for k in (0, 1)]
        held_rows[1 - many][(i, j)[1 - many]] = True
        yield (kept[0], kept[1]), (held_rows[0], held_rows[1])


def _are_classes(source_ids: Tensor, i: Tensor) -> bool:
    return len(i) >= _CLASS_SIZE * len(torch.unique(source_ids[i]))


def _units(source_ids: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """What is new in new data, as a number for each pair: the id, or the row where ids are classes."""
    if not _are_classes(source_ids, i):
        return source_ids[i]
    return i if len(torch.unique(i)) >= len(torch.unique(j)) else j


def _deal(units: Tensor, num_folds: int, seed: int) -> list[Tensor]:
    order = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).to(units.device)]
    return [order[k::num_folds] for k in range(min(num_folds, len(order)))]
