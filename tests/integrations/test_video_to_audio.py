from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.catalog import Clip
from diffgap_lightning.data.media import Media, MediaError, MediaLimits
from diffgap_lightning.data.mux import video_seconds
from diffgap_lightning.embedding.decode import ClipDecoder, DecodedClip, EmbedSettings
from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.encoders.cavp import CavpEncoder
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.encoders.open_clip import OpenClipEncoder
from diffgap_lightning.integrations.conditions import RefineOptions
from diffgap_lightning.integrations.diffusers_generator import DiffusersGenerator
from diffgap_lightning.integrations.video_to_audio import VideoToAudioPipeline
from diffgap_lightning.refiner import DiffGAPRefiner

av = pytest.importorskip("av", reason="needs the extra media")
Make = Callable[..., Path]


class Tones:
    """A generator whose sound says what it was given: a tone of 100 Hz times the index of a row's largest entry."""

    name, sample_rate, dim, native_seconds = "tones", 8000, 32, 1.0

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[int]]] = []

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def generate(self, embeddings: Tensor, *, seconds: float, seeds: Sequence[int], **_: Any) -> Tensor:
        self.calls.append((embeddings, list(seeds)))
        hz = 100.0 * (1 + embeddings.argmax(dim=1))
        t = torch.arange(round(seconds * self.sample_rate)) / self.sample_rate
        return 0.5 * torch.sin(2 * torch.pi * hz[:, None] * t)


@pytest.fixture
def pipeline(sound_refiner: DiffGAPRefiner) -> VideoToAudioPipeline:
    return VideoToAudioPipeline(HashingEncoder(dim=24), sound_refiner, Tones(), crossfade=0.1)


def test_a_short_video_is_one_window(pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make) -> None:
    sound = pipeline(make_video(tmp_path / "v.mp4", seconds=0.8, fps=10))
    assert sound.starts == (0.0,)
    assert sound.waveform.shape == (6400,)


def test_the_generator_hears_refined_video(
    pipeline: VideoToAudioPipeline, sound_refiner: DiffGAPRefiner, tmp_path: Path, make_video: Make
) -> None:
    sound = pipeline(make_video(tmp_path / "v.mp4", seconds=2.5, fps=10), refine=RefineOptions(strength=0.0))
    expected = sound_refiner.refine(
        sound.embeddings, source="video", target="audio", strength=0.0, start="posterior_mean"
    )
    torch.testing.assert_close(sound.conditions, expected)
    heard = torch.cat([rows for rows, _ in pipeline.generator.calls])  # type: ignore[attr-defined]
    torch.testing.assert_close(heard, expected)


@pytest.mark.parametrize("seconds", [1.1, 2.5, 3.7])
def test_long_videos_last_as_long_to_a_sample(
    pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make, seconds: float
) -> None:
    video = make_video(tmp_path / "v.mp4", seconds=seconds, fps=10)
    sound = pipeline(video, batch_size=2)
    assert len(sound.starts) > 1
    assert len(sound.waveform) == round(video_seconds(Media(video)) * 8000)
    assert sound.starts[-1] + 1.0 == pytest.approx(seconds, abs=1e-3)
    out = sound.save(tmp_path / "out.mp4")
    with av.open(str(out)) as container:
        picture, track = container.streams.video[0], container.streams.audio[0]
        lengths = [float(s.duration * s.time_base) for s in (picture, track)]
    assert lengths[1] == pytest.approx(lengths[0], abs=1e-3)


def test_each_window_is_of_its_own_frames(pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make) -> None:
    """Numbered frames differ over time, so the windows' embeddings do; each is that of the window decoded alone."""
    windows = pipeline.embed(make_video(tmp_path / "v.mp4", seconds=2.8, fps=10))
    whole = pipeline.embed(Media(tmp_path / "v.mp4"))
    torch.testing.assert_close(windows.embeddings, whole.embeddings)
    starts = [s / 8000 for s in windows.starts]
    for row, start in zip(windows.embeddings, starts, strict=True):
        alone = pipeline._embed_window(Media(tmp_path / "v.mp4"), start, 1.0)
        torch.testing.assert_close(row[None], alone)
    assert float((windows.embeddings[0] - windows.embeddings[-1]).norm()) > 0.05


@pytest.mark.parametrize("name", ["cavp", "open-clip"])
def test_real_encoders_embed_a_window_as_they_embed_a_corpus(
    name: str, tiny_models: ModuleType, tmp_path: Path, make_video: Make
) -> None:
    """A refiner is trained on the corpus' rows: phase, size and transform of the frames must be the same here."""
    encoder: ContrastiveEncoder
    if name == "cavp":
        pytest.importorskip("torchaudio", reason="needs the extra cavp")
        encoder = CavpEncoder(None, width=4, dim=16)
    else:
        pytest.importorskip("open_clip", reason="needs the extra open-clip")
        encoder = OpenClipEncoder(str(tiny_models.open_clip_folder(tmp_path / "model")))
    media = Media(make_video(tmp_path / "v.mp4", seconds=4.0, fps=10))
    decode = ClipDecoder(EmbedSettings(modalities=("video",), windows="first", window=encoder.window), encoder)
    clip = decode(Clip("v", video=media))
    assert isinstance(clip, DecodedClip)
    expected = encoder.embed_video(clip.items["video"])

    g = torch.Generator().manual_seed(0)
    rows = {"video": torch.randn(40, encoder.dim, generator=g), "audio": torch.randn(40, Tones.dim, generator=g)}
    rows = {m: torch.nn.functional.normalize(x, dim=1) for m, x in rows.items()}
    ids = dict.fromkeys(rows, torch.arange(40))
    names = f"{encoder.fingerprint} + some-clap/v1"
    refiner = DiffGAPRefiner.measure(rows, ids, width=8, depth=0, rank=4, encoder=names)
    sound = VideoToAudioPipeline(encoder, refiner, Tones(), window=4.0)(media, refine=RefineOptions(strength=0.0))
    torch.testing.assert_close(sound.embeddings, expected)
    torch.testing.assert_close(
        sound.conditions, refiner.refine(expected, source="video", target="audio", strength=0.0, start="posterior_mean")
    )
    assert len(sound.waveform) == 4 * 8000


