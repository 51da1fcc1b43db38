"""Fit everything in a refiner that needs no training: `DiffGAPRefiner.measure`.

    space            mean, scale and principal coordinates of each modality
    closed forms     Gaussian denoisers, bridges, hub corrections (see `closed_forms.py`)
    restore          the factor of each direction that gives starts the target's variance
    fusion           weights of each pair's score components
    typical          how far genuine rows lie from the rest (see `novelty.py`)

On few pairs the closed forms are also fitted on four fifths of the rows at a time, and the fifth that is left tells how
much to restore and how to weigh the score components; no row is given up for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffgap_lightning.functional.pairs import frame_rows, pair_indices
from diffgap_lightning.refiner.calibration import TOLERANCE, CalibratedRefiner, restoring
from diffgap_lightning.refiner.closed_forms import BRIDGES, ClosedForms, fit_closed_forms, held_out
from diffgap_lightning.refiner.config import Direction, RefinerConfig, direction_name
from diffgap_lightning.refiner.fusion import ScoredGallery, fit_weights_over
from diffgap_lightning.refiner.novelty import typical_distances
from diffgap_lightning.space import EmbeddingSpace, Rank

R = TypeVar("R", bound=CalibratedRefiner)
Rows = Mapping[str, Tensor]
_NUM_FOLDS = 5
_LEAST_ROWS = 16  # of a modality in the rest of a fold, below which there are no folds
_RESTORED_ROWS = 4096  # on which the restoring factor is measured


def measure(
    build: type[R],
    embeddings: Rows,
    ids: Rows,
    pairs: Sequence[Direction] | None,
    rank: Rank | Mapping[str, Rank],
    max_pairs: int,
    few_pairs: int,
    choices: dict[str, Any],
) -> R:
    """A refiner of class `build`; the other arguments are those of `DiffGAPRefiner.measure`."""
    pairs = tuple(pairs or _default_pairs(embeddings))
    wanted = {m: embeddings[m] for m in embeddings if any(m in p for p in pairs)}
    missing = sorted({m for p in pairs for m in p} - set(wanted))
    if missing:
        raise ValueError(f"pairs: got {missing[0]}, but the data has only {', '.join(embeddings)}")
    wanted, ids, choices["frames"] = frame_rows(wanted, ids, max_pairs)
    few_pairs = 0 if choices["frames"] else few_pairs  # leaving out one frame of a clip is no new clip
    space = EmbeddingSpace.fit(wanted, rank)
    config = RefinerConfig(tuple(pairs), space.dims, space.ranks, **choices)
    same = all(config.dims[s] == config.dims[t] for s, t in config.pairs)
    fewest = min(len(x) for x in wanted.values())
    bridges = {n: b() for n, b in BRIDGES.items() if (same or not b.equal_dims) and fewest >= b.least_rows}
    closed = fit_closed_forms(space, wanted, ids, config.pairs, bridges, max_pairs, few_pairs)
    refiner = _untrained(build, config, space, closed)
    restore = {
        (s, t): restoring(refiner.start_energy(refiner.whole(wanted[s], _RESTORED_ROWS), source=s, target=t))
        for s, t in config.directions
    }
    refiner.config = replace(
        refiner.config,
        restore={direction_name(*d): factor for d, factor in restore.items()},
        typical=_typical(config, wanted, ids, max_pairs),
    )
    for pair in config.pairs:
        if len(pair_indices(*(ids[m] for m in pair))[0]) <= few_pairs:
            _cross_fit(refiner, wanted, ids, pair, closed)
    return refiner


def _untrained(build: type[R], config: RefinerConfig, space: EmbeddingSpace, closed: ClosedForms) -> R:
    """A refiner of these closed forms, with the weights that need no held-out rows."""
    records = {name: bridge.to_parts()[0] for name, bridge in closed.bridges.items()}
    refiner = build(replace(config, bridges=records), space, closed.denoisers, closed.bridges, closed.hubs).eval()
    refiner.config = replace(
        refiner.config,
        restore={direction_name(*d): 1.0 for d in config.directions},
        fusion={direction_name(*pair): refiner.prior_weights(pair) for pair in config.pairs},
    )
    return refiner


def _cross_fit(refiner: CalibratedRefiner, embeddings: Rows, ids: Rows, pair: Direction, closed: ClosedForms) -> None:
    """Fit a pair's fusion weights and restoring factors on rows that no closed form was fitted on, by folds."""
    galleries: list[ScoredGallery] = []
    energy: dict[Direction, list[Tensor]] = {pair: [], pair[::-1]: []}
    for kept, held in held_out(ids[pair[0]], ids[pair[1]], _NUM_FOLDS):
        if min(map(int, (mask.sum() for mask in kept))) < _LEAST_ROWS:
            return
        rest = {m: embeddings[m][mask] for m, mask in zip(pair, kept, strict=True)}
        rest_ids = {m: ids[m][mask] for m, mask in zip(pair, kept, strict=True)}
        space = EmbeddingSpace.fit(rest, {m: refiner.config.ranks[m] for m in pair})
        again = {name: bridge.again(pair) for name, bridge in closed.bridges.items()}
        config = replace(refiner.config, pairs=(pair,), dims=space.dims, ranks=space.ranks)
        fitted = fit_closed_forms(space, rest, rest_ids, (pair,), again, len(rest_ids[pair[0]]) ** 2, 0, closed)
        fold = _untrained(type(refiner), config, space, fitted)
        found = {m: embeddings[m][mask] for m, mask in zip(pair, held, strict=True)}
        found_ids = [ids[m][mask] for m, mask in zip(pair, held, strict=True)]
        features = [fold.components(found[m], modality=m, pair=pair) for m in pair]
        galleries.append((features[0], features[1], found_ids[0], found_ids[1]))
        for source, target in energy:
            energy[source, target].append(fold.start_energy(found[source], source=source, target=target))
    weights = fit_weights_over(galleries, refiner.prior_weights(pair), list(refiner.bridges), tolerance=TOLERANCE)
    name, queries = direction_name(*pair), sum(len(gallery[2]) for gallery in galleries)
    factors = {direction_name(*d): restoring(torch.cat(e)) for d, e in energy.items()}
    refiner.config = replace(
        refiner.config,
        restore=refiner.config.restore | factors,
        fusion=refiner.config.fusion | {name: weights},
        fusion_prior=refiner.config.fusion_prior | {name: weights},
        fusion_queries=refiner.config.fusion_queries | {name: float(queries)},
    )


def _typical(config: RefinerConfig, embeddings: Rows, ids: Rows, max_pairs: int) -> dict[str, list[float]]:
    """Scale of each modality's distances from the training rows, over the pairs of the first direction to it."""
    found: dict[str, list[float]] = {}
    for source, target in config.directions:
        if target not in found:
            count = min(max_pairs, len(pair_indices(ids[source], ids[target])[0]))
            found[target] = typical_distances(embeddings[target], ids[target], config.ranks[target], count)
    return found


def _default_pairs(modalities: Collection[str]) -> list[Direction]:
    """Text to audio where both are there, and everything else to audio; all pairs where there is no audio."""
    sources = sorted(m for m in modalities if m != "audio")
    if "audio" in modalities:
        return [(m, "audio") for m in sources]
    return list(combinations(sources, 2))
