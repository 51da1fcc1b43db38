"""Cross-validation on real CLAP embeddings: every method fitted on the training folds, measured on the test fold.

    python benchmarks/real_clap.py DATA_DIR --json real_clap.json        all methods, three seeds
    python benchmarks/real_clap.py DATA_DIR --reference                  closed forms of fixed settings

DATA_DIR holds embedding tables (see `diffgap_lightning.data.EmbeddingTable`) with columns `<modality>_fold`:
`audiocaps_dev.npz`, clips and captions in folds by clip, and `esc50.npz`, clips in the official folds and one prompt a
class. A table that is not there is left out. `<name>_<condition>.npz` beside a table holds the same rows with altered
audio: methods are fitted on the clean training folds and measured on the altered test fold.

Each test fold is its own gallery. Hits, ranks and cosines are pooled over the folds and averaged over the seeds;
distances between distributions are averaged over both. Intervals resample whole clips (classes in ESC-50 would be too
few: there, each clip is a unit), with the same draws for every method, and tell nothing about other seeds; `r1_by_seed`
in the JSON does. A second table asks how near what was produced for all held-out rows lies to all true rows, by several
measures. A method is a function `fit(table, seed) -> model`, where the model has `refine` and `score_features`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import Tensor
from tqdm import tqdm

from diffgap_lightning.bridges import (
    Bridge,
    CCABridge,
    CentreBridge,
    IdentityBridge,
    MLPBridge,
    RestoredRidgeBridge,
    RidgeBridge,
    default_bridges,
)
from diffgap_lightning.cli.trainer import fit
from diffgap_lightning.data import EmbeddingTable
from diffgap_lightning.evaluation.bootstrap import interval, resample_counts, resampled_means
from diffgap_lightning.evaluation.comparison import Method
from diffgap_lightning.evaluation.report import HOW_TO_READ, format_table, write_json
from diffgap_lightning.functional.gap import frechet_distance, median_bandwidth, mmd2
from diffgap_lightning.functional.neighbours import neighbour_precision_recall
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.retrieval import RetrievalRanks, retrieval_ranks, retrieval_summary
from diffgap_lightning.functional.two_sample import classifier_accuracy
from diffgap_lightning.refiner import DiffGAPRefiner

Fit = Callable[[EmbeddingTable, int], Method]
Direction = tuple[str, str]
Record = dict[str, Any]
DATASETS: dict[str, tuple[list[Direction], str]] = {  # what is measured, and what the bootstrap resamples
    "audiocaps_dev": ([("text", "audio"), ("audio", "text")], "id"),
    "esc50": ([("audio", "text")], "row"),
}
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "table.yaml"
PENALTY = 300 / 512  # for unit rows: 300 on rows scaled by sqrt(512)


def fit_bridge(make: Callable[..., Bridge], table: EmbeddingTable, seed: int) -> Bridge:
    return make(**({"seed": seed} if takes_seed(make) else {})).fit(table.embeddings, table.ids)


def takes_seed(make: Callable[..., Bridge]) -> bool:
    return "seed" in inspect.signature(make).parameters


def fit_refiner(table: EmbeddingTable, seed: int) -> DiffGAPRefiner:
    """`diffgap fit --config configs/table.yaml` on four fifths of the units; it stops and calibrates on the others."""
    with tempfile.TemporaryDirectory() as folder:
        return DiffGAPRefiner.from_pretrained(run_fit(table, seed, Path(folder)) / "refiner")


def run_fit(table: EmbeddingTable, seed: int, folder: Path, config: Path = CONFIG) -> Path:
    """The folder of a run, inside a temporary one, of `diffgap fit --config ...` as in `fit_refiner`."""
    train, val = hold_out(table, 0.2, seed)
    run = folder / "run"
    arguments = {
        "config": config,
        "data.path": train.write(folder / "train.npz"),
        "data.val_path": val.write(folder / "val.npz"),
        "data.test_fraction": 0,
        "seed_everything": seed,
        "model.seed": seed,
        "trainer.default_root_dir": run,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    with contextlib.redirect_stdout(io.StringIO()):
        fit([f"--{name}={value}" for name, value in arguments.items()])
    return run


def hold_out(table: EmbeddingTable, share: float, seed: int) -> tuple[EmbeddingTable, EmbeddingTable]:
    """(the rest, a random share of the units); a modality without a fold column is on both sides."""
    folded = [m for m in table.modalities if f"{m}_fold" in table.columns]
    units = {m: torch.as_tensor(table.columns[f"{m}_unit"]) for m in folded}
    distinct = torch.unique(torch.cat(list(units.values())))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    held = distinct[order[: round(share * len(distinct))]]
    inside = {m: torch.isin(u, held) for m, u in units.items()}
    return table.select_rows({m: ~mask for m, mask in inside.items()}), table.select_rows(inside)


class OneWayRidge(RidgeBridge):
    """Ridge whose score maps one modality only."""

    def __init__(self, mapped: str = "text") -> None:
        super().__init__(penalty=PENALTY)
        self.mapped = mapped

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        other = target if modality == source else source
        return torch.nn.functional.normalize(self._offset(x, modality, other) if modality == self.mapped else x)


METHODS: dict[str, Callable[..., Bridge]] = {**default_bridges(), "mlp random": partial(MLPBridge, start="random")}
REFERENCE: dict[str, Callable[..., Bridge]] = {
    "raw": IdentityBridge,
    "centre": CentreBridge,
    "ridge text": partial(OneWayRidge, "text"),
    "ridge audio": partial(OneWayRidge, "audio"),
    "ridge fusion": lambda: RidgeBridge(PENALTY),
    "restored": lambda: RestoredRidgeBridge(PENALTY, blend=0.0),
    "blend": lambda: RestoredRidgeBridge(PENALTY),
    "transport": lambda: RestoredRidgeBridge(PENALTY, restore="transport", blend=0.0),
    "cca": lambda: CCABridge(64, 0.5, 1.0, 0.0),
    "cca + centred": lambda: CCABridge(64, 0.5, 1.0, 1.0),
}


def splits(table: EmbeddingTable) -> Iterator[tuple[EmbeddingTable, EmbeddingTable]]:
    """(training folds, test fold); a modality without a fold column, e.g. class prompts, is on both sides."""
    folds = {m: torch.as_tensor(table.columns[f"{m}_fold"]) for m in table.modalities if f"{m}_fold" in table.columns}
    for k in torch.unique(torch.cat(list(folds.values()))):
        yield (
            table.select_rows({m: fold != k for m, fold in folds.items()}),
            table.select_rows({m: fold == k for m, fold in folds.items()}),
        )


@dataclass
class Pool:
    """Figures of one method and direction over folds, in an order that is the same for every method and seed."""

    ranks: list[RetrievalRanks] = field(default_factory=list)
    query_units: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    pair_units: list[Tensor] = field(default_factory=list)
    mmd2: list[float] = field(default_factory=list)
    frechet: list[float] = field(default_factory=list)
    gallery: list[int] = field(default_factory=list)
    produced: list[Tensor] = field(default_factory=list)
    produced_ids: list[Tensor] = field(default_factory=list)
    true: list[Tensor] = field(default_factory=list)
    true_ids: list[Tensor] = field(default_factory=list)

    def add(self, model: Method, test: EmbeddingTable, direction: Direction) -> None:
        """Measure a fitted model on a test fold."""
        source, target = direction
        query, gallery = test.embeddings[source], test.embeddings[target]
        q = model.score_features(query, modality=source, source=source, target=target)
        g = model.score_features(gallery, modality=target, source=source, target=target)
        produced = model.refine(query, source=source, target=target, generator=torch.Generator().manual_seed(0))
        i, j = pair_indices(test.ids[source], test.ids[target])
        units = torch.as_tensor(test.columns[f"{source}_unit"])
        self.ranks.append(retrieval_ranks(q, g, test.ids[source], test.ids[target]))
        self.query_units.append(units)
        self.cosines.append(torch.cosine_similarity(produced[i], gallery[j]))
        self.pair_units.append(units[i])
        self.mmd2.append(mmd2(produced, gallery))
        self.frechet.append(frechet_distance(produced, gallery, shrinkage="ledoit-wolf"))
        self.gallery.append(len(gallery))
        self.produced.append(produced)
        self.produced_ids.append(test.ids[source])
        self.true.append(gallery)
        self.true_ids.append(test.ids[target])

    def best(self) -> Tensor:
        """1-based ranks of all queries."""
        return torch.cat([r.best for r in self.ranks])

    def manifold(self) -> Record:
        """How near everything produced lies to everything true, over all folds; `MANIFOLD` names the figures."""
        x, y = torch.cat(self.produced), torch.cat(self.true)
        ids = torch.cat(self.produced_ids), torch.cat(self.true_ids)
        width = median_bandwidth(y)
        near = neighbour_precision_recall(x, y)
        accuracy = [classifier_accuracy(x, y, *ids, seed=seed) for seed in range(3)]
        return {
            **{f"mmd2_{scale:g}": 1000 * mmd2(x, y, scale * width) for scale in (0.5, 1, 2)},
            "frechet": frechet_distance(x, y, shrinkage="ledoit-wolf"),
            "precision": near.precision,
            "recall": near.recall,
            "accuracy": sum(accuracy) / len(accuracy),
        }


def summarise(by_seed: Mapping[int, Pool], counts: Tensor) -> tuple[Record, Tensor]:
    """The record of one method and direction, and its R@1 in every bootstrap draw."""
    pools = list(by_seed.values())
    first = pools[0]
    ranks = [RetrievalRanks(p.best(), torch.cat([r.average_precision_at_10 for r in p.ranks])) for p in pools]
    summaries = [retrieval_summary(r) for r in ranks]
    hits = torch.stack([(r.best <= 1).double() for r in ranks]).mean(0)
    cosine = torch.stack([torch.cat(p.cosines).double() for p in pools]).mean(0)
    draws = resampled_means(hits, torch.cat(first.query_units), counts)
    distances = {k: torch.tensor([getattr(p, k) for p in pools]).mean().item() for k in ("mmd2", "frechet")}
    return {
        **{key: sum(s[key] for s in summaries) / len(summaries) for key in summaries[0]},
        "r1_ci": interval(draws),
        "cosine": float(cosine.mean()),
        "cosine_ci": interval(resampled_means(cosine, torch.cat(first.pair_units), counts)),
        **distances,
        "manifold": mean_of([p.manifold() for p in pools]),
        "n_query": len(hits),
        "n_gallery": round(sum(first.gallery) / len(first.gallery)),
        "seed": list(by_seed) if len(by_seed) > 1 else next(iter(by_seed)),
        "r1_by_seed": [s["r1"] for s in summaries],
    }, draws


MANIFOLD = {
    "mmd2_0.5": "MMD2x1000, half bandwidth",
    "mmd2_1": "median bandwidth",
    "mmd2_2": "double",
    "frechet": "Frechet",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "classifier",
}


def mean_of(records: list[Record]) -> Record:
    return {k: sum(r[k] for r in records) / len(records) for k in records[0]}


def format_manifold(records: list[Record]) -> str:
    """Cosine and the distances of distributions of each method, one block a direction."""
    blocks = []
    for direction in dict.fromkeys(r["direction"] for r in records):
        lines = [["produced, " + direction.replace("_", " "), "cosine", *MANIFOLD.values()]]
        for r in (r for r in records if r["direction"] == direction):
            lines.append([r["method"], f"{r['cosine']:.3f}", *(f"{r['manifold'][k]:.3f}" for k in MANIFOLD)])
        width = [max(map(len, column)) for column in zip(*lines, strict=True)]
        blocks.append("\n".join("  ".join(c.rjust(w) for c, w in zip(line, width, strict=True)) for line in lines))
    return "\n\n".join(blocks)


def with_units(table: EmbeddingTable, unit: str) -> EmbeddingTable:
    """Number what the bootstrap resamples: ids, or single rows."""
    for m, ids in table.ids.items():
        numbers = torch.unique(ids, return_inverse=True)[1] if unit == "id" else torch.arange(len(ids))
        table.columns[f"{m}_unit"] = numbers.numpy()
    return table


def cross_validate(
    table: EmbeddingTable,
    directions: list[Direction],
    methods: Mapping[str, tuple[Fit, list[int]]],
    bootstrap: int,
    altered: Mapping[str, EmbeddingTable] | None = None,
) -> dict[str, list[Record]]:
    """One record a method and direction, for the table itself (`""`) and every altered one.

    Args:
        table: With columns `<modality>_fold` and `<modality>_unit`.
        directions: Ordered (source, target) pairs to measure.
        methods: Name -> how it is fitted, and with which seeds.
        bootstrap: Replicates.
        altered: Condition -> the same rows, altered; only measured on.
    """
    tables = {"": table, **(altered or {})}
    keys = [(c, name, d) for c in tables for name in methods for d in directions]
    pools = {key: {s: Pool() for s in methods[key[1]][1]} for key in keys}
    folds = list(zip(*map(splits, tables.values()), strict=True))
    tasks = [(fold, name, s) for fold in folds for name, (_, seeds) in methods.items() for s in seeds]
    for fold, name, seed in tqdm(tasks, desc="fits", disable=None):
        model = methods[name][0](fold[0][0], seed)
        for condition, (_, test) in zip(tables, fold, strict=True):
            for direction in directions:
                pools[condition, name, direction][seed].add(model, test, direction)
    found: dict[str, list[Record]] = {}
    for condition in tables:
        records, draws = [], []
        for direction in directions:
            num_units = int(table.columns[f"{direction[0]}_unit"].max()) + 1
            counts = resample_counts(num_units, bootstrap, torch.Generator().manual_seed(0))
            for name in methods:
                record, draw = summarise(pools[condition, name, direction], counts)
                records.append({"method": name, "direction": "_to_".join(direction), **record})
                draws.append(draw)
        compare_with_best(records, draws)
        found[condition] = records
    return found


def compare_with_best(records: list[Record], draws: list[Tensor]) -> None:
    """Add each record's R@1 minus that of the best bridge in its direction, and the paired interval."""
    for direction in {r["direction"] for r in records}:
        own = [k for k, r in enumerate(records) if r["direction"] == direction]
        best = max(
            (k for k in own if records[k]["method"] != "diffgap"), key=lambda k: records[k]["r1"], default=own[0]
        )
        for k in own:
            records[k]["best_bridge"] = records[best]["method"]
            records[k]["r1_minus_best_bridge"] = records[k]["r1"] - records[best]["r1"]
            records[k]["r1_minus_best_bridge_ci"] = interval(draws[k] - draws[best])


