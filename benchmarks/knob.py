"""The trade-off knob: cosine to the true audio against the distance to real audio, as curves beside the bridges.

    diffgap fit --config configs/quickstart.yaml
    python benchmarks/knob.py --refiner runs/quickstart/refiner --picture docs/tradeoff.png
    python benchmarks/knob.py --pairs 20000            an untrained refiner: the closed forms' own knob

Curves of one refiner on the synthetic world, text to audio:
    strength    the posterior-mean start, noised ever further back: 0 is the start itself, 1 pure noise
    samples     mean direction of n samples from pure noise: from a draw of the posterior to its mean
    guidance    from pure noise, the condition overstated
    source      the centred input instead of the posterior mean, noised ever further back
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from diffgap_lightning.bridges import CentreBridge, IdentityBridge, ProcrustesBridge, RestoredRidgeBridge, RidgeBridge
from diffgap_lightning.data import SyntheticDataModule
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.refiner import DiffGAPRefiner

DIRECTION = {"source": "text", "target": "audio"}
CURVES: dict[str, tuple[str, list[float]]] = {
    "strength": ("from the posterior mean, strength", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0]),
    "samples": ("from noise, mean of n samples", [1, 2, 4, 8, 16, 32]),
    "guidance": ("from noise, guidance", [1.0, 1.5, 2.0, 3.0, 4.0]),
    "source": ("from the centred input, strength", [0.0, 0.2, 0.4, 0.6]),
}
BRIDGES = {
    "raw": IdentityBridge,
    "centre": CentreBridge,
    "ridge": RidgeBridge,
    "restored ridge": RestoredRidgeBridge,
    "Procrustes": ProcrustesBridge,
    "optimal transport": lambda: RestoredRidgeBridge(restore="transport", blend=0.0),
}


def produce(refiner: DiffGAPRefiner, text: Tensor, curve: str, value: float) -> Tensor:
    """Audio-like rows at one setting of the knob."""
    generator = torch.Generator().manual_seed(0)
    if curve in ("strength", "source"):
        start = "posterior_mean" if curve == "strength" else "source"
        return refiner.refine(text, strength=value, start=start, generator=generator, **DIRECTION)
    if curve == "guidance":
        return refiner.refine(text, strength=1.0, guidance_scale=value, generator=generator, **DIRECTION)
    samples = refiner.refine(text, strength=1.0, num_samples=int(value), generator=generator, **DIRECTION)
    return samples if value == 1 else torch.nn.functional.normalize(samples.mean(1), dim=1)


def measure(produced: Tensor, audio: Tensor) -> dict[str, float]:
    """Faithfulness and realism."""
    return {
        "cosine": float((produced * audio).sum(1).mean()),
        "mmd2": mmd2(produced, audio),
        "frechet": frechet_distance(produced, audio, "ledoit-wolf"),
    }


def draw(records: list[dict[str, Any]], floor: float, path: Path) -> None:
    """The curves, the bridges as crosses, and the distance of two halves of real audio as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=130)
    for curve, (title, _) in CURVES.items():
        found = [r for r in records if r["curve"] == curve]
        (line,) = axes.plot([r["cosine"] for r in found], [r["frechet"] for r in found], "o-", ms=4, label=title)
        for r in (found[0], found[-1]):
            if r["cosine"] < 0.5:
                continue  # three curves meet at one sample from noise
            where = (r["cosine"], r["frechet"])
            axes.annotate(f"{r['value']:g}", where, (5, -10), textcoords="offset points", color=line.get_color())
    for r in records:
        if r["curve"] == "bridge":
            axes.plot(r["cosine"], r["frechet"], "kx")
            left = r["cosine"] > 0.6  # where the curves lie to the right
            offset, side = ((-6, -3), "right") if left else ((6, -3), "left")
            where = (r["cosine"], r["frechet"])
            axes.annotate(r["value"], where, offset, textcoords="offset points", ha=side, fontsize=9)
    axes.axhline(floor, color="0.6", lw=1, ls=":", label="real audio against real audio")
    axes.set(xlabel="cosine to the true audio (more is better)", ylabel="Fréchet distance to real audio", yscale="log")
    ticks = [0.02, 0.03, 0.05, 0.1, 0.2, 0.4]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.margins(x=0.06)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refiner", type=Path, help="a folder; default: measured on --pairs, untrained")
    parser.add_argument("--pairs", type=int, default=20_000, help="training pairs of the synthetic world")
    parser.add_argument("--rows", type=int, default=2000, help="test rows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the records there")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw the curves there")
    options = parser.parse_args()
    data = SyntheticDataModule(num_pairs=options.pairs, num_test=options.rows)
    data.setup()
    train, test = data.rows("train"), data.rows("test")
    if options.refiner:
        refiner = DiffGAPRefiner.from_pretrained(options.refiner)
    else:
        refiner = DiffGAPRefiner.measure(train.embeddings, train.ids)
    text, audio = test.embeddings["text"], test.embeddings["audio"]
    settings: list[tuple[str, Any]] = [(c, v) for c, (_, values) in CURVES.items() for v in values]
    records: list[dict[str, Any]] = []
    for curve, value in [*settings, *(("bridge", name) for name in BRIDGES)]:
        if curve == "bridge":
            produced = BRIDGES[value]().fit(train.embeddings, train.ids).refine(text, **DIRECTION)
        else:
            produced = produce(refiner, text, curve, value)
        records.append({"curve": curve, "value": value, **measure(produced, audio)})
        r = records[-1]
        print(
            f"{curve} {value}: cosine {r['cosine']:.4f}, MMD^2 x 1000 {1000 * r['mmd2']:.2f}, "
            f"Frechet {r['frechet']:.4f}", flush=True,
        )  # fmt: skip
    half = len(audio) // 2
    floor = frechet_distance(audio[:half], audio[half:], "ledoit-wolf")
    print(f"real audio, half against half: Frechet {floor:.4f}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        draw(records, floor, options.picture)


if __name__ == "__main__":
    main()
