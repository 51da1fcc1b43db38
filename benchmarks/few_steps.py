"""What few sampler steps cost: cosine to the true audio and distance to real audio against `num_steps`.

    python benchmarks/few_steps.py --pairs 600000 --max-pairs 400000      an untrained refiner: its closed forms
    python benchmarks/few_steps.py --refiner runs/large/refiner           a trained one, of the same world

On the synthetic world, text to audio. The restored ridge map stands first. "start" is the transported posterior mean
itself, which takes no step; the other rows noise it back to time `strength` and denoise in 1, 2, 4, 10 or 50 steps,
with the same noise. At strength 1 they sample the posterior from pure noise. Microseconds: CPU time of a row in batches
of 64.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from diffgap_lightning.bridges import RestoredRidgeBridge
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.refiner import DiffGAPRefiner
from large_data import training_rows

DIRECTION = {"source": "text", "target": "audio"}
STEPS, STRENGTHS = (1, 2, 4, 10, 50), (0.1, 0.2, 0.4, 1.0)


def measure(produced: Tensor, audio: Tensor) -> dict[str, float]:
    """Faithfulness and realism."""
    return {
        "cosine": float((produced * audio).sum(1).mean()),
        "mmd2": mmd2(produced, audio),
        "frechet": frechet_distance(produced, audio, "ledoit-wolf"),
    }


def microseconds(refiner: DiffGAPRefiner, text: Tensor, **options: Any) -> float:
    """CPU time of a row."""
    batches = text[:512].split(64)
    refiner.refine(batches[0], **options)
    begun = time.process_time()
    for batch in batches:
        refiner.refine(batch, **options)
    return 1e6 * (time.process_time() - begun) / len(text[:512])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refiner", type=Path, help="a folder; default: measured on --pairs, untrained")
    parser.add_argument("--pairs", type=int, default=20_000, help="training pairs of the synthetic world")
    parser.add_argument("--max-pairs", type=int, default=400_000, help="on which a refiner is measured")
    parser.add_argument("--rows", type=int, default=4000, help="test rows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the records there")
    options = parser.parse_args()
    world = SyntheticWorld()
    test = world.sample(options.rows, seed=7)
    rows = training_rows(world, options.pairs)
    ids = {m: torch.arange(len(x)) for m, x in rows.items()}
    ridge = RestoredRidgeBridge(blend=0.0).fit(rows, ids)
    records: list[dict[str, Any]] = []

    def add(name: str, produced: Tensor, **more: float) -> None:
        records.append({"method": name, **measure(produced, test.audio), **more})
        r = records[-1]
        print(
            f"{name:28}  cosine {r['cosine']:.4f}  MMD^2 x 1000 {1000 * r['mmd2']:6.2f}  Frechet {r['frechet']:.4f}"
            + (f"  {r['refine_us']:7.0f} us" if "refine_us" in r else ""), flush=True,
        )  # fmt: skip

    add("restored ridge", ridge.refine(test.text, **DIRECTION))
    if options.refiner:
        refiner = DiffGAPRefiner.from_pretrained(options.refiner)
    else:
        some = [{m: x[: options.max_pairs] for m, x in part.items()} for part in (rows, ids)]
        refiner = DiffGAPRefiner.measure(*some, max_pairs=options.max_pairs)
    del rows
    for strength, steps in [(0.0, 1), *((s, n) for s in STRENGTHS for n in STEPS)]:
        how = {**DIRECTION, "start": "posterior_mean", "strength": strength, "num_steps": steps}
        produced = refiner.refine(test.text, generator=torch.Generator().manual_seed(0), **how)
        name = "start" if strength == 0 else f"strength {strength:g}, {steps} steps"
        add(name, produced, refine_us=microseconds(refiner, test.text, **how))
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