def test_a_window_longer_than_the_encoders_is_the_mean_of_its_parts(
    sound_refiner: DiffGAPRefiner, tmp_path: Path, make_video: Make
) -> None:
    video = make_video(tmp_path / "v.mp4", seconds=1.0, fps=10)
    short = HashingEncoder(dim=24, window=0.5, fps=10)
    pipeline = VideoToAudioPipeline(short, sound_refiner, Tones(), crossfade=0.1)
    halves = [pipeline._embed_window(Media(video), start, 0.5) for start in (0.0, 0.5)]
    mean = torch.nn.functional.normalize(torch.cat(halves).mean(0, keepdim=True), dim=1)
    torch.testing.assert_close(pipeline.embed(video).embeddings, mean)


def test_seeds_decide_and_nothing_else(pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make) -> None:
    video = make_video(tmp_path / "v.mp4", seconds=2.5, fps=10)
    torch.manual_seed(1)
    first = pipeline(video, seed=7)
    torch.manual_seed(2)
    again, other = pipeline(video, seed=7, batch_size=1), pipeline(video, seed=8)
    torch.testing.assert_close(again.waveform, first.waveform)
    torch.testing.assert_close(again.conditions, first.conditions)
    assert not torch.equal(other.conditions, first.conditions)
    calls = pipeline.generator.calls  # type: ignore[attr-defined]
    seeds = [seed for _, part in calls[:1] for seed in part]
    assert len(set(seeds)) == len(seeds)


def test_progress_counts_windows(pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(make_video(tmp_path / "v.mp4", seconds=2.5), batch_size=1, progress=lambda *n: seen.append(n))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_odd_frame_rates(pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make) -> None:
    for fps in (1, 7, 60):
        video = make_video(tmp_path / f"{fps}.mp4", seconds=2.0, fps=fps)
        assert pipeline(video).waveform.shape == (16000,)


def test_unusable_videos(pipeline: VideoToAudioPipeline, tmp_path: Path, make_video: Make, make_audio: Make) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(MediaError, match="no video stream"):
        pipeline(make_audio(tmp_path / "a.wav"))
    with pytest.raises(MediaError, match="cannot open"):
        pipeline(broken)
    with pytest.raises(MediaError, match="not found"):
        pipeline(tmp_path / "none.mp4")
    pipeline.limits = MediaLimits(max_seconds=0.5)
    with pytest.raises(MediaError, match="more than 0.5 s"):
        pipeline(make_video(tmp_path / "v.mp4", seconds=1.0))


def test_parts_that_do_not_fit(sound_refiner: DiffGAPRefiner) -> None:
    encoder, tones = HashingEncoder(dim=24), Tones()
    with pytest.raises(ValueError, match="the encoder HashingEncoder has 16 dimensions, the refiner's video has 24"):
        VideoToAudioPipeline(HashingEncoder(dim=16), sound_refiner, tones)
    tones.dim = 8
    with pytest.raises(ValueError, match="the generator tones has 8 dimensions, the refiner's audio has 32"):
        VideoToAudioPipeline(encoder, sound_refiner, tones)
    with pytest.raises(ValueError, match="to a third of the window's 1 s"):
        VideoToAudioPipeline(encoder, sound_refiner, Tones(), crossfade=0.5)
    with pytest.raises(ValueError, match="knows text->audio"):
        VideoToAudioPipeline(encoder, sound_refiner, Tones(), source="image")
    named = replace(sound_refiner.config, encoder=HashingEncoder(dim=24, seed=1).fingerprint)
    other = copy(sound_refiner)
    other.config = named
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{named.encoder})(?=.*{encoder.fingerprint})"):
        VideoToAudioPipeline(encoder, other, Tones())
    encoder.modalities = ("audio", "text")
    with pytest.raises(ValueError, match="expected an encoder of video"):
        VideoToAudioPipeline(encoder, sound_refiner, Tones())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_real_videos_through_a_diffusers_pipeline(
    shared_data: Path, generator_folder: Path, sound_refiner: DiffGAPRefiner, tmp_path: Path
) -> None:
    import diffusers

    pipe = diffusers.AudioLDMPipeline.from_pretrained(str(generator_folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipeline = VideoToAudioPipeline(HashingEncoder(dim=24), sound_refiner, pipe, window=4.0)
    assert isinstance(pipeline.generator, DiffusersGenerator)
    for video in sorted((shared_data / "vggsound_sample").glob("*.mp4")):
        sound = pipeline(video, num_steps=2)
        assert len(sound.starts) == 3
        assert len(sound.waveform) == round(16000 * video_seconds(Media(video)))
        out = sound.save(tmp_path / video.name)
        ((_, heard),) = audio_windows(Media(out), 16000)
        # AAC is lossy and nothing more: what is heard correlates with what was made.
        made = sound.waveform[: len(heard)]
        assert float(torch.corrcoef(torch.stack([made, heard[: len(made)]]))[0, 1]) > 0.8
