"""Retrieval and modality-gap figures as torchmetrics: they collect rows over batches and ranks, `functional` computes.

Both need all rows at once, so the states are lists of rows: features in float32, ids, and row numbers. The row number
is a row's identity in the evaluated split. Rows are put in its order and repeated ones dropped (samplers pad so that
ranks have equally many), so that a run on many ranks gives exactly the figures of a run on one. A rank may hold
any number of rows of either modality, none included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from diffgap_lightning.functional import gap
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.frechet import frechet_distance
from diffgap_lightning.functional.generation import kernel_audio_distance
from diffgap_lightning.functional.mutual_retrieval import mutual_retrieval_ranks
from diffgap_lightning.functional.retrieval import retrieval_summary

_SIDES = ("source", "target")


class _PairedRows(Metric):
    """Collects the rows of two modalities; see the module's docstring."""

    is_differentiable = False
    full_state_update = False
    # Gathered states stay lists of one tensor a rank: joining them needs `_join`, which knows empty ranks.
    source_features: list[Tensor]
    target_features: list[Tensor]
    source_ids: list[Tensor]
    target_ids: list[Tensor]
    source_rows: list[Tensor]
    target_rows: list[Tensor]

    def __init__(self, source: str, target: str) -> None:
        super().__init__()
        if source == target:
            raise ValueError(f"got the modality {source!r} twice, expected a source and another target")
        self.source, self.target = source, target
        for side in _SIDES:
            for column in ("features", "ids", "rows"):
                self.add_state(f"{side}_{column}", default=[], dist_reduce_fx=None)

    def update(
        self,
        *,
        source_features: Tensor,
        target_features: Tensor,
        source_ids: Tensor,
        target_ids: Tensor,
        source_rows: Tensor,
        target_rows: Tensor,
    ) -> None:
        """Add the rows of one batch; either side may have none.

        Args:
            source_features: `(B, F)` floating.
            target_features: `(C, F)`.
            source_ids: `(B,)` int64; equal ids are positive pairs.
            target_ids: `(C,)`.
            source_rows: `(B,)` int64, unique numbers of the rows in the source's split.
            target_rows: `(C,)`.

        Raises:
            TypeError: features that are not floating, ids or rows that are not int64.
            ValueError: shapes that do not fit.
        """
        self._add("source", source_features, source_ids, source_rows)
        self._add("target", target_features, target_ids, target_rows)

    def sync(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable | None = None,
    ) -> None:
        """Gather the rows of all ranks.

        Every state is first joined to one tensor, of 0 rows where the rank has none: ranks must call equally many
        collectives, and with tensors of equal dtype.
        """
        for name in self.metric_state:
            setattr(self, name, [self._join(name)])
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def collected(self, side: Literal["source", "target"]) -> tuple[Tensor, Tensor]:
        """Checked features `(N, F)` and ids `(N,)` of one side, each row once, in the order of the row numbers."""
        rows = self._join(f"{side}_rows")
        if len(rows) == 0:
            raise ValueError(
                f"{type(self).__name__}: no rows of {getattr(self, side)!r}; call update() with some before compute()"
            )
        order = rows.argsort(stable=True)
        ordered = rows[order]
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        keep = order[first]
        features = check_embeddings(self._join(f"{side}_features")[keep], f"{getattr(self, side)} features")
        return features, self._join(f"{side}_ids")[keep]

    def _add(self, side: str, features: Tensor, ids: Tensor, rows: Tensor) -> None:
        modality = getattr(self, side)
        if not features.is_floating_point():
            raise TypeError(f"{modality} features: got {features.dtype}, expected a floating tensor")
        if features.ndim != 2:
            raise ValueError(f"{modality} features: got shape {tuple(features.shape)}, expected (B, F)")
        for name, column in (("ids", ids), ("rows", rows)):
            if column.dtype != torch.int64:
                raise TypeError(f"{modality} {name}: got {column.dtype}, expected int64")
            if column.shape != features.shape[:1]:
                raise ValueError(f"{modality} {name}: got shape {tuple(column.shape)}, expected ({len(features)},)")
        getattr(self, f"{side}_features").append(features.detach().to(self.device, torch.float32))
        getattr(self, f"{side}_ids").append(ids.detach().to(self.device))
        getattr(self, f"{side}_rows").append(rows.detach().to(self.device))

    def _join(self, name: str) -> Tensor:
        """All parts of a state in one tensor; no rows: `(0, 0)` float32 features, `(0,)` int64 ids and rows."""
        parts = [part for part in getattr(self, name) if len(part)]
        if parts:
            return torch.cat(parts)
        if name.endswith("features"):
            return torch.empty(0, 0, dtype=torch.float32, device=self.device)
        return torch.empty(0, dtype=torch.int64, device=self.device)

    def _tensors(self, figures: dict[str, float]) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in figures.items()}


