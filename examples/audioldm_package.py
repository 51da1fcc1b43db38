"""A refiner in the `audioldm` package: `text_to_audio` without and with it.

    python examples/audioldm_package.py REFINER_FOLDER audioldm-s-full.ckpt "a dog barks in the rain"

REFINER_FOLDER was written by `diffgap fit` on embeddings of LAION-CLAP, which the package uses. Needs
pip install 'diffgap-lightning[audioldm]', best in an environment of its own: the package pins an old numpy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile
import torch
import yaml
from audioldm import text_to_audio

from diffgap_lightning import DiffGAPRefiner
from diffgap_lightning.integrations import attach
from diffgap_lightning.integrations.audioldm import load_audioldm, repaired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("refiner")
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--model-name", default="audioldm-s-full")
    parser.add_argument(
        "--config", help="YAML file with the package's configuration; default: that of the model's name"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()

    model = load_audioldm(
        options.checkpoint, options.model_name, device="cuda" if torch.cuda.is_available() else "cpu",
        config=yaml.safe_load(Path(options.config).read_text()) if options.config else None,
    )  # fmt: skip
    refiner = DiffGAPRefiner.from_pretrained(options.refiner)

    def generate(name: str) -> None:
        audio = text_to_audio(model, options.prompt, seed=0, ddim_steps=options.steps, duration=options.seconds)
        soundfile.write(name, audio[0, 0], 16000)
        print(f"{name}: {audio.shape[-1] / 16000:.2f} s")

    with repaired(model):  # the package as it is, but off CUDA too and without dropped prompts
        generate("plain.wav")
    with attach(refiner, model):
        generate("refined.wav")


if __name__ == "__main__":
    main()
