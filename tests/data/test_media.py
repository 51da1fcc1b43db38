from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data import audio, media
from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.media import Media, MediaError, MediaLimits
from diffgap_lightning.data.video import video_windows

Make = Callable[..., Path]


def whole_audio(source: Media, sample_rate: int) -> torch.Tensor:
    ((_, waveform),) = audio_windows(source, sample_rate)
    return waveform


@pytest.mark.parametrize(("source_rate", "rate"), [(16000, 16000), (44100, 48000), (48000, 16000), (22050, 48000)])
def test_resampling_gives_the_sine_of_the_closed_form(
    make_audio: Make, tmp_path: Path, source_rate: int, rate: int
) -> None:
    path = make_audio(tmp_path / "a.wav", seconds=1.0, sample_rate=source_rate, hz=440.0)
    waveform = whole_audio(Media(path), rate)
    expected = 0.5 * torch.sin(2 * math.pi * 440.0 * torch.arange(len(waveform)).double() / rate).float()
    assert abs(len(waveform) - rate) <= 1
    assert waveform.dtype == torch.float32
    inner = slice(rate // 20, -rate // 20)  # the sinc's support is cut at both ends of the signal
    assert (waveform - expected)[inner].abs().max() < 2e-3


def test_resampling_removes_what_the_new_rate_cannot_hold(make_audio: Make, tmp_path: Path) -> None:
    path = make_audio(tmp_path / "a.wav", sample_rate=48000, hz=12000.0)
    assert whole_audio(Media(path), 16000)[800:-800].abs().max() < 5e-3


def test_channels_are_averaged_and_lossy_overshoot_is_clamped(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    left, right = np.full(800, 0.9, np.float32), np.full(800, -0.3, np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    assert whole_audio(Media(tmp_path / "stereo.wav"), 16000).numpy() == pytest.approx(0.3, abs=1e-6)
    soundfile.write(tmp_path / "loud.wav", np.full((800, 1), 1.7, np.float32), 16000, subtype="FLOAT")
    assert whole_audio(Media(tmp_path / "loud.wav"), 16000).max() == 1.0


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_bytes_and_files_give_the_same(make_audio: Make, tmp_path: Path, suffix: str) -> None:
    path = make_audio(tmp_path / f"a{suffix}", seconds=0.5, sample_rate=44100)
    from_file = whole_audio(Media(path), 44100)
    assert torch.equal(from_file, whole_audio(Media(path.read_bytes(), suffix[1:]), 44100))
    assert from_file[4000:-4000].abs().max() == pytest.approx(0.5, abs=0.03)


def test_windows_of_a_file_are_its_slices(make_audio: Make, tmp_path: Path) -> None:
    path = make_audio(tmp_path / "a.flac", seconds=2.5, sample_rate=8000)
    whole = whole_audio(Media(path), 8000)
    windows = list(audio_windows(Media(path), 8000, window=1.0))
    assert [start for start, _ in windows] == [0.0, 1.0, 2.0]
    assert torch.equal(torch.cat([w for _, w in windows]), whole)
    (only,) = audio_windows(Media(path), 8000, window=1.0, first_only=True)
    assert torch.equal(only[1], whole[:8000])


def test_a_clip_starts_where_its_catalog_says(make_audio: Make, tmp_path: Path) -> None:
    path = make_audio(tmp_path / "a.wav", seconds=20.0, sample_rate=8000)
    whole = whole_audio(Media(path), 8000)
    assert torch.equal(whole_audio(Media(path, start=3.0, duration=5.0), 8000), whole[24000:64000])
    # `y.wav` may be the whole video or the clip alone: twenty seconds are no ten-second clip, eleven are
    assert torch.equal(whole_audio(Media(path, start=3.0, duration=10.0, maybe_cut=True), 8000), whole[24000:104000])
    short = make_audio(tmp_path / "b.wav", seconds=11.0, sample_rate=8000)
    assert len(whole_audio(Media(short, start=3.0, duration=10.0, maybe_cut=True), 8000)) == 80000
    with pytest.raises(MediaError, match="ends before the clip's start at 30 s"):
        whole_audio(Media(path, start=30.0, duration=10.0), 8000)


def test_audio_track_of_a_video(make_video: Make, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", seconds=2.0, sample_rate=16000, hz=440.0)
    for source in (Media(path), Media(path.read_bytes(), "mp4")):
        windows = list(audio_windows(source, 16000, window=1.0))
        assert [len(w) for _, w in windows] == [16000, 16000]
        for _, waveform in windows:
            power = torch.fft.rfft(waveform).abs()
            assert int(power.argmax()) == 440  # one second: bin k is k Hz
            assert waveform[2000:-2000].abs().max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("source_fps", "fps"), [(30, 4), (10, 4), (10, 10), (8, 16), (25, 3)])
def test_frames_are_those_on_screen(
    make_video: Make, read_number: Callable, tmp_path: Path, source_fps: int, fps: int
) -> None:
    path = make_video(tmp_path / "v.mp4", seconds=3.0, fps=source_fps, hz=0)
    ((start, frames),) = video_windows(Media(path), fps)
    assert start == 0.0
    assert frames.shape == (3 * fps, 3, 64, 64)
    assert frames.dtype == torch.uint8
    assert [read_number(f) for f in frames] == [k * source_fps // fps for k in range(3 * fps)]


def test_frames_of_later_windows_and_of_bytes(make_video: Make, read_number: Callable, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", seconds=6.0, fps=10, hz=0)
    windows = list(video_windows(Media(path.read_bytes(), "mp4"), 2, window=2.0))
    assert [start for start, _ in windows] == [0.0, 2.0, 4.0]
    assert [[read_number(f) for f in frames] for _, frames in windows] == [
        [0, 5, 10, 15],
        [20, 25, 30, 35],
        [40, 45, 50, 55],
    ]
    ((_, clip),) = video_windows(Media(path, start=3.0, duration=1.0), 5)
    assert [read_number(f) for f in clip] == [30, 32, 34, 36, 38]


def test_frames_are_reduced_never_enlarged(make_video: Make, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", hz=0)
    assert next(iter(video_windows(Media(path), 2, short_side=32)))[1].shape[2:] == (32, 32)
    assert next(iter(video_windows(Media(path), 2, short_side=500)))[1].shape[2:] == (64, 64)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "mp4"])
def test_broken_files_are_refused_with_a_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    for content, reason in ((b"", "empty file"), (b"not media at all" * 50, "cannot open|no video stream")):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=reason):
            list(audio_windows(Media(path), 16000))
        with pytest.raises(MediaError, match=reason):
            list(video_windows(Media(path), 4))
    with pytest.raises(MediaError, match="file not found"):
        list(audio_windows(Media(tmp_path / f"none.{suffix}"), 16000))


def test_truncated_files_are_refused(make_audio: Make, make_video: Make, tmp_path: Path) -> None:
    flac = make_audio(tmp_path / "a.flac", seconds=5.0).read_bytes()
    with pytest.raises(MediaError):
        list(audio_windows(Media(flac[: len(flac) // 2], "flac"), 16000))
    mp4 = make_video(tmp_path / "v.mp4").read_bytes()
    with pytest.raises(MediaError):
        list(video_windows(Media(mp4[: len(mp4) // 2], "mp4"), 4))


def test_a_playlist_in_disguise_opens_nothing(make_video: Make, tmp_path: Path) -> None:
    make_video(tmp_path / "other.mp4", seconds=2.0)
    concat = b"ffconcat version 1.0\nfile other.mp4\n"
    hls = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\nother.mp4\n#EXT-X-ENDLIST\n"
    for number, content in enumerate((concat, hls)):
        path = tmp_path / f"list{number}.mp4"
        path.write_bytes(content)
        for source in (Media(path), Media(content, "mp4")):
            with pytest.raises(MediaError, match="cannot open"):
                list(video_windows(source, 4))


def test_missing_streams_and_non_finite_samples(make_audio: Make, make_video: Make, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    with pytest.raises(MediaError, match="no audio stream"):
        list(audio_windows(Media(make_video(tmp_path / "mute.mp4", hz=0)), 16000))
    with pytest.raises(MediaError, match="no video stream"):
        list(video_windows(Media(make_audio(tmp_path / "a.wav")), 4))
    soundfile.write(tmp_path / "nan.wav", np.full((800, 1), np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match="NaN"):
        list(audio_windows(Media(tmp_path / "nan.wav"), 16000))
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1), np.float32), 16000)
    with pytest.raises(MediaError, match="no signal"):
        list(audio_windows(Media(tmp_path / "none.wav"), 16000))


def test_limits(make_audio: Make, make_video: Make, tmp_path: Path) -> None:
    wav, mp4 = make_audio(tmp_path / "a.wav", seconds=2.0), make_video(tmp_path / "v.mp4")
    with pytest.raises(MediaError, match=r"longer than 1\.5 s"):
        list(audio_windows(Media(wav), 16000, limits=MediaLimits(max_seconds=1.5)))
    with pytest.raises(MediaError, match="larger than 1000 bytes"):
        list(audio_windows(Media(wav), 16000, limits=MediaLimits(max_bytes=1000)))
    with pytest.raises(MediaError, match="64 x 64 pixels exceed 1000"):
        list(video_windows(Media(mp4), 4, limits=MediaLimits(max_pixels=1000)))


def test_a_missing_package_is_one_sentence_naming_the_extra(
    make_audio: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    path = make_audio(tmp_path / "a.wav")
    monkeypatch.setattr(media, "import_module", refuse)
    audio._resampler.cache_clear()
    with pytest.raises(ImportError, match=r"needs soundfile .* pip install 'diffgap-lightning\[media\]'"):
        list(audio_windows(Media(path), 16000))
    with pytest.raises(ImportError, match="needs av"):
        list(video_windows(Media(path), 4))


def test_real_clips(shared_data: Path) -> None:
    clips = sorted((shared_data / "vggsound_sample").glob("*.mp4"))
    assert len(clips) == 4
    for path in clips:
        ((_, waveform),) = audio_windows(Media(path, duration=10.0), 48000, 10.0)
        ((_, frames),) = video_windows(Media(path, duration=10.0), 4, 10.0, short_side=112)
        assert waveform.shape == (480000,)
        assert 0.01 < float(waveform.abs().max()) <= 1.0
        assert frames.shape[:2] == (40, 3)
        assert min(frames.shape[2:]) == 112
