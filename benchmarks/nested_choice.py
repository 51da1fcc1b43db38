"""What the recipe for few pairs reaches where its choices never see a test fold: nested cross-validation.

    python benchmarks/nested_choice.py DATA_DIR

Two settings of configs/table.yaml are chosen anew for every outer fold and seed, from inner folds of its training rows
(each of them held out in turn, `diffgap fit` on the others):

    give back   whether the closed forms get the validation rows where the network shows no clear gain, or the trained
                network stays: the larger mean of the two fused R@1 on the inner folds
    strength    of the default start: the largest cosine of produced audio to true audio among those that put produced
                audio no farther from real audio than centring does, by all measures of `real_clap.MANIFOLD`;
                if none does, the largest strength

The recipe with the chosen settings then trains on all training rows and is measured on the outer fold, as in
`real_clap.py`, whose tables this prints; the altered audio is measured too. What was chosen is printed as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import real_clap
from diffgap_lightning.bridges import CentreBridge
from diffgap_lightning.cli.trainer import fit
from diffgap_lightning.data import EmbeddingTable
from diffgap_lightning.evaluation.comparison import Method
from diffgap_lightning.evaluation.report import format_table, write_json
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.callbacks import GiveBackValidation, SaveRefiner

STRENGTHS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
DIRECTIONS = [("text", "audio"), ("audio", "text")]
MORE_IS_BETTER = {"precision", "recall"}
CHOSEN: Counter[str] = Counter()


class GiveBackBoth(GiveBackValidation):
    """As its parent, but a copy of the trained refiner stays beside what is written in its place."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy, then go on."""
        saver = next(c for c in trainer.callbacks if isinstance(c, SaveRefiner))  # type: ignore[attr-defined]
        shutil.copytree(saver.path(trainer), saver.path(trainer).with_name("trained"))
        super().on_fit_end(trainer, pl_module)


def fit_both(table: EmbeddingTable, seed: int) -> dict[bool, DiffGAPRefiner]:
    """`diffgap fit --config configs/table.yaml`; whether rows are given back -> the refiner."""
    config = yaml.safe_load(real_clap.CONFIG.read_text(encoding="utf-8"))
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("GiveBackValidation"):
            callback["class_path"] = "nested_choice.GiveBackBoth"
    train, val = real_clap.hold_out(table, 0.2, seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        arguments = {
            "config": path,
            "data.path": train.write(Path(folder, "train.npz")),
            "data.val_path": val.write(Path(folder, "val.npz")),
            "data.test_fraction": 0,
            "seed_everything": seed,
            "model.seed": seed,
            "trainer.default_root_dir": Path(folder, "run"),
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
        }
        fit([f"--{name}={value}" for name, value in arguments.items()])
        names = {True: "refiner", False: "trained"}
        return {give: DiffGAPRefiner.from_pretrained(Path(folder, "run", name)) for give, name in names.items()}


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


def choose(table: EmbeddingTable, seed: int) -> tuple[bool, float]:
    """(give back, strength), from inner folds of these rows alone."""
    pools: dict[Any, real_clap.Pool] = {}
    for train, test in real_clap.splits(table):
        models: dict[Any, Method] = {"centre": CentreBridge().fit(train.embeddings, train.ids)}
        for give, refiner in fit_both(train, seed).items():
            models |= {(give, strength): AtStrength(refiner, strength) for strength in STRENGTHS}
        for name, model in models.items():
            for direction in DIRECTIONS:
                pools.setdefault((name, direction), real_clap.Pool()).add(model, test, direction)

    def r1(give: bool) -> float:
        return sum(float((pools[(give, STRENGTHS[0]), d].best() <= 1).double().mean()) for d in DIRECTIONS) / 2

    give = r1(True) >= r1(False)
    to_audio = DIRECTIONS[0]
    centre = pools["centre", to_audio].manifold()
    near = [s for s in STRENGTHS if no_farther(pools[(give, s), to_audio].manifold(), centre)]
    strength = max(near, key=lambda s: cosine(pools[(give, s), to_audio])) if near else STRENGTHS[-1]
    print(f"  inner R@1 given back {r1(True):.3f}, trained {r1(False):.3f}; strength {strength} of {near}", flush=True)
    return give, strength


def no_farther(found: real_clap.Record, centre: real_clap.Record) -> bool:
    """By every measure."""
    return all(found[k] >= centre[k] if k in MORE_IS_BETTER else found[k] <= centre[k] for k in real_clap.MANIFOLD)


def cosine(pool: real_clap.Pool) -> float:
    return float(sum(c.double().sum() for c in pool.cosines) / sum(len(c) for c in pool.cosines))


def fit_nested(table: EmbeddingTable, seed: int) -> Method:
    """Choose on inner folds, then train on all of these rows."""
    give, strength = choose(table, seed)
    CHOSEN[f"{'given back' if give else 'trained'}, strength {strength}"] += 1
    return AtStrength(fit_both(table, seed)[give], strength)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates of the intervals")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    path = options.data / "audiocaps_dev.npz"
    altered = {p.stem.removeprefix(f"{path.stem}_"): p for p in sorted(options.data.glob(f"{path.stem}_*.npz"))}
    bridges = real_clap.chosen_methods(["centre", "ridge", "restored", "cca"], False, options.seeds)
    found = real_clap.cross_validate(
        real_clap.with_units(EmbeddingTable.read(path), "id"),
        DIRECTIONS,
        {**bridges, "diffgap": (fit_nested, options.seeds)},
        options.bootstrap,
        {c: real_clap.with_units(EmbeddingTable.read(p), "id") for c, p in altered.items()},
    )
    for condition, rows in found.items():
        print(f"\naudiocaps_dev {condition}\n{format_table(rows)}\n")
        if not condition:
            print(f"{real_clap.format_manifold(rows)}\n")
    print("chosen:", "; ".join(f"{name}: {n}" for name, n in CHOSEN.most_common()))
    if options.json:
        records = [{"dataset": f"audiocaps_dev {c}".strip(), **r} for c, rows in found.items() for r in rows]
        print(f"wrote {write_json(options.json, records)}")


if __name__ == "__main__":
    main()
