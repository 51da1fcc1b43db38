"""A refiner in a text-to-audio pipeline of diffusers: the same prompt and noise, without and with it.

    python examples/add_refiner_to_audioldm.py REFINER_FOLDER --model cvssp/audioldm-s-full-v2 "a dog barks in the rain"

REFINER_FOLDER was written by `diffgap fit` on embeddings of the pipeline's own CLAP. A folder may stand for the model's
name. Needs pip install 'diffgap-lightning[diffusers]'.
"""

from __future__ import annotations

import argparse

import soundfile
import torch
from diffusers import AudioLDMPipeline

from diffgap_lightning import DiffGAPRefiner
from diffgap_lightning.integrations import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("refiner")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="cvssp/audioldm-s-full-v2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--strength", type=float, help="how far back refining starts; default: the refiner's")
    options = parser.parse_args()

    pipe = AudioLDMPipeline.from_pretrained(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    refiner = DiffGAPRefiner.from_pretrained(options.refiner)

    def generate(name: str) -> None:
        audio = pipe(
            options.prompt, num_inference_steps=options.steps, audio_length_in_s=options.seconds,
            generator=torch.Generator().manual_seed(0),
        ).audios[0]  # fmt: skip
        soundfile.write(name, audio, pipe.vocoder.config.sampling_rate)
        print(f"{name}: {len(audio) / pipe.vocoder.config.sampling_rate:.2f} s")

    generate("plain.wav")
    with attach(refiner, pipe, strength=options.strength):
        generate("refined.wav")


if __name__ == "__main__":
    main()
