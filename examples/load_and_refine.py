"""Load a trained refiner and use it: needs torch, numpy and safetensors, no Lightning.

python examples/load_and_refine.py runs/example/refiner
"""

from __future__ import annotations

import argparse

import torch

from diffgap_lightning import DiffGAPRefiner
from diffgap_lightning.data import SyntheticWorld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("refiner", help="a folder written by training, e.g. runs/quickstart/refiner")
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()

    refiner = DiffGAPRefiner.from_pretrained(options.refiner)
    # Your own (N, D) unit rows from the encoder that the refiner was trained with would stand here.
    world = SyntheticWorld().sample(options.rows, seed=123)
    text, audio = world.text, world.audio

    # An audio-like embedding for every caption: what an audio generator should be conditioned on.
    generator = torch.Generator().manual_seed(0)
    refined = refiner.refine(text, source="text", target="audio", generator=generator)
    for name, rows in (("text", text), ("refined text", refined)):
        cosine = torch.cosine_similarity(rows, audio).mean()
        gap = (rows.mean(0) - audio.mean(0)).norm()
        print(f"{name:12s}  cosine to its audio {cosine:.3f}   distance between the centroids {gap:.3f}")

    # A better similarity for retrieval.
    truth = torch.arange(options.rows)
    for name, score in (
        ("cosine", text @ audio.T),
        ("score", refiner.score(text, audio, source="text", target="audio")),
    ):
        print(f"{name:12s}  text to audio R@1 {(score.argmax(1) == truth).float().mean():.3f}")


if __name__ == "__main__":
    main()
