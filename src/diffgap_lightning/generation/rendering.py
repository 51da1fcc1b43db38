"""The same item with and without the refiner: conditions, waveforms and scores, in memory.

    text     plain        the generator's own text embedding
             refined      the same, refined to audio
    video    regression   the posterior mean E[audio | video] alone: without a refiner a text-to-audio generator hears
                          no video at all
             refined      as the refiner's configuration, or the settings, say

Candidate k of an item has the same initial noise in both versions: what differs between them is the condition. The
noise is seeded by the item's key, the refiner's noise too, so neither depends on the batch or on the other items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.data.media import Media, MediaLimits
from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.generation.settings import GenerationSettings
from diffgap_lightning.integrations.candidates import embed_waveforms, rank_candidates
from diffgap_lightning.integrations.conditions import RefineOptions, refine_rows
from diffgap_lightning.integrations.generator import EmbeddingGenerator, derive_seed
from diffgap_lightning.integrations.video_to_audio import VideoToAudioPipeline
from diffgap_lightning.refiner import DiffGAPRefiner

VERSIONS = {
    "plain": "without refiner",
    "regression": "posterior mean only",
    "refined": "with refiner",
    "original": "original sound",
}
_REGRESSION = RefineOptions(strength=0.0, start="posterior_mean")


@dataclass(frozen=True)
class Sound:
    """One version of an item.

    Attributes:
        version: A key of `VERSIONS`.
        waveforms: K candidates `(T,)`, the best first.
        scores: Of each, by name; empty without a scorer.
        conditions: `(W, D)`: what the generator was conditioned on; one row for a text, one a window for a video.
    """

    version: str
    waveforms: list[Tensor]
    scores: list[dict[str, float]]
    conditions: Tensor


class Renderer:
    """Makes the sounds of items.

    Args:
        generator: From embeddings to waveforms.
        refiner: Knows text to audio for texts, video to audio for videos; None: plain versions of texts only.
        settings: See there.
        video_encoder: Embeds videos.
        scorer: Embeds audio and text in the generator's space: gives the scores and ranks candidates.
        batch_size: Waveforms that are generated at a time.
        limits: What one video may cost.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        generator: EmbeddingGenerator,
        refiner: DiffGAPRefiner | None,
        settings: GenerationSettings | None = None,
        *,
        video_encoder: ContrastiveEncoder | None = None,
        scorer: ContrastiveEncoder | None = None,
        batch_size: int = 4,
        limits: MediaLimits | None = None,
    ) -> None:
        self.generator, self.refiner, self.settings = generator, refiner, settings or GenerationSettings()
        self.scorer, self.batch_size = scorer, batch_size
        self._rest = {"video_encoder": video_encoder, "scorer": scorer, "batch_size": batch_size, "limits": limits}
        self.video: VideoToAudioPipeline | None = None
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if self.settings.candidates > 1 and scorer is None:
            raise ValueError("candidates are ranked by an encoder of audio: give a scorer, or ask for one candidate")
        if scorer is not None and scorer.dim != generator.dim:
            raise ValueError(f"the scorer has {scorer.dim} dimensions, the generator's space {generator.dim}")
        if scorer is not None and refiner is not None:
            refiner.check_encoder(scorer, "scorer: the refiner, whose own score it gives,")
        if video_encoder is not None:
            if refiner is None:
                raise ValueError("videos need a refiner from video to audio: without one no generator hears them")
            self.video = VideoToAudioPipeline(
                video_encoder, refiner, generator,
                window=self.settings.window, crossfade=self.settings.crossfade, limits=limits,
            )  # fmt: skip

    def with_settings(self, settings: GenerationSettings) -> Renderer:
        """The same models with other settings."""
        return Renderer(self.generator, self.refiner, settings, **self._rest)  # type: ignore[arg-type]

    @property
    def refines_text(self) -> bool:
        """Whether texts have a refined version."""
        return self.refiner is not None and ("text", "audio") in self.refiner.directions

    @property
    def seconds(self) -> float:
        """Length of a text's sound."""
        return self.settings.seconds or self.generator.native_seconds

    def text_conditions(self, texts: Sequence[str], keys: Sequence[str]) -> dict[str, Tensor]:
        """Version to `(B, D)`: what the generator is conditioned on."""
        plain = self.generator.embed_text(texts)
        if not self.refines_text:
            return {"plain": plain}
        assert self.refiner is not None
        seeds = [derive_seed(self.settings.seed, key, "refine") for key in keys]
        return {
            "plain": plain,
            "refined": refine_rows(self.refiner, plain, seeds, "text", "audio", self.settings.refine),
        }

    def texts(self, texts: Sequence[str], keys: Sequence[str]) -> list[list[Sound]]:
        """All versions of a batch of prompts.

        Args:
            texts: B prompts.
            keys: What seeds each prompt's noise.

        Returns:
            For each prompt its versions.
        """
        count = self.settings.candidates
        seeds = [derive_seed(self.settings.seed, key, k) for key in keys for k in range(count)]
        repeated = [text for text in texts for _ in range(count)]
        found: list[list[Sound]] = [[] for _ in texts]
        for version, rows in self.text_conditions(texts, keys).items():
            made = self._generate(rows.repeat_interleave(count, 0), self.seconds, seeds, repeated)
            for b, text in enumerate(texts):
                own = list(made[b * count : (b + 1) * count])
                found[b].append(self._ranked(version, own, rows[b : b + 1], text=text))
        return found

    def video_sounds(self, media: Media, key: str) -> list[Sound]:
        """All versions of a video.

        Raises:
            ValueError: this renderer has no encoder of video.
            MediaError: the file is missing, broken, without video or too long.
        """
        pipeline = self.video
        if pipeline is None:
            raise ValueError("videos need an encoder of video and a refiner from video to audio")
        windows = pipeline.embed(media)
        noise = [derive_seed(self.settings.seed, key, "refine", w) for w in range(len(windows.starts))]
        whole = normalize(windows.embeddings.mean(0, keepdim=True), dim=1)
        found = []
        for version, options in (("regression", _REGRESSION), ("refined", self.settings.refine)):
            conditions = pipeline.refine(windows.embeddings, noise, options)
            candidates = []
            for k in range(self.settings.candidates):
                seeds = [derive_seed(self.settings.seed, key, k, w) for w in range(len(windows.starts))]
                seconds = windows.length / self.generator.sample_rate
                made = self._generate(conditions, seconds, seeds, [""] * len(seeds))
                candidates.append(pipeline.join(windows, list(made), conditions).waveform)
            found.append(self._ranked(version, candidates, conditions, video=whole))
        return found

    def _generate(self, rows: Tensor, seconds: float, seeds: Sequence[int], texts: Sequence[str]) -> Tensor:
        """`(R, T)`, made `batch_size` at a time."""
        made = []
        for first in range(0, len(rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            made.append(
                self.generator.generate(
                    rows[part],
                    seconds=seconds,
                    seeds=seeds[part],
                    num_steps=self.settings.num_steps,
                    guidance_scale=self.settings.guidance_scale,
                    negative_prompt=self.settings.negative_prompt,
                    texts=texts[part],
                )
            )
        waveforms = torch.cat(made)
        if not torch.isfinite(waveforms).all():
            raise ValueError(f"{self.generator.name}: made NaN or infinite samples; use another dtype, e.g. float32")
        return waveforms

    def _ranked(
        self,
        version: str,
        waveforms: list[Tensor],
        conditions: Tensor,
        *,
        text: str = "",
        video: Tensor | None = None,
    ) -> Sound:
        """Score the candidates of one item and put the best first."""
        if self.scorer is None:
            return Sound(version, waveforms, [{} for _ in waveforms], conditions)
        audio = embed_waveforms(self.scorer, waveforms, self.generator.sample_rate)[None]
        if video is not None:
            ranking = rank_candidates(audio, video, refiner=self.refiner, source="video", by="refiner")
        else:
            prompt = self.scorer.embed_text([text]).float().cpu()
            refiner = self.refiner if self.refines_text else None
            ranking = rank_candidates(audio, prompt, refiner=refiner, by=self.settings.rank_by)
        scores = {name: row[0].tolist() for name, row in ranking.scores.items() if video is None or name != "clap"}
        order = ranking.order[0].tolist()
        listed = [{name: values[k] for name, values in scores.items()} for k in order]
        return Sound(version, [waveforms[k] for k in order], listed, conditions)
