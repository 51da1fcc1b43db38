"""Sound for a video from a text-to-audio generator that was never trained on video.

python examples/video_to_audio.py clip.mp4 --refiner runs/v2a/refiner --model audioldm-s-full-v2/ --encoder open-clip
"""

from __future__ import annotations

import argparse

from diffgap_lightning import DiffGAPRefiner
from diffgap_lightning.encoders import encoder_class
from diffgap_lightning.generation.loading import load_generator
from diffgap_lightning.integrations.video_to_audio import VideoToAudioPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--refiner", required=True, help="trained on (video, audio) pairs")
    parser.add_argument("--model", required=True, help="a folder of diffusers' AudioLDMPipeline")
    parser.add_argument("--encoder", default="open-clip", help="embeds video as the refiner was trained")
    parser.add_argument("--dim", type=int, help="of encoders that take it")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", default="with_sound.mp4")
    options = parser.parse_args()

    encoder = encoder_class(options.encoder)(**({"dim": options.dim} if options.dim else {}))
    refiner = DiffGAPRefiner.from_pretrained(options.refiner)
    pipeline = VideoToAudioPipeline(encoder, refiner, load_generator(options.model))
    sound = pipeline(options.video, seed=0, num_steps=options.steps)
    sound.save(options.out)
    seconds = len(sound.waveform) / sound.sample_rate
    print(f"{options.out}: {seconds:.2f} s of sound in {len(sound.starts)} windows")


if __name__ == "__main__":
    main()
