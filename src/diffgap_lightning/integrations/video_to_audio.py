"""`VideoToAudioPipeline`: a text-to-audio generator that hears video, without any training of the generator.

    frames -> video embedding v -> refiner: a ~ p(audio | v) -> generator, conditioned on a -> waveform -> mp4

A generator such as AudioLDM is conditioned on CLAP embeddings. Video embeddings of OpenCLIP or CAVP lie in another
space, of another width; a refiner trained on (video, audio) pairs carries them to CLAP's audio embeddings, where it
starts at the posterior mean E[a | v] (no other start exists between spaces of different widths). The idea is that of
V2A-Mapper (Wang et al. 2024). Videos longer than the generator's own length are made in windows and crossfaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.data.media import Media, MediaError, MediaLimits
from diffgap_lightning.data.mux import video_seconds, write_video_with_audio
from diffgap_lightning.data.video import video_windows
from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.integrations.conditions import RefineOptions, refine_rows
from diffgap_lightning.integrations.crossfade import join_windows, spread_windows
from diffgap_lightning.integrations.diffusers_generator import as_generator
from diffgap_lightning.integrations.generator import EmbeddingGenerator, derive_seed
from diffgap_lightning.refiner import DiffGAPRefiner

_CROSSFADE = 0.5  # s


@dataclass(frozen=True)
class VideoSound:
    """The sound made for a video.

    Attributes:
        waveform: `(T,)` float32; T / sample_rate is the video's duration, to a sample.
        sample_rate: In Hz.
        starts: Of the windows, in s.
        embeddings: `(W, D_video)` of the windows.
        conditions: `(W, D)`: what the generator heard.
        source: The video.
    """

    waveform: Tensor
    sample_rate: int
    starts: tuple[float, ...]
    embeddings: Tensor
    conditions: Tensor
    source: Media = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the video with this sound (mp4, mov, mkv or webm, by the suffix); its picture is copied."""
        return write_video_with_audio(path, self.source, self.waveform, self.sample_rate)


@dataclass(frozen=True)
class VideoWindows:
    """A video cut into the generator's windows, and embedded.

    Attributes:
        source: The video.
        samples: N, of the whole sound.
        length: T, samples of a window.
        fade: F, samples of a crossfade.
        starts: First sample of each window.
        embeddings: `(W, D_video)`.
    """

    source: Media
    samples: int
    length: int
    fade: int
    starts: tuple[int, ...]
    embeddings: Tensor


