from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.media import Media, MediaError, MediaLimits
from diffgap_lightning.data.mux import read_wav, video_seconds, write_video_with_audio, write_wav

av = pytest.importorskip("av", reason="needs the extra media")
Make = Callable[..., Path]
AAC_FRAME = 1024


def tone(seconds: float, sample_rate: int, hz: float = 1000.0) -> Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(round(seconds * sample_rate)) / sample_rate)


def pictures(path: Path) -> list[tuple[bytes, float]]:
    """The video packets and their times."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(bytes(p), float(p.pts * p.time_base)) for p in container.demux(stream) if p.pts is not None]


def loudest_hz(path: Path) -> float:
    ((_, signal),) = audio_windows(Media(path), 16000)
    spectrum = torch.fft.rfft(signal * torch.hann_window(len(signal))).abs()
    return float(spectrum.argmax()) * 16000 / len(signal)


def sound_seconds(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return float(stream.duration * stream.time_base)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("hz", [440.0, 0.0], ids=["with a soundtrack", "mute"])
def test_the_picture_is_copied_and_the_sound_replaced(tmp_path: Path, make_video: Make, suffix: str, hz: float) -> None:
    video = make_video(tmp_path / "in.mp4", seconds=2.0, fps=10, hz=hz)
    out = write_video_with_audio(tmp_path / f"out{suffix}", video, tone(2.0, 16000), 16000)
    assert [p for p, _ in pictures(out)] == [p for p, _ in pictures(video)]
    np.testing.assert_allclose([t for _, t in pictures(out)], [t for _, t in pictures(video)], atol=1e-3)
    assert loudest_hz(out) == pytest.approx(1000, abs=2)
    with av.open(str(out)) as container:
        assert [s.type for s in container.streams] == ["video", "audio"]


@pytest.mark.parametrize("sample_rate", [16000, 44100, 48000])
def test_sound_and_picture_end_together(tmp_path: Path, make_video: Make, sample_rate: int) -> None:
    video = make_video(tmp_path / "in.mp4", seconds=1.7, fps=10)
    out = write_video_with_audio(tmp_path / "out.mp4", video, tone(1.7, sample_rate), sample_rate)
    assert sound_seconds(out) == pytest.approx(1.7, abs=1 / sample_rate)


def test_a_picture_that_starts_late_keeps_its_sound_beside_it(tmp_path: Path, make_video: Make) -> None:
    """A click on the first frame stays on the first frame."""
    video, late = make_video(tmp_path / "in.mp4", seconds=1.0, hz=0), tmp_path / "late.mkv"
    with av.open(str(video)) as incoming, av.open(str(late), "w") as outgoing:
        stream = incoming.streams.video[0]
        copied = outgoing.add_stream_from_template(stream)
        for packet in incoming.demux(stream):
            if packet.dts is not None:
                shift = round(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copied
                outgoing.mux(packet)
    assert pictures(late)[0][1] == pytest.approx(0.5, abs=2e-3)
    out = write_video_with_audio(tmp_path / "out.mkv", late, tone(1.0, 16000), 16000)
    with av.open(str(out)) as container:
        first = next(p for p in container.demux(audio=0))
        assert float(first.pts * first.time_base) == pytest.approx(0.5, abs=AAC_FRAME / 16000 + 2e-3)


def test_old_avi_files_without_presentation_times(tmp_path: Path, make_video: Make) -> None:
    video = make_video(tmp_path / "in.avi", seconds=1.0, hz=0)
    out = write_video_with_audio(tmp_path / "out.mp4", video, tone(1.0, 16000), 16000)
    assert len(pictures(out)) == len(pictures(video)) == 10


def test_refusals_leave_no_file(tmp_path: Path, make_video: Make, make_audio: Make) -> None:
    video, sound = make_video(tmp_path / "in.mp4"), make_audio(tmp_path / "in.wav")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(video.read_bytes()[:200])
    before = set(tmp_path.iterdir())
    for source, suffix, waveform, error, message in (
        (video, ".mp3", tone(1, 16000), ValueError, "suffix '.mp3'"),
        (video, ".webm", tone(1, 16000), MediaError, "cannot put mpeg4 video into .webm"),
        (video, ".mp4", torch.zeros(2, 8), ValueError, r"shape \(2, 8\)"),
        (video, ".mp4", torch.tensor([0.0, float("nan")]), ValueError, "NaN"),
        (sound, ".mp4", tone(1, 16000), MediaError, "no video stream"),
        (tmp_path / "none.mp4", ".mp4", tone(1, 16000), MediaError, "not found"),
        (broken, ".mp4", tone(1, 16000), MediaError, "cannot open"),
    ):
        with pytest.raises(error, match=message):
            write_video_with_audio(tmp_path / f"out{suffix}", source, waveform, 16000)
    assert set(tmp_path.iterdir()) == before


def test_durations_are_the_video_streams(tmp_path: Path, make_video: Make, make_audio: Make) -> None:
    assert video_seconds(Media(make_video(tmp_path / "v.mp4", seconds=1.5, fps=10))) == pytest.approx(1.5, abs=1e-3)
    with pytest.raises(MediaError, match="no video stream"):
        video_seconds(Media(make_audio(tmp_path / "a.wav")))
    with pytest.raises(MediaError, match=r"1\.5 s long, more than 1 s"):
        video_seconds(Media(tmp_path / "v.mp4"), MediaLimits(max_seconds=1))


def test_wav_round_trip(tmp_path: Path) -> None:
    waveform = torch.cat([tone(0.1, 8000), torch.tensor([1.5, -1.5])])
    found, rate = read_wav(write_wav(tmp_path / "deep" / "x.wav", waveform.double(), 8000))
    assert rate == 8000
    torch.testing.assert_close(found, waveform.clamp(-1, 1), atol=2**-14, rtol=0)


def test_real_videos(shared_data: Path, tmp_path: Path) -> None:
    for video in sorted((shared_data / "vggsound_sample").glob("*.mp4")):
        seconds = video_seconds(Media(video))
        out = write_video_with_audio(tmp_path / video.name, video, tone(seconds, 16000), 16000)
        assert pictures(out) == pictures(video)
        assert sound_seconds(out) == pytest.approx(seconds, abs=1 / 16000)
