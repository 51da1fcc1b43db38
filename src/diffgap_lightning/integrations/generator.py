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
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn.functional import pad


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