class PairedRetrieval(_PairedRows):
    """Full-gallery retrieval in both directions by the inner product of features.

    `compute()` gives `<source>_to_<target>/r1`, `r5`, `r10`, `median_rank`, `mean_rank`, `map10`, and the same for
    `<target>_to_<source>`, as `functional.retrieval` defines them. A row without a partner in the other modality asks
    no query, and stays a candidate.

    Args:
        source: Name of one modality.
        target: Name of the other.

    Example:
        >>> metric = PairedRetrieval("text", "audio")
        >>> row = torch.arange(2)
        >>> metric.update(
        ...     source_features=torch.eye(2), source_ids=row, source_rows=row,
        ...     target_features=torch.eye(2), target_ids=row, target_rows=row,
        ... )
        >>> metric.compute()["text_to_audio/r1"]
        tensor(1.)
    """

    def compute(self) -> dict[str, Tensor]:
        """The figures over all rows of all ranks.

        Raises:
            ValueError: no rows, no id in common, or rows that `check_embeddings` refuses.
        """
        (x, x_ids), (y, y_ids) = self.collected("source"), self.collected("target")
        if not torch.isin(x_ids, y_ids).any():
            raise ValueError(f"{self.source}, {self.target}: no id in common, expected equal ids for positive pairs")
        forward, backward = mutual_retrieval_ranks(x, y, x_ids, y_ids)
        names = (f"{self.source}_to_{self.target}", f"{self.target}_to_{self.source}")
        return self._tensors(
            {
                f"{name}/{key}": value
                for name, ranks in zip(names, (forward, backward), strict=True)
                for key, value in retrieval_summary(ranks).items()
            }
        )


class ModalityGap(_PairedRows):
    """How far the source rows lie from the target rows: raw modalities, or refined embeddings beside true ones.

    `compute()` gives, each after `<source>_to_<target>/`: `centroid_distance`, `paired_cosine`, `unpaired_cosine`,
    `alignment`, `uniformity_<source>`, `uniformity_<target>`, `mmd2` and `frechet`, as `functional.gap` defines them.

    Args:
        source: Name of one modality.
        target: Name of the other, whose rows set the bandwidth.
        bandwidth: sigma of the kernel, or several; None: the median heuristic.
        shrinkage: Of the covariances in the Frechet distance.
        chunk_size: Rows compared at once.
    """

    def __init__(
        self,
        source: str,
        target: str,
        *,
        bandwidth: float | Sequence[float] | None = None,
        shrinkage: float | Literal["ledoit-wolf"] = 0.0,
        chunk_size: int = 1024,
    ) -> None:
        super().__init__(source, target)
        self.bandwidth, self.shrinkage, self.chunk_size = bandwidth, shrinkage, chunk_size

    def compute(self) -> dict[str, Tensor]:
        """The figures over all rows of all ranks.

        Raises:
            ValueError: no rows or only one, no id in common, only one id, or rows that `check_embeddings` refuses.
        """
        (x, x_ids), (y, y_ids) = self.collected("source"), self.collected("target")
        figures = {
            "centroid_distance": gap.centroid_distance(x, y),
            "paired_cosine": gap.paired_cosine(x, y, x_ids, y_ids),
            "unpaired_cosine": gap.unpaired_cosine(x, y, x_ids, y_ids),
            "alignment": gap.alignment(x, y, x_ids, y_ids),
            f"uniformity_{self.source}": gap.uniformity(x, chunk_size=self.chunk_size),
            f"uniformity_{self.target}": gap.uniformity(y, chunk_size=self.chunk_size),
            "mmd2": gap.mmd2(x, y, self.bandwidth, chunk_size=self.chunk_size),
            "frechet": gap.frechet_distance(x, y, self.shrinkage),
        }
        return self._tensors({f"{self.source}_to_{self.target}/{name}": v for name, v in figures.items()})


class GenerationDistance(_PairedRows):
    """How far features of generated clips lie from those of real ones, by the conventions of generation metrics.

    `compute()` gives `frechet` (FAD of VGGish's rows, FD of one row a clip) and `kad`, as `functional.frechet` and
    `functional.generation` define them, in float64. The sides of `update` are `source`, the generated rows, and
    `target`, the reference's; their ids play no part, their row numbers tell repeated rows.

    Args:
        bandwidth: sigma of KAD's kernel; None: the median distance of two reference rows.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__("generated", "reference")
        self.bandwidth = bandwidth

    def compute(self) -> dict[str, Tensor]:
        """The figures over all rows of all ranks.

        Raises:
            ValueError: fewer than two rows on a side, or rows that `check_embeddings` refuses.
        """
        x, y = self.collected("source")[0].double(), self.collected("target")[0].double()
        return self._tensors({"frechet": frechet_distance(x, y), "kad": kernel_audio_distance(x, y, self.bandwidth)})
