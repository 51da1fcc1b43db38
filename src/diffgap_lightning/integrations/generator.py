"""A text-to-audio generator seen as a function from contrastive embeddings to waveforms.

    generator = DiffusersGenerator(AudioLDMPipeline.from_pretrained(folder))
    plain = generator.embed_text(["a dog barks"])                         # (B, D), unit norm
    refined = refiner.refine(plain, source="text", target="audio")
    a, b = (generator.generate(x, seconds=10.0, seeds=[0]) for x in (plain, refined))      # (B, T) each

Whatever lies in the generator's space can condition it: text as ever, refined text, or video carried over by a refiner.
Each row has its own seed, so its initial noise (and, with the deterministic samplers that the pipelines use by default,
its waveform) depends neither on the batch nor on the condition: two versions differ by their conditions alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

PIPELINES = ("AudioLDMPipeline", "MusicLDMPipeline")


@runtime_checkable
class EmbeddingGenerator(Protocol):
    """Waveforms from embeddings.

    Attributes:
        name: The model, for records and pages.
        sample_rate: Of the waveforms, in Hz.
        dim: D, the width of the conditioning space.
        native_seconds: The length that the generator was made for, in s.
    """

    name: str
    sample_rate: int
    dim: int
    native_seconds: float

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """`(B, D)` float32 on the CPU, unit norm: what the generator is conditioned on without a refiner."""

    def generate(
        self,
        embeddings: Tensor,
        *,
        seconds: float,
        seeds: Sequence[int],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Make one waveform a row.

        Args:
            embeddings: `(B, D)`, unit norm.
            seconds: Length of the waveforms.
            seeds: B seeds of the initial noise.
            num_steps: Sampler steps; default: the generator's.
            guidance_scale: Of classifier-free guidance; default: the generator's.
            negative_prompt: What the unconditional branch hears; default: the generator's empty prompt.
            texts: B prompts, for generators that hear more than the embedding (AudioLDM2's second text encoder).

        Returns:
            `(B, T)` float32 on the CPU, T = round(seconds x sample_rate).
        """


class DiffusersGenerator:
    """`AudioLDMPipeline` and `MusicLDMPipeline` of diffusers, conditioned through `prompt_embeds`.

    Args:
        pipeline: The pipeline, on its device and in its dtype; it is used as it is and never changed.
        name: For records; default: what the pipeline was loaded from.

    Raises:
        ValueError: another class of pipeline.
    """

    def __init__(self, pipeline: Any, name: str | None = None) -> None:
        kind = type(pipeline).__name__
        if kind not in PIPELINES:
            raise ValueError(f"got a {kind}, expected an AudioLDMPipeline or a MusicLDMPipeline of diffusers")
        self.pipeline = pipeline
        self.name = name or str(getattr(pipeline.config, "_name_or_path", "") or kind)
        vocoder = pipeline.vocoder.config
        self.sample_rate = int(vocoder.sampling_rate)
        self.dim = int(pipeline.text_encoder.config.projection_dim)
        self._hop = math.prod(vocoder.upsample_rates)  # samples of a spectrogram's frame
        frames = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self.native_seconds = frames * self._hop / self.sample_rate

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See `EmbeddingGenerator.embed_text`; the numbers are those that the pipeline computes itself."""
        pipeline = self.pipeline
        tokens = pipeline.tokenizer(
            list(texts),
            padding="max_length",
            max_length=pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(pipeline._execution_device)
        encoder = pipeline.text_encoder
        if hasattr(encoder, "get_text_features"):
            found = encoder.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            found = getattr(found, "pooler_output", found)  # transformers 5 returns an object
        else:
            found = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds
        return normalize(found, dim=-1).float().cpu()

    @torch.no_grad()
    def generate(
        self,
        embeddings: Tensor,
        *,
        seconds: float,
        seeds: Sequence[int],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """See `EmbeddingGenerator.generate`; `texts` is not needed."""
        check_request(self, embeddings, seconds, seeds)
        pipeline, samples = self.pipeline, round(seconds * self.sample_rate)
        frames = max(math.ceil(samples / self._hop), pipeline.vae_scale_factor)
        options: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
        if negative_prompt is not None or type(pipeline).__name__ == "MusicLDMPipeline":
            # Beside prompt_embeds AudioLDM takes no negative string; MusicLDM's empty prompt fails (transformers 5).
            negative = self.embed_text([negative_prompt or ""])
            options["negative_prompt_embeds"] = negative.expand(len(embeddings), -1)
        waveforms = pipeline(
            prompt_embeds=embeddings.to(pipeline.text_encoder.dtype),
            audio_length_in_s=(frames * self._hop + 0.5) / self.sample_rate,  # half a sample: the pipeline rounds down
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **{key: value for key, value in options.items() if value is not None},
        ).audios
        return fit_length(torch.as_tensor(waveforms).float().cpu(), samples)


def check_request(generator: EmbeddingGenerator, embeddings: Tensor, seconds: float, seeds: Sequence[int]) -> None:
    """Refuse what no generator can make.

    Raises:
        ValueError: saying which.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != generator.dim or not len(embeddings):
        raise ValueError(
            f"embeddings: got {tuple(embeddings.shape)}, expected (B, {generator.dim}) for {generator.name}"
        )
    if len(seeds) != len(embeddings):
        raise ValueError(f"seeds: got {len(seeds)} for {len(embeddings)} rows, expected one a row")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds: got {seconds}, expected a positive number")


def fit_length(waveforms: Tensor, samples: int) -> Tensor:
    """`(B, T)` cut, or padded with silence, to `(B, samples)`."""
    return pad(waveforms[:, :samples], (0, max(0, samples - waveforms.shape[1])))


def derive_seed(seed: int, *parts: object) -> int:
    """A seed below 2^63 for one of many things that are drawn: changing one part changes the whole number."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def as_generator(generator: Any) -> EmbeddingGenerator:
    """A diffusers pipeline or what already has the protocol's methods.

    Raises:
        ValueError: anything else.
    """
    return generator if isinstance(generator, EmbeddingGenerator) else DiffusersGenerator(generator)
