"""Tiny generators of the real classes with random weights: what tests of integrations run instead of gigabytes.

A byte-level tokenizer gives different prompts different tokens; every network has one or two layers. The contrastive
space has `DIM` dimensions. `from_folder` examples work too: `audioldm().save_pretrained(folder)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diffgap_lightning.refiner import DiffGAPRefiner

DIM = 32  # also the longest prompt in tokens: the pipelines pad the empty prompt to the embedding's width
SAMPLE_RATE = 16000
HOP = 4  # waveform samples a spectrogram frame, in the tiny vocoder


def refiner(dim: int = DIM, source: str = "text", seed: int = 0, **choices: Any) -> DiffGAPRefiner:
    """A refiner with networks that add something, measured on random rows of `source` and audio."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(200, 8, generator=g)
    rows = {
        m: torch.nn.functional.normalize(
            latent @ torch.randn(8, dim, generator=g) + torch.randn(dim, generator=g), dim=1
        )
        for m in (source, "audio")
    }
    ids = dict.fromkeys(rows, torch.arange(200))
    with torch.random.fork_rng(devices=[]):  # its networks' first weights come from the global generator
        torch.manual_seed(seed)
        made = DiffGAPRefiner.measure(rows, ids, **{"width": 16, "depth": 1, "rank": 6, **choices})
    for parameter in made.cdm.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return made


def byte_tokenizer(folder: Path, length: int = DIM) -> Any:
    """A real RoBERTa tokenizer whose tokens are bytes; its two files are written to `folder`."""
    from transformers import RobertaTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def _text_config() -> dict[str, Any]:
    return {
        "vocab_size": 261, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": DIM + 8, "projection_dim": DIM,
    }  # fmt: skip


def _clap() -> Any:
    """The joint text and audio model."""
    from transformers import ClapConfig, ClapModel

    audio = {
        "spec_size": 64, "window_size": 4, "num_mel_bins": 64, "patch_size": 4, "patch_stride": 4, "hidden_size": 32,
        "patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 2], "num_hidden_layers": 2,
        "projection_dim": DIM, "intermediate_size": 32,
    }  # fmt: skip
    return ClapModel(ClapConfig(text_config=_text_config(), audio_config=audio, projection_dim=DIM)).eval()


def _feature_extractor() -> Any:
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(
        feature_size=64, sampling_rate=SAMPLE_RATE, hop_length=320, fft_window_size=640, max_length_s=1,
        frequency_max=8000, truncation="rand_trunc", padding="repeatpad",
    )  # fmt: skip


def _common(upsample: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    """Latent autoencoder, scheduler and vocoder, which makes prod(upsample) samples of a spectrogram's frame."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    vae = AutoencoderKL(
        block_out_channels=(8, 16), in_channels=1, out_channels=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=SAMPLE_RATE, upsample_initial_channel=16,
            upsample_rates=list(upsample), upsample_kernel_sizes=[2 * rate for rate in upsample],
            resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5]] * 2,
            normalize_before=False,
        )
    )  # fmt: skip
    for parameter in vocoder.parameters():  # random weights alone give silence
        parameter.data.mul_(20 if parameter.ndim > 1 else 1)
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return {"vae": vae.eval(), "vocoder": vocoder.eval(), "scheduler": scheduler}


def _film_unet(frames: int = 32) -> Any:
    """AudioLDM's UNet: the contrastive embedding enters as a class embedding beside the time."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=frames, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=DIM, class_embeddings_concat=True,
    ).eval()  # fmt: skip


def audioldm(folder: Path, seed: int = 0, upsample: tuple[int, ...] = (2, 2), frames: int = 32) -> Any:
    """diffusers' `AudioLDMPipeline`; `folder` takes the tokenizer's files.

    Its own length is `2 frames prod(upsample) / SAMPLE_RATE` s.
    """
    from diffusers import AudioLDMPipeline
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = ClapTextModelWithProjection(ClapTextConfig(**_text_config())).eval()
        pipe = AudioLDMPipeline(
            text_encoder=text_encoder, tokenizer=byte_tokenizer(folder), unet=_film_unet(frames), **_common(upsample)
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def musicldm(folder: Path, seed: int = 0) -> Any:
    """diffusers' `MusicLDMPipeline`; `folder` takes the tokenizer's files."""
    from diffusers import MusicLDMPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = MusicLDMPipeline(
            text_encoder=_clap(), tokenizer=byte_tokenizer(folder), feature_extractor=_feature_extractor(),
            unet=_film_unet(), **_common(),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def audioldm2(folder: Path, seed: int = 0) -> Any:
    """diffusers' `AudioLDM2Pipeline` with CLAP, T5 and GPT-2; `folder` takes a tokenizer's files."""
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        gpt2 = GPT2Config(
            vocab_size=8, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
            max_new_tokens=8,
        )  # fmt: skip
        unet = AudioLDM2UNet2DConditionModel(
            sample_size=32, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=2, cross_attention_dim=([None, 16, 24], [None, 16, 24]),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        pipe = AudioLDM2Pipeline(
            text_encoder=_clap(), tokenizer=byte_tokenizer(folder), feature_extractor=_feature_extractor(),
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=DIM),
            language_model=GPT2LMHeadModel(gpt2).eval(), projection_model=AudioLDM2ProjectionModel(DIM, 24, 16).eval(),
            unet=unet.eval(), **_common(),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
