"""The paper's ablation, {regression, CDM} x {joint, BST}, and the module's other choices one at a time.

    python benchmarks/ablation.py world --pairs 20000              the synthetic world, three seeds
    python benchmarks/ablation.py DATA_DIR/audiocaps_dev.npz       an embedding table with columns `<modality>_fold`

Each row of the table is one overlay of `configs/ablation/` over `configs/quickstart.yaml` (the world) or
`configs/table.yaml`; all see the same pairs, validation rows, seeds and number of epochs or steps, and each keeps the
weights of its best validation. Under `joint` every row trains both directions, so a step does twice the work of BST's.

Columns, text to audio and audio to text averaged
    R@1        of the fused score; `network` R@1 of what the networks add to it alone (forward + backward)
    mean       cosine of the unsampled posterior mean to the true embedding
    cosine, MMD^2 x 1000, Frechet    of `refine` at its defaults; `noise:` the same from pure noise
    gain       of `network` R@1 over cdm_bst, the mean over seeds and folds and a 95 % interval over ids, paired
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml

from diffgap_lightning.cli.trainer import fit
from diffgap_lightning.data import EmbeddingTable, SyntheticDataModule
from diffgap_lightning.evaluation.bootstrap import interval, resample_counts, resampled_means
from diffgap_lightning.evaluation.report import write_json
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.retrieval import retrieval_ranks
from diffgap_lightning.refiner import DiffGAPRefiner
from real_clap import hold_out, splits, with_units

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE = "cdm_bst"
FIRST = ("regression_joint", "regression_bst", "cdm_joint", BASE)
SAMPLED = {"": {}, "noise: ": {"strength": 1.0}}


def names() -> list[str]:
    """The overlays, the paper's four first."""
    return [*FIRST, *sorted(p.stem for p in (CONFIGS / "ablation").glob("*.yaml") if p.stem not in FIRST)]


