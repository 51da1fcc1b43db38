"""What `strength` trades: cosine to the true audio against the distance to real audio, for an untrained refiner.

    python benchmarks/knob.py [--pairs 20000] [--rows 2000] [--json PATH]

An untrained refiner samples from its closed-form Gaussian denoiser, so this shows the knob itself, not a training run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from diffgap_lightning.data import SyntheticDataModule
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.refiner import DiffGAPRefiner

SETTINGS: list[dict[str, Any]] = [
    {"start": "source", "strength": 0.0},
    {"start": "source", "strength": 0.3},
    *({"start": "posterior_mean", "strength": s} for s in (0.0, 0.1, 0.2, 0.4, 1.0)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="training pairs of the synthetic world")
    parser.add_argument("--rows", type=int, default=2000, help="test rows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the records there")
    options = parser.parse_args()
    data = SyntheticDataModule(num_pairs=options.pairs, num_test=options.rows)
    data.setup()
    train, test = data.rows("train"), data.rows("test")
    refiner = DiffGAPRefiner.measure(train.embeddings, train.ids)
    text, audio = test.embeddings["text"], test.embeddings["audio"]
    records: list[dict[str, Any]] = []
    for setting in SETTINGS:
        generator = torch.Generator().manual_seed(0)
        produced = refiner.refine(text, source="text", target="audio", generator=generator, **setting)
        cosine = float((produced * audio).sum(1).mean())
        distance = frechet_distance(produced, audio, shrinkage="ledoit-wolf")
        records.append({**setting, "cosine": cosine, "mmd2": mmd2(produced, audio), "frechet": distance})
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in records[-1].items())
        print(shown, flush=True)
    half = len(audio) // 2
    print(f"real audio, half against half: frechet {frechet_distance(audio[:half], audio[half:], 'ledoit-wolf'):.4f}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
