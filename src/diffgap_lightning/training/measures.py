"""What validation and test report, from the rows that a `Gallery` collected.

`<stage>/r1` is the mean of the two directions' R@1 of the fused score, averaged over the pairs; `<stage>/cosine` is the
mean cosine of refined embeddings to their true partners, and `<stage>/mmd2` their distance from the target's rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffgap_lightning.diffusion.noise import row_normal
from diffgap_lightning.functional.gap import centroid_distance, mmd2
from diffgap_lightning.functional.mutual_retrieval import mutual_retrieval_ranks
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.retrieval import retrieval_summary
from diffgap_lightning.refiner import DiffGAPRefiner, Direction
from diffgap_lightning.refiner.fusion import fuse

Values = Mapping[str, Mapping[str, Tensor]]
_MMD_ROWS = 2048


class PairMean:
    """Mean of a loss over the pairs of all batches and ranks.

    Lightning's own mean over ranks divides numbers of rows as integers and is off where ranks have unequal numbers.
    """

    def __init__(self) -> None:
        self._sum = torch.zeros(2, dtype=torch.float64)

    def add(self, mean: Tensor, count: int) -> None:
        """Add a batch's mean over so many pairs."""
        if count:
            self._sum += torch.tensor([float(mean) * count, count], dtype=torch.float64)

    def compute(self) -> float:
        """The mean, equal on all ranks; NaN without a pair."""
        parts = [self._sum]
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self._sum)
            parts = gathered
        total, count = sum(parts).tolist()  # type: ignore[union-attr]
        return total / count if count else float("nan")


def gallery_values(
    refiner: DiffGAPRefiner, embedding: Tensor, modality: str, rows: Tensor, seed: int
) -> dict[str, Tensor]:
    """Everything that validation needs of some rows: score components, start energies and refined embeddings."""
    values = {"embedding": embedding.float()}
    for pair in refiner.config.pairs:
        if modality in pair:
            found = refiner.components(embedding, modality=modality, pair=pair)
            values |= {f"component/{'->'.join(pair)}/{name}": feature for name, feature in found.items()}
    for source, target in refiner.directions:
        if source == modality:
            values[f"energy/{target}"] = refiner.start_energy(embedding, source=source, target=target)
            noise = target_noise(refiner, rows, target, seed)
            refined = refiner.refine(embedding, source=source, target=target, noise=noise)
            values[f"refined/{target}"] = refined.float()
    return values


def target_noise(refiner: DiffGAPRefiner, rows: Tensor, target: str, seed: int) -> Tensor:
    """Noise to refine rows with, `(B, R)` or `(B, T, R)`, which depends on their numbers `(B,)` alone."""
    shape = [*([refiner.config.frames] if refiner.config.frames else []), refiner.config.ranks[target]]
    return row_normal(rows, math.prod(shape), seed).view(len(rows), *shape)


def gallery_parts(
    refiner: DiffGAPRefiner, gallery: Values
) -> tuple[dict[tuple[Direction, str], dict[str, Tensor]], dict[Direction, Tensor], dict[str, Tensor]]:
    """Components, energies and ids as `DiffGAPRefiner.calibrate_from` takes them."""
    components = {(pair, m): _components(gallery, pair, m) for pair in refiner.config.pairs for m in pair}
    energy = {(s, t): gallery[s][f"energy/{t}"] for s, t in refiner.directions}
    return components, energy, {m: v["id"] for m, v in gallery.items()}


def gallery_measures(refiner: DiffGAPRefiner, gallery: Values) -> dict[str, float]:
    """Retrieval and gap figures of a complete gallery, by name; ranks of a process group share the ranking."""
    measures: dict[str, float] = {}
    shared = dist.is_available() and dist.is_initialized()
    device = next(refiner.buffers()).device
    for pair in refiner.config.pairs:
        weights = refiner.config.fusion["->".join(pair)]
        features = [fuse(_components(gallery, pair, m), weights).to(device) for m in pair]
        ids = [gallery[m]["id"].to(device) for m in pair]
        ranks = mutual_retrieval_ranks(*features, *ids, distributed=shared)
        for (source, target), found in zip((pair, pair[::-1]), ranks, strict=True):
            name = f"{source}_to_{target}"
            s_ids, t_ids = gallery[source]["id"], gallery[target]["id"]
            measures |= {f"{name}/{k}": v for k, v in retrieval_summary(found).items()}
            refined, truth = gallery[source][f"refined/{target}"], gallery[target]["embedding"]
            i, j = pair_indices(s_ids, t_ids)
            measures[f"{name}/cosine"] = float((refined[i] * truth[j]).sum(-1).mean())
            refined, truth = refined.flatten(0, -2), truth.flatten(0, -2)  # frames of sequences are rows
            measures[f"{name}/centroid_distance"] = float(centroid_distance(refined, truth))
            if min(len(refined), len(truth)) > 2:
                measures[f"{name}/mmd2"] = float(mmd2(refined[:_MMD_ROWS], truth[:_MMD_ROWS]))
    for figure in ("r1", "cosine"):
        values = [v for k, v in measures.items() if k.endswith(f"/{figure}")]
        measures[figure] = sum(values) / len(values)
    return measures


def _components(gallery: Values, pair: Direction, modality: str) -> dict[str, Tensor]:
    prefix = f"component/{'->'.join(pair)}/"
    return {k[len(prefix) :]: v for k, v in gallery[modality].items() if k.startswith(prefix)}