class VideoToAudioPipeline:
    """Makes sound for videos.

    Args:
        encoder: Embeds video; the refiner was trained on its embeddings.
        refiner: Knows the direction from `source` to `target`, the latter in the generator's space.
        generator: A diffusers pipeline (AudioLDM, MusicLDM, AudioLDM2) or anything with the methods of
            `EmbeddingGenerator`.
        source: The refiner's name for the encoder's embeddings.
        target: The refiner's name for the generator's space.
        window: Seconds that are generated at a time; default: the generator's own length.
        crossfade: Seconds over which neighbouring windows are mixed, at most a third of `window`; default: 0.5, or that
            third where it is shorter.
        limits: What one video may cost.

    Raises:
        ValueError: parts that do not fit each other, by their widths or by the encoder that the refiner names.
    """

    def __init__(
        self,
        encoder: ContrastiveEncoder,
        refiner: DiffGAPRefiner,
        generator: EmbeddingGenerator | Any,
        *,
        source: str = "video",
        target: str = "audio",
        window: float | None = None,
        crossfade: float | None = None,
        limits: MediaLimits | None = None,
    ) -> None:
        self.encoder, self.refiner, self.generator = encoder, refiner, as_generator(generator)
        self.source, self.target, self.limits = source, target, limits or MediaLimits()
        self.window = self.generator.native_seconds if window is None else window
        self.crossfade = min(_CROSSFADE, self.window / 3.01) if crossfade is None else crossfade
        self._check()

    def _check(self) -> None:
        refiner, name = self.refiner, type(self.encoder).__name__
        if "video" not in self.encoder.modalities or self.encoder.fps is None:
            raise ValueError(f"{name} embeds {', '.join(self.encoder.modalities)}, expected an encoder of video")
        refiner.cdm_of(self.source, self.target)
        refiner.check_encoder(self.encoder)
        dims = refiner.config.dims
        for what, got, modality in (
            (f"the encoder {name}", self.encoder.dim, self.source),
            (f"the generator {self.generator.name}", self.generator.dim, self.target),
        ):
            if got != dims[modality]:
                raise ValueError(f"{what} has {got} dimensions, the refiner's {modality} has {dims[modality]}")
        if not 0 <= 3 * self.crossfade <= self.window:
            raise ValueError(
                f"crossfade: got {self.crossfade} s, expected from 0 to a third of the window's {self.window:g} s"
            )

    @torch.no_grad()
    def embed(self, video: Media | str | os.PathLike[str]) -> VideoWindows:
        """Cut a video into windows and embed each; a window longer than the encoder's is the mean of its parts.

        Raises:
            MediaError: the file is missing, broken, without video or too long.
        """
        media = video if isinstance(video, Media) else Media(Path(video))
        rate = self.generator.sample_rate
        seconds = video_seconds(media, self.limits)
        samples = max(1, round(seconds * rate))
        length, fade = min(round(self.window * rate), samples), round(self.crossfade * rate)
        starts = spread_windows(samples, length, fade if length < samples else 0)
        rows = torch.cat([self._embed_window(media, start / rate, length / rate) for start in starts])
        return VideoWindows(media, samples, length, fade, tuple(starts), rows)

    def _embed_window(self, media: Media, start: float, seconds: float) -> Tensor:
        """`(1, D_video)` of one window."""
        encoder = self.encoder
        assert encoder.fps is not None
        part = Media(media.source, media.extension, media.start + start, seconds)
        transform = encoder.transform("video")
        rows = []
        decoding: dict[str, Any] = {"phase": encoder.frame_phase, "short_side": encoder.frame_size}
        for _, frames in video_windows(part, encoder.fps, encoder.window, **decoding, limits=self.limits):
            rows.append(encoder.embed_video([frames if transform is None else transform(frames)]).float().cpu())
        if not rows:
            raise MediaError(f"no frames at {start:g} s")
        return normalize(torch.cat(rows).mean(0, keepdim=True), dim=1)

    def __call__(
        self,
        video: Media | str | os.PathLike[str],
        *,
        seed: int = 0,
        refine: RefineOptions | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        batch_size: int = 4,
        progress: Callable[[int, int], None] | None = None,
    ) -> VideoSound:
        """Make the sound of a video.

        Args:
            video: The file.
            seed: Of the generator's noise and the refiner's.
            refine: How to refine; default: as the refiner's own configuration says.
            num_steps: The generator's sampler steps.
            guidance_scale: The generator's.
            negative_prompt: The generator's.
            batch_size: Windows that are generated at a time.
            progress: Called with (windows done, windows of the video).

        Raises:
            MediaError: the file is missing, broken, without video or too long.
        """
        windows = self.embed(video)
        seeds = [derive_seed(seed, "window", k) for k in range(len(windows.starts))]
        conditions = self.refine(windows.embeddings, seeds, refine)
        made: list[Tensor] = []
        for first in range(0, len(seeds), batch_size):
            rows = slice(first, first + batch_size)
            made += self.generator.generate(
                conditions[rows],
                seconds=windows.length / self.generator.sample_rate,
                seeds=seeds[rows],
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
            )
            if progress is not None:
                progress(len(made), len(seeds))
        return self.join(windows, made, conditions)

    def refine(self, embeddings: Tensor, seeds: Sequence[int], options: RefineOptions | None = None) -> Tensor:
        """`(W, D_video)` -> `(W, D)` in the generator's space, each row with noise of its own seed."""
        return refine_rows(self.refiner, embeddings, seeds, self.source, self.target, options)

    def join(self, windows: VideoWindows, waveforms: Sequence[Tensor], conditions: Tensor) -> VideoSound:
        """Crossfade the windows' waveforms `(T,)` into the sound of the video."""
        rate = self.generator.sample_rate
        waveform = join_windows(waveforms, windows.starts, windows.samples, windows.fade)
        starts = tuple(start / rate for start in windows.starts)
        return VideoSound(waveform, rate, starts, windows.embeddings, conditions, windows.source)