def fit_overlay(base: str, name: str, train: EmbeddingTable, val: EmbeddingTable, seed: int, more: list[str]) -> Any:
    """`diffgap fit` with both configurations; returns the refiner."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        values = {
            "data.path": train.write(Path(folder, "train.npz")),
            "data.val_path": val.write(Path(folder, "val.npz")),
            "data.test_fraction": 0,
            "seed_everything": seed,
            "model.seed": seed,
            "trainer.default_root_dir": folder,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
        }
        if base != "table":
            values = {"data": "diffgap_lightning.data.EmbeddingDataModule", **values}
        # What is measured are networks: no callback may leave them out.
        config = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text(encoding="utf-8"))
        callbacks = config["trainer"]["callbacks"]
        config["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith("GiveBackValidation")]
        whole = Path(folder, "base.yaml")
        whole.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        files = [f"--config={whole}", f"--config={CONFIGS / 'ablation' / name}.yaml"]
        fit([*files, *(f"--{k}={v}" for k, v in values.items()), *more])
        return DiffGAPRefiner.from_pretrained(Path(folder, "refiner"))


class Figures:
    """Values of one overlay over folds and seeds: per query with its id, or one a fit."""

    def __init__(self) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.units: dict[str, list[torch.Tensor]] = {}
        self.means: dict[str, list[float]] = {}

    def add(self, name: str, values: torch.Tensor, units: torch.Tensor) -> None:
        """Add one value a query."""
        self.rows.setdefault(name, []).append(values.double())
        self.units.setdefault(name, []).append(units)

    def measure(self, refiner: DiffGAPRefiner, test: EmbeddingTable) -> None:
        """Add what one refiner does on test rows."""
        pair = refiner.config.pairs[0]
        parts = {m: refiner.components(test.embeddings[m], modality=m, pair=pair) for m in pair}
        network = {m: torch.cat([p["forward"], p["backward"]], dim=1) for m, p in parts.items()}
        fused = {
            m: refiner.score_features(test.embeddings[m], modality=m, source=pair[0], target=pair[1]) for m in pair
        }
        for source, target in (pair, pair[::-1]):
            query, gallery, ids = test.embeddings[source], test.embeddings[target], test.ids[source]
            for name, features in (("R@1", fused), ("network", network)):
                ranks = retrieval_ranks(features[source], features[target], ids, test.ids[target])
                self.add(name, ranks.best <= 1, ids)
            i, j = pair_indices(ids, test.ids[target])
            mean = refiner.space.decode(
                refiner.cdm_of(source, target).posterior_mean(refiner.space.encode(query, source)).detach(), target
            )
            self.add("mean", torch.cosine_similarity(mean[i], gallery[j]), ids[i])
            for prefix, options in SAMPLED.items():
                generator = torch.Generator().manual_seed(0)
                out = refiner.refine(query, source=source, target=target, generator=generator, **options)
                self.add(f"{prefix}cosine", torch.cosine_similarity(out[i], gallery[j]), ids[i])
                self.means.setdefault(f"{prefix}MMD^2", []).append(1000 * mmd2(out, gallery))
                self.means.setdefault(f"{prefix}Frechet", []).append(frechet_distance(out, gallery, "ledoit-wolf"))

    def draws(self, name: str, counts: torch.Tensor) -> torch.Tensor:
        """The mean in every bootstrap replicate."""
        return resampled_means(torch.cat(self.rows[name]), torch.cat(self.units[name]), counts)


COLUMNS = ("R@1", "network", "mean", "cosine", "MMD^2", "Frechet", "noise: cosine", "noise: MMD^2", "noise: Frechet")


def table_of(found: dict[str, Figures], replicates: int = 1000) -> tuple[str, list[dict[str, Any]]]:
    """The table as text, and its records."""
    num_ids = 1 + max(int(torch.cat(u).max()) for f in found.values() for u in f.units.values())
    counts = resample_counts(num_ids, replicates, torch.Generator().manual_seed(0))
    lines, records = [["", *COLUMNS, "gain over cdm_bst"]], []
    for name, figures in found.items():
        record: dict[str, Any] = {k: float(torch.cat(v).mean()) for k, v in figures.rows.items()}
        record |= {k: sum(v) / len(v) for k, v in figures.means.items()}
        gain = "-"
        if BASE in found and name != BASE:
            low, high = interval(figures.draws("network", counts) - found[BASE].draws("network", counts))
            middle = record["network"] - float(torch.cat(found[BASE].rows["network"]).mean())
            record |= {"gain": middle, "gain_ci": [low, high]}
            gain = f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append([name, *(f"{record[c]:.3f}" for c in COLUMNS), gain])
        records.append({"overlay": name, **record})
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(x, widths, strict=True)))
        for x in lines
    ]
    return "\n".join(text), records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="world", help="`world`, or an embedding table with folds")
    parser.add_argument("--pairs", type=int, default=20_000, help="training pairs of the world")
    parser.add_argument("--rows", type=int, default=1000, help="validation and test pairs of the world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--overlays", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--set", nargs="*", default=[], metavar="FLAG", help="of `diffgap fit`: trainer.max_epochs=4")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    if options.data == "world":
        data = SyntheticDataModule(options.pairs, num_val=options.rows, num_test=options.rows)
        data.setup()
        base, folds = "quickstart", [(data.rows("train"), data.rows("val"), data.rows("test"))]
    else:
        whole = with_units(EmbeddingTable.read(options.data), "id")
        base, folds = "table", [(*hold_out(train, 0.2, 0), test) for train, test in splits(whole)]
    found: dict[str, Figures] = {}
    for name in options.overlays:
        found[name] = Figures()
        for train, val, test in folds:
            for seed in options.seeds:
                found[name].measure(
                    fit_overlay(base, name, train, val, seed, [f"--{flag}" for flag in options.set]), test
                )
        print(table_of(found)[0].splitlines()[-1], flush=True)
    text, records = table_of(found)
    print(f"\n{text}")
    if options.json:
        print(f"wrote {write_json(options.json, records)}")


if __name__ == "__main__":
    main()
