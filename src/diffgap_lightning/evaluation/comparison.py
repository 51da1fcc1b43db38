"""The comparison: every method on the same rows, the same ranks, the same resampled ids.

For a direction source -> target a method is asked two things. As a *retriever*, for the features whose inner product is
its score: exact full-gallery ranks follow without the Q x G matrix. As a *producer*, for the target embedding of each
source row: its cosine to the true rows says how faithful it is; MMD^2 and the Frechet distance say whether the produced
rows are distributed like real ones. A regression towards the mean is faithful and badly distributed, a random real
embedding the reverse; so both are shown.

Intervals resample whole ids (see `bootstrap`), paired across methods. Each record also holds its R@1 minus that of the
best bridge in this direction, with the interval of that difference. The best bridge is chosen by its figure on these
very rows, which favours it a little: what wins against it does so with a handicap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffgap_lightning.evaluation.bootstrap import interval, resample_counts, resampled_means
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.retrieval import retrieval_ranks, retrieval_ranks_from_scores, retrieval_summary

Record = dict[str, Any]
OPTIMUM = "optimum"


class Method(Protocol):
    """What a refiner and a bridge have in common."""

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """Ordered (source, target) pairs."""

    def refine(
        self, embedding: Tensor, *, source: str, target: str, generator: torch.Generator | None = None
    ) -> Tensor:
        """Produce target embeddings."""

    def score_features(self, embedding: Tensor, *, modality: str, source: str, target: str) -> Tensor:
        """Features whose inner product is the score."""


class Rows(Protocol):
    """An `EmbeddingTable`, as far as it is needed here."""

    embeddings: dict[str, Tensor]
    ids: dict[str, Tensor]


def compare_methods(
    models: Mapping[str, Method],
    table: Rows,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    optimum: Tensor | None = None,
    bridges: Sequence[str] | None = None,
    max_gap_rows: int = 5000,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Record]:
    """Measure every method in every direction that all of them know.

    Args:
        models: Name -> fitted bridge or refiner; the records keep this order.
        table: The rows to measure on, none of which any method was fitted on.
        bootstrap: Replicates for the 95 % intervals.
        seed: Of the resampling and of stochastic refiners.
        optimum: `(T, A)` exact optimal text -> audio scores; adds the method "optimum", which has ranks only.
        bridges: The names among which the best bridge is looked for; by default all of `models`.
        max_gap_rows: MMD^2 and the Frechet distance use at most so many rows a side, drawn with `seed`.
        progress: Wraps the iteration over (direction, method), e.g. in a progress bar.

    Returns:
        One record a direction and method, directions from text first; `None` where a method has no such figure.

    Raises:
        ValueError: no models, no common direction, no positive pair.
    """
    ground = _Ground.of(table, bootstrap, seed, max_gap_rows)
    rivals = [name for name in models if bridges is None or name in bridges]
    methods: dict[str, Method | Tensor] = dict(models)
    if optimum is not None:
        methods[OPTIMUM] = optimum
    tasks = [
        (direction, name)
        for direction in _common_directions(models, table)
        for name, method in methods.items()
        if not isinstance(method, Tensor) or set(direction) == {"text", "audio"}
    ]
    records: list[Record] = []
    draws: list[Tensor] = []
    for direction, name in progress(tasks):
        record, draw = ground.measure(methods[name], direction)
        records.append({"method": name, **record})
        draws.append(draw)
    _add_differences(records, draws, rivals)
    return records


def _common_directions(models: Mapping[str, Method], table: Rows) -> list[tuple[str, str]]:
    if not models:
        raise ValueError("compare_methods: got no models, expected at least one")
    first, *others = ([(str(a), str(b)) for a, b in model.directions] for model in models.values())
    known = [d for d in first if all(d in other for other in others) and set(d) <= set(table.embeddings)]
    if not known:
        raise ValueError(
            f"compare_methods: no direction that all of {', '.join(models)} know and whose modalities are among the "
            f"table's ({', '.join(table.embeddings)})"
        )
    return sorted(known, key=lambda direction: direction[0] != "text")  # as papers tabulate: text to audio first


@dataclass(frozen=True)
class _Ground:
    """What all methods are measured on: rows, distinct ids (C,), and the draws (R, C) of each id."""

    table: Rows
    ids: Tensor
    counts: Tensor
    seed: int
    max_gap_rows: int

    @classmethod
    def of(cls, table: Rows, bootstrap: int, seed: int, max_gap_rows: int) -> _Ground:
        ids = torch.unique(torch.cat(list(table.ids.values())))
        counts = resample_counts(len(ids), bootstrap, torch.Generator().manual_seed(seed))
        return cls(table, ids, counts, seed, max_gap_rows)

    def measure(self, method: Method | Tensor, direction: tuple[str, str]) -> tuple[Record, Tensor]:
        """One record, and R@1 in every replicate (R,)."""
        source, target = direction
        source_ids, target_ids = self.table.ids[source], self.table.ids[target]
        asks = torch.isin(source_ids, target_ids)  # without a positive there is no rank; such rows are candidates only
        if not asks.any():
            raise ValueError(f"{source}, {target}: no id in common; expected rows with equal ids as positive pairs")
        query, gallery = self.table.embeddings[source], self.table.embeddings[target]
        if isinstance(method, Tensor):
            scores = method if source == "text" else method.T
            ranks = retrieval_ranks_from_scores(scores[asks], source_ids[asks], target_ids)
        else:
            q = method.score_features(query[asks], modality=source, source=source, target=target)
            g = method.score_features(gallery, modality=target, source=source, target=target)
            ranks = retrieval_ranks(q, g, source_ids[asks], target_ids)
        hits = (ranks.best <= 1).double()
        draws = resampled_means(hits, torch.searchsorted(self.ids, source_ids[asks]), self.counts)
        record: Record = {"direction": f"{source}_to_{target}"}
        record |= {key: float(value) for key, value in retrieval_summary(ranks).items()}
        record["r1_ci"] = interval(draws)
        record |= dict.fromkeys(("cosine", "cosine_ci", "mmd2", "frechet"))
        if not isinstance(method, Tensor):
            record |= self._produce(method, source, target)
        return record | {"n_query": int(asks.sum()), "n_gallery": len(gallery), "seed": self.seed}, draws

    def _produce(self, method: Method, source: str, target: str) -> Record:
        """Cosine of produced to true rows, over all positive pairs, and the two distances between the two sets."""
        generator = torch.Generator().manual_seed(self.seed)
        produced = method.refine(self.table.embeddings[source], source=source, target=target, generator=generator)
        true = self.table.embeddings[target]
        i, j = pair_indices(self.table.ids[source], self.table.ids[target])
        cosine = torch.cosine_similarity(produced.float()[i], true.float()[j])
        unit = torch.searchsorted(self.ids, self.table.ids[source][i])
        some, other = self._sample(produced.float()), self._sample(true.float())
        return {
            "cosine": float(cosine.mean()),
            "cosine_ci": interval(resampled_means(cosine, unit, self.counts)),
            "mmd2": mmd2(some, other),
            "frechet": frechet_distance(some, other, shrinkage="ledoit-wolf"),
        }

    def _sample(self, x: Tensor) -> Tensor:
        if len(x) <= self.max_gap_rows:
            return x
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[: self.max_gap_rows]]


def _add_differences(records: list[Record], draws: list[Tensor], rivals: Sequence[str]) -> None:
    """Put into each record its R@1 minus that of the best rival in its direction, with the paired interval."""
    for direction in {r["direction"] for r in records}:
        own = [k for k, r in enumerate(records) if r["direction"] == direction]
        best = max((k for k in own if records[k]["method"] in rivals), key=lambda k: records[k]["r1"], default=None)
        for k in own:
            if best is None:
                continue
            records[k]["best_bridge"] = records[best]["method"]
            records[k]["r1_minus_best_bridge"] = records[k]["r1"] - records[best]["r1"]
            records[k]["r1_minus_best_bridge_ci"] = interval(draws[k] - draws[best])
