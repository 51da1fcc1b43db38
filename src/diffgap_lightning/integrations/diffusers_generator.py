"""diffusers' AudioLDM, MusicLDM and AudioLDM2 pipelines as an `EmbeddingGenerator`.

AudioLDM and MusicLDM are conditioned through `prompt_embeds`. AudioLDM2 hears the CLAP embedding beside T5's reading of
the same text, and what its language model makes of the two; there the embedding is exchanged at the pipeline's own
seam (see `diffusers.py`) and T5 reads the text as ever: a video has none, so T5 reads the empty prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.diffusers import find
from diffgap_lightning.integrations.generator import EmbeddingGenerator, check_request, fit_length

PIPELINES = ("AudioLDMPipeline", "MusicLDMPipeline", "AudioLDM2Pipeline")


class DiffusersGenerator:
    """One of `PIPELINES` as a function from embeddings to waveforms.

    Args:
        pipeline: The pipeline, on its device and in its dtype; it is used as it is and never changed.
        name: For records; default: what the pipeline was loaded from.

    Raises:
        ValueError: another class of pipeline, or an AudioLDM2 that speaks a transcription.
    """

    def __init__(self, pipeline: Any, name: str | None = None) -> None:
        kind = type(pipeline).__name__
        if kind not in PIPELINES:
            raise ValueError(f"got a {kind}, expected one of {', '.join(PIPELINES)} of diffusers")
        second = getattr(pipeline, "text_encoder_2", None)
        if second is not None and second.config.model_type == "vits":
            raise ValueError("this AudioLDM2Pipeline speaks a transcription; expected one that hears T5's reading")
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
        """See `EmbeddingGenerator.generate`; AudioLDM2 alone hears `texts`, by default the empty one."""
        check_request(self, embeddings, seconds, seeds)
        pipeline, samples = self.pipeline, round(seconds * self.sample_rate)
        frames = max(math.ceil(samples / self._hop), pipeline.vae_scale_factor)
        options: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
        if type(pipeline).__name__ == "AudioLDM2Pipeline":
            options |= self._language(embeddings, texts or [""] * len(embeddings), negative_prompt)
        else:
            options |= self._film(embeddings, negative_prompt)
        waveforms = pipeline(
            audio_length_in_s=(frames * self._hop + 0.5) / self.sample_rate,  # half a sample: the pipeline rounds down
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **{key: value for key, value in options.items() if value is not None},
        ).audios
        return fit_length(torch.as_tensor(waveforms).float().cpu(), samples)

    def _film(self, embeddings: Tensor, negative_prompt: str | None) -> dict[str, Tensor]:
        """AudioLDM and MusicLDM: the embeddings are the condition."""
        given = {"prompt_embeds": embeddings.to(self.pipeline.text_encoder.dtype)}
        if negative_prompt is not None or type(self.pipeline).__name__ == "MusicLDMPipeline":
            # Beside prompt_embeds AudioLDM takes no negative string; MusicLDM's empty prompt fails (transformers 5).
            given["negative_prompt_embeds"] = self.embed_text([negative_prompt or ""]).expand(len(embeddings), -1)
        return given

    def _language(self, embeddings: Tensor, texts: Sequence[str], negative_prompt: str | None) -> dict[str, Tensor]:
        """AudioLDM2: T5's reading of each text, and what the language model makes of that and the embedding.

        Each row is encoded alone and padded behind a mask afterwards: the language model continues behind the padding,
        so that encoded together a row would depend on the longest text of its batch.
        """
        pipeline, seam = self.pipeline, find(self.pipeline)
        assert seam is not None
        rows = []
        for embedding, text in zip(embeddings, texts, strict=True):
            with seam.patch(Conditioner(_Given(embedding))):
                rows.append(pipeline.encode_prompt(text, pipeline._execution_device, 1, True, None, negative_prompt))
        longest = max(mask.shape[1] for _, mask, _ in rows)
        missing = [longest - mask.shape[1] for _, mask, _ in rows]
        parts = {
            "prompt_embeds": [pad(read, (0, 0, 0, n)) for (read, _, _), n in zip(rows, missing, strict=True)],
            "attention_mask": [pad(mask, (0, n)) for (_, mask, _), n in zip(rows, missing, strict=True)],
            "generated_prompt_embeds": [made for _, _, made in rows],
        }
        given = {name: torch.stack([part[1] for part in pairs]) for name, pairs in parts.items()}
        return given | {f"negative_{name}": torch.stack([part[0] for part in pairs]) for name, pairs in parts.items()}


class _Given:
    """In a refiner's place: whatever the prompt's own embedding is, the given one `(D,)` conditions."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def refine(self, embedding: Tensor, **_: Any) -> Tensor:
        """`(1, D)` -> `(1, D)`."""
        return self.embedding.to(embedding).view_as(embedding)


def as_generator(generator: Any) -> EmbeddingGenerator:
    """A diffusers pipeline or what already has the protocol's methods.

    Raises:
        ValueError: anything else.
    """
    return generator if isinstance(generator, EmbeddingGenerator) else DiffusersGenerator(generator)
