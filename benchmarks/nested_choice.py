"""What the recipe for few pairs reaches where its choices never see a test fold: nested cross-validation.

    python benchmarks/nested_choice.py DATA_DIR --inner inner.json

An hour on one core; the inner folds' figures are kept in `--inner`, and those that are there are not made again.

Two settings of configs/table.yaml are chosen anew for every outer fold, from inner folds of its training rows (each of
them held out in turn, `diffgap fit` on the others, all seeds):

    give back   whether the closed forms get the validation rows where the network shows no clear gain, or the trained
                network stays: the larger mean of the two fused R@1
    strength    of the default start: as few as possible of the measures of `real_clap.MANIFOLD` on which audio produced
                from captions is farther from real audio than centring puts it; among equals, the largest cosine. A
                squared distance estimated below 0 counts as 0: how far below is the estimator's noise

The recipe with the chosen settings then trains on all training rows and is measured on the outer fold, as in
`real_clap.py`, whose tables this prints; the altered audio is measured too. What was chosen, and why, is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import real_clap
from diffgap_lightning.bridges import CentreBridge
from diffgap_lightning.data import EmbeddingTable
from diffgap_lightning.evaluation.comparison import Method
from diffgap_lightning.evaluation.report import format_table, write_json
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.callbacks import GiveBackValidation, SaveRefiner

STRENGTHS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
DIRECTIONS = [("text", "audio"), ("audio", "text")]
NAMES = {"given back": "refiner", "trained": "trained"}  # and the folder in that of the run
MORE_IS_BETTER = {"precision", "recall"}


class GiveBackBoth(GiveBackValidation):
    """As its parent, but a copy of the trained refiner stays beside what is written in its place."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy, then go on."""
        saver = next(c for c in trainer.callbacks if isinstance(c, SaveRefiner))  # type: ignore[attr-defined]
        shutil.copytree(saver.path(trainer), saver.path(trainer).with_name("trained"))
        super().on_fit_end(trainer, pl_module)


def fit_both(table: EmbeddingTable, seed: int) -> dict[str, DiffGAPRefiner]:
    """`diffgap fit --config configs/table.yaml`: what it leaves, and the trained refiner before rows are given back."""
    config = yaml.safe_load(real_clap.CONFIG.read_text(encoding="utf-8"))
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("GiveBackValidation"):
            callback["class_path"] = "nested_choice.GiveBackBoth"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        run = real_clap.run_fit(table, seed, Path(folder), path)
        return {name: DiffGAPRefiner.from_pretrained(run / sub) for name, sub in NAMES.items()}


class AtStrength:
    """A refiner with another default strength; its score does not depend on it."""

    def __init__(self, refiner: DiffGAPRefiner, strength: float) -> None:
        self.refiner, self.strength = refiner, strength

    def refine(self, x: Tensor, **options: Any) -> Tensor:
        """From its own start, noised as far as `strength` says."""
        return self.refiner.refine(x, strength=self.strength, start="posterior_mean", **options)

    def score_features(self, x: Tensor, **options: Any) -> Tensor:
        """The refiner's."""
        return self.refiner.score_features(x, **options)


def inner_figures(table: EmbeddingTable, seeds: list[int]) -> dict[str, real_clap.Record]:
    """Of centring and of every choice, "given back" or "trained" with a strength: means over seeds, inner folds pooled.

    `r1` is fused, the mean of both directions; the others are of audio produced from captions.
    """
    pools: dict[str, dict[int, tuple[real_clap.Pool, real_clap.Pool]]] = {}
    for train, test in real_clap.splits(table):
        for seed in seeds:
            models: dict[str, Method] = {"centre": CentreBridge().fit(train.embeddings, train.ids)}
            for name, refiner in fit_both(train, seed).items():
                models |= {f"{name} {strength}": AtStrength(refiner, strength) for strength in STRENGTHS}
            for name, model in models.items():
                both = pools.setdefault(name, {}).setdefault(seed, (real_clap.Pool(), real_clap.Pool()))
                for pool, direction in zip(both, DIRECTIONS, strict=True):
                    pool.add(model, test, direction)
    return {
        name: real_clap.mean_of(
            [
                {
                    "r1": sum(float((p.best() <= 1).double().mean()) for p in both) / 2,
                    "cosine": float(torch.cat(both[0].cosines).mean()),
                    **both[0].manifold(),
                }
                for both in by_seed.values()
            ]
        )
        for name, by_seed in pools.items()
    }


def choose(figures: dict[str, real_clap.Record]) -> tuple[str, float]:
    """(given back or trained, strength)."""
    for name, found in figures.items():
        farther = num_farther(found, figures["centre"])
        print(f"  {name:16}", ", ".join(f"{k} {v:.3f}" for k, v in found.items()), f"farther by {farther}", flush=True)
    kept = max(NAMES, key=lambda name: figures[f"{name} {STRENGTHS[0]}"]["r1"])
    by_strength = {s: figures[f"{kept} {s}"] for s in STRENGTHS}
    return kept, min(
        STRENGTHS, key=lambda s: (num_farther(by_strength[s], figures["centre"]), -by_strength[s]["cosine"])
    )


def num_farther(found: real_clap.Record, centre: real_clap.Record) -> int:
    """Measures by which it is farther from the real rows."""
    return sum(
        found[k] < centre[k] if k in MORE_IS_BETTER else max(found[k], 0) > max(centre[k], 0)
        for k in real_clap.MANIFOLD
    )


def nested(seeds: list[int], kept: Path | None) -> real_clap.Fit:
    """A method that chooses on inner folds, once for all seeds, then trains on all of the rows that it is given."""
    known = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.is_file() else {}
    chosen: dict[str, tuple[str, float]] = {}

    def fit_nested(table: EmbeddingTable, seed: int) -> Method:
        left_out = sorted(set(range(5)) - set(table.columns["audio_fold"].tolist()))
        fold = f"fold {left_out[0]}"
        if fold not in known:
            known[fold] = inner_figures(table, seeds)
            if kept is not None:
                kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        if fold not in chosen:
            print(f"inner folds of all but {fold}")
            chosen[fold] = choose(known[fold])
            print(f"chosen: {chosen[fold][0]}, strength {chosen[fold][1]}", flush=True)
        name, strength = chosen[fold]
        return AtStrength(fit_both(table, seed)[name], strength)

    return fit_nested


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates of the intervals")
    parser.add_argument("--inner", type=Path, metavar="PATH", help="keep the inner folds' figures there")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    path = options.data / "audiocaps_dev.npz"
    altered = {p.stem.removeprefix(f"{path.stem}_"): p for p in sorted(options.data.glob(f"{path.stem}_*.npz"))}
    bridges = real_clap.chosen_methods(["centre", "ridge", "restored", "cca"], False, options.seeds)
    found = real_clap.cross_validate(
        real_clap.with_units(EmbeddingTable.read(path), "id"),
        DIRECTIONS,
        {**bridges, "diffgap": (nested(options.seeds, options.inner), options.seeds)},
        options.bootstrap,
        {c: real_clap.with_units(EmbeddingTable.read(p), "id") for c, p in altered.items()},
    )
    for condition, rows in found.items():
        print(f"\naudiocaps_dev {condition}\n{format_table(rows)}\n")
        if not condition:
            print(f"{real_clap.format_manifold(rows)}\n")
    if options.json:
        records = [{"dataset": f"audiocaps_dev {c}".strip(), **r} for c, rows in found.items() for r in rows]
        print(f"wrote {write_json(options.json, records)}")


if __name__ == "__main__":
    main()
