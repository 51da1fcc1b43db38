"""What more pairs buy on the synthetic world: R@1 of a gallery of 1000 against the number of training pairs.

    python benchmarks/large_data.py --pairs 5000 50000 --json curve.json           about 10 minutes on one core
    python benchmarks/large_data.py --pairs 500000 1000000 --methods cca mixture --json curve.json      9 GB of memory
    python benchmarks/large_data.py --pairs 500000 --methods towers --tower-steps 3000 --json curve.json
    python benchmarks/large_data.py --pairs --json curve.json --plot docs/large_data.png

Records are added to those that the JSON file holds; a method and size that is there already is measured again. "towers"
are two networks trained on InfoNCE from random weights, "towers from cca" start at CCA; "diffgap" is an untrained
refiner: its closed forms, fused on 2000 other pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.bridges import CCABridge, MixtureBridge, MLPBridge, RestoredRidgeBridge
from diffgap_lightning.data.synthetic import SyntheticSample, SyntheticWorld
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.refiner import DiffGAPRefiner

Rows = dict[str, Tensor]
BRIDGES: dict[str, Callable[..., Any]] = {
    "cca": CCABridge,
    "restored": partial(RestoredRidgeBridge, blend=0.0),
    "towers": partial(MLPBridge, start="random", width=512, batch_size=1024),
    "towers from cca": partial(MLPBridge, width=512, batch_size=1024),
    "mixture": MixtureBridge,
    "mixture, transport": partial(MixtureBridge, restore="transport"),
}
METHODS = (*BRIDGES, "diffgap")
GALLERY, VALIDATION, CHUNK = 1000, 2000, 50_000


def training_rows(world: SyntheticWorld, pairs: int) -> Rows:
    """`pairs` pairs, drawn in chunks and kept in half precision where they are many."""
    dtype = torch.float16 if pairs > 200_000 else torch.float32
    rows = {m: torch.empty(pairs, len(world.offsets[0]), dtype=dtype) for m in ("audio", "text")}
    for k, start in enumerate(range(0, pairs, CHUNK)):
        sample = world.sample(min(CHUNK, pairs - start), seed=[8, k])
        rows["audio"][start : start + CHUNK] = sample.audio.to(dtype)
        rows["text"][start : start + CHUNK] = sample.text.to(dtype)
    return rows


def fit(name: str, rows: Rows, world: SyntheticWorld, blend: float, tower_steps: int | None) -> Any:
    """A fitted method."""
    ids = {m: torch.arange(len(x)) for m, x in rows.items()}
    if name.startswith("towers") and tower_steps:
        return BRIDGES[name](max_steps=tower_steps).fit(rows, ids)
    if name in BRIDGES:
        return BRIDGES[name]().fit(rows, ids)
    refiner = DiffGAPRefiner.measure(rows, ids, max_pairs=len(rows["text"]), blend=blend)
    held = world.sample(VALIDATION, seed=9)
    refiner.calibrate({"audio": held.audio, "text": held.text}, {m: torch.arange(VALIDATION) for m in rows})
    return refiner


def recalls(score: Tensor) -> tuple[float, float]:
    """R@1 by row and by column; the right answer is on the diagonal."""
    right = score.diagonal()
    return float((score > right[:, None]).any(1).logical_not().float().mean()), float(
        (score > right[None]).any(0).logical_not().float().mean()
    )


def measure(model: Any, test: SyntheticSample) -> dict[str, float]:
    """Retrieval both ways, and what text is refined to."""
    to_audio, to_text = recalls(model.score(test.text, test.audio, source="text", target="audio"))
    options = {} if not isinstance(model, DiffGAPRefiner) else {"start": "posterior_mean", "strength": 0.0}
    made = model.refine(test.text, source="text", target="audio", **options)
    return {
        "r1_text_to_audio": to_audio,
        "r1_audio_to_text": to_text,
        "cosine": float((made * test.audio).sum(1).mean()),
        "mmd2": mmd2(made, test.audio),
        "frechet": frechet_distance(made, test.audio, shrinkage="ledoit-wolf"),
    }


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """R@1, the mean of both directions, against the number of pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
    mean = {(r["method"], r["pairs"]): (r["r1_text_to_audio"] + r["r1_audio_to_text"]) / 2 for r in records}
    shown = [m for m in METHODS if m not in ("restored", "mixture, transport") and any(k[0] == m for k in mean)]
    for name, colour in zip(shown, colours, strict=False):
        points = sorted((pairs, value) for (method, pairs), value in mean.items() if method == name)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    optimum = [value for (method, _), value in mean.items() if method == "optimum"]
    if optimum:
        axes.axhline(optimum[0], color="0.4", linestyle="--", label="optimum (exact mutual information)")
    axes.set(xscale="log", xlabel="training pairs", ylabel=f"R@1 of {GALLERY}, mean of both directions", ylim=(0.4, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[5000, 50_000])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["cca", "towers", "mixture", "diffgap"])
    parser.add_argument("--blend", type=float, default=0.0, help="of the refiner: share of the centred source")
    parser.add_argument("--tower-steps", type=int, help="most steps of the towers; default: 20 epochs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="add the records there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw all records there")
    options = parser.parse_args()
    world = SyntheticWorld()
    test = world.sample(GALLERY, seed=7)
    known = options.json is not None and options.json.is_file()
    records = json.loads(options.json.read_text(encoding="utf-8")) if known else []
    best = recalls(world.pointwise_mutual_information(test.audio_latent, test.text_latent))
    found = [{"method": "optimum", "pairs": 0, "r1_text_to_audio": best[0], "r1_audio_to_text": best[1]}]
    for pairs in options.pairs:
        rows = training_rows(world, pairs)
        for name in options.methods:
            start = time.perf_counter()
            model = fit(name, rows, world, options.blend, options.tower_steps)
            seconds = time.perf_counter() - start
            found.append({"method": name, "pairs": pairs, "seconds": seconds, **measure(model, test)})
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found[-1].items()))
            new = {(r["method"], r["pairs"]) for r in found}
            records = [r for r in records if (r["method"], r["pairs"]) not in new] + found
            if options.json:  # after every measurement: a later one may take an hour
                options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(records or found, options.plot)


if __name__ == "__main__":
    main()