def chosen_methods(names: list[str] | None, reference: bool, seeds: list[int]) -> dict[str, tuple[Fit, list[int]]]:
    """Name -> (fit, seeds); what draws nothing is fitted once."""
    known = {
        name: (partial(fit_bridge, make), seeds if takes_seed(make) else seeds[:1])
        for name, make in (REFERENCE if reference else METHODS).items()
    }
    if not reference:
        known["diffgap"] = fit_refiner, seeds
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"--methods: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    return {name: method for name, method in known.items() if name in (names or known)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the records there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of methods that draw anything")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--reference", action="store_true", help="closed forms of fixed settings instead")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates of the intervals")
    options = parser.parse_args()
    methods = chosen_methods(options.methods, options.reference, options.seeds)
    records: list[Record] = []
    for name in options.datasets:
        path = options.data / f"{name}.npz"
        if not path.is_file():
            print(f"{path}: not found, left out")
            continue
        directions, unit = DATASETS[name]
        altered = {p.stem.removeprefix(f"{name}_"): p for p in sorted(options.data.glob(f"{name}_*.npz"))}
        found = cross_validate(
            with_units(EmbeddingTable.read(path), unit),
            directions,
            methods,
            options.bootstrap,
            {c: with_units(EmbeddingTable.read(p), unit) for c, p in altered.items()},
        )
        for condition, rows in found.items():
            title = f"{name} {condition}".strip()
            print(f"\n{title}, candidates a fold\n{format_table(rows)}\n", flush=True)
            if not condition:
                print(f"{format_manifold(rows)}\n", flush=True)
            records += [{"dataset": title, **r} for r in rows]
    if not records:
        raise SystemExit(f"{options.data}: holds none of {', '.join(f'{n}.npz' for n in options.datasets)}")
    print("\n".join(HOW_TO_READ[:-1]))
    if options.json:
        print(f"wrote {write_json(options.json, records)}")


if __name__ == "__main__":
    main()
