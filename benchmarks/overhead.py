"""What a refiner costs beside the generator that it conditions: AudioLDM-S at its real size, with random weights.

    python benchmarks/overhead.py --steps 25 --seconds 10

The pipeline is diffusers' `AudioLDMPipeline` with the architecture of audioldm-s-full-v2, the refiner has its default
size (3 blocks x 512, both directions) and its default 10 sampler steps. Random weights cost what trained ones cost. The
time inside the refiner and that of the whole call are read in the same call: other load on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.integrations import attach
from diffgap_lightning.refiner import DiffGAPRefiner


def audioldm_s(folder: Path, device: str) -> Any:
    """The pipeline; its byte-level tokenizer pads to the same 512 tokens as the real one."""
    from diffusers import AudioLDMPipeline, AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        ClapTextConfig,
        ClapTextModelWithProjection,
        RobertaTokenizer,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), "Ġ", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=512)
    unet = UNet2DConditionModel(
        sample_size=128, in_channels=8, out_channels=8, block_out_channels=(128, 256, 384, 640), layers_per_block=2,
        attention_head_dim=8, cross_attention_dim=(128, 256, 384, 640),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=512, class_embeddings_concat=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(128, 256, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64, sampling_rate=16000, upsample_initial_channel=1024, upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4], normalize_before=False,
        )
    )  # fmt: skip
    pipe = AudioLDMPipeline(
        vae=vae.eval(), text_encoder=ClapTextModelWithProjection(ClapTextConfig()).eval(), tokenizer=tokenizer,
        unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), vocoder=vocoder.eval(),
    ).to(device)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def default_refiner(device: str) -> DiffGAPRefiner:
    """All 512 coordinates, default networks."""
    g = torch.Generator().manual_seed(0)
    rows = {m: normalize(torch.randn(6000, 512, generator=g), dim=1) for m in ("text", "audio")}
    return DiffGAPRefiner.measure(rows, dict.fromkeys(rows, torch.arange(6000)), rank="full").to(device)


class Stopwatch:
    """Stands for a refiner and sums up the time inside it."""

    def __init__(self, refiner: DiffGAPRefiner, device: str) -> None:
        self.refiner, self.device, self.seconds = refiner, device, 0.0

    def refine(self, embedding: Tensor, **options: Any) -> Tensor:
        """As the refiner's, timed."""
        start = self.now()
        out = self.refiner.refine(embedding, **options)
        self.seconds += self.now() - start
        return out

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--waveforms", type=int, default=1, help="for the one prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pipe = audioldm_s(Path(folder), options.device)
    size = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    watch = Stopwatch(default_refiner(options.device), options.device)
    own = sum(p.numel() for p in watch.refiner.cdm.parameters()) / 1e6
    print(f"AudioLDM-S, UNet {size:.0f} M; refiner {own:.1f} M; {options.device}, {torch.get_num_threads()} thread(s)")
    with attach(watch, pipe):
        pipe("a dog", num_inference_steps=1, audio_length_in_s=0.64)  # first calls allocate
        shares = []
        for _ in range(options.repeats):
            watch.seconds, start = 0.0, watch.now()
            pipe(
                "a dog barks in the rain", num_inference_steps=options.steps, audio_length_in_s=options.seconds,
                num_waveforms_per_prompt=options.waveforms,
            )  # fmt: skip
            total = watch.now() - start
            shares.append(watch.seconds / (total - watch.seconds))
            print(f"generator {total - watch.seconds:8.2f} s   refiner {1e3 * watch.seconds:7.1f} ms", flush=True)
    print(f"overhead at {options.steps} steps: {100 * sorted(shares)[len(shares) // 2]:.3f} % (median)")


if __name__ == "__main__":
    main()
