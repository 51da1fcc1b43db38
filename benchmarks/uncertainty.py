"""Is the uncertainty honest, and of use? Coverage, risk against rejection, and rows that are not of the space.

    python benchmarks/uncertainty.py --refiner runs/quickstart/refiner [--rows 2000] [--samples 64]
    python benchmarks/uncertainty.py [--pairs 20000]            an untrained refiner, measured on the world's pairs

On the synthetic world, text to audio:
    coverage     share of true targets above `lower_cosine`, at several levels; calibrated on other rows
    risk         mean cosine to the true target, and R@1 in a gallery of all rows, of all rows and of the surest halves
    novelty      share above 1: fresh rows, the other modality, another world's rows, noise, half precision
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from diffgap_lightning.data import SyntheticDataModule
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner.uncertainty import calibrated_level, coverage, uncertainty_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refiner", type=Path, help="a folder; default: measured, untrained")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    data = SyntheticDataModule(options.pairs, num_val=options.rows, num_test=options.rows)
    data.setup()
    train, val, test = (data.rows(split) for split in ("train", "val", "test"))
    if options.refiner:
        refiner = DiffGAPRefiner.from_pretrained(options.refiner)
    else:
        refiner = DiffGAPRefiner.measure(train.embeddings, train.ids)
    direction = {"source": "text", "target": "audio"}
    samples = {
        name: refiner.refine(
            table.embeddings["text"], strength=1.0, num_samples=options.samples, **direction,
            generator=torch.Generator().manual_seed(0),
        )
        for name, table in (("val", val), ("test", test))
    }  # fmt: skip
    audio = test.embeddings["audio"]
    for level in (0.5, 0.8, 0.9, 0.95):
        honest = calibrated_level(samples["val"], val.embeddings["audio"], level)
        found = [coverage(uncertainty_of(samples["test"], asked), audio) for asked in (level, honest)]
        print(f"level {level}: coverage {found[0]:.3f}, calibrated {found[1]:.3f} (asking for {honest:.3f})")
    doubt = uncertainty_of(samples["test"])
    cosine = torch.cosine_similarity(doubt.mean, audio)
    hit = refiner.score(test.embeddings["text"], audio, **direction).argmax(1) == torch.arange(len(audio))
    rank = torch.stack([doubt.expected_cosine, cosine]).argsort(1).argsort(1).float()
    print(f"expected cosine {doubt.expected_cosine.mean():.4f}, true {cosine.mean():.4f}")
    print(f"rank correlation of expected with true cosine {torch.corrcoef(rank)[0, 1]:.3f}")
    order = doubt.expected_cosine.argsort(descending=True)
    for share in (1.0, 0.5, 0.25, 0.1):
        kept = order[: round(share * len(order))]
        print(f"surest {share:.0%}: cosine {cosine[kept].mean():.3f}, R@1 {hit[kept].float().mean():.3f}")
    other = SyntheticWorld(seed=1).sample(options.rows, 5)
    noise = torch.nn.functional.normalize(torch.randn(audio.shape, generator=torch.Generator().manual_seed(0)), dim=1)
    text = test.embeddings["text"]
    blurred = torch.nn.functional.normalize(text + 0.1 * noise, dim=1)
    trials = {"fresh text": text, "in half precision": text.half().float(), "audio": audio, "noise": noise}
    trials |= {"another world's text": other.text, "text + .1 noise": blurred}
    for name, rows in trials.items():
        found = refiner.novelty(torch.nn.functional.normalize(rows, dim=1), modality="text")
        print(f"{name}: {(found > 1).float().mean():.4f} above 1, median {found.median():.3g}")


if __name__ == "__main__":
    main()
