from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.media import Media
from diffgap_lightning.data.video import video_windows
from diffgap_lightning.encoders.cavp import CavpEncoder
from diffgap_lightning.encoders.cavp_inputs import FrameTransform, MelTransform, mel_spectrogram

pytest.importorskip("torchaudio", reason="needs the extra cavp")


def by_hand(waveform: np.ndarray, hop: int = 250) -> np.ndarray:
    """The spectrogram, column by column and filter by filter, in float64."""
    x = np.pad(waveform.astype(np.float64), 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    columns = [np.abs(np.fft.rfft(window * x[s : s + 1024])) for s in range(0, len(x) - 1023, hop)]

    def to_mel(hz: float) -> float:  # Slaney's: linear to 1 kHz, logarithmic above
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    def to_hz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    edges = [to_hz(m) for m in np.linspace(to_mel(125), to_mel(7600), 130)]
    hz = np.linspace(0, 8000, 513)
    rows = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        triangle = np.maximum(0, np.minimum((hz - low) / (middle - low), (high - hz) / (high - middle)))
        rows.append(2 / (high - low) * triangle)
    mel = np.array(rows) @ np.array(columns).T
    return np.clip((20 * np.log10(np.maximum(1e-5, mel)) + 80) / 100, 0, 1)


def test_the_spectrogram_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.sin(torch.arange(9000) * 0.2) + 1e-4 * torch.randn(9000, generator=generator)
    for hop in (250, 256):
        got = mel_spectrogram(x, hop).numpy()
        assert got.shape == (128, 1 + 9000 // hop)
        assert np.abs(got - by_hand(x.numpy(), hop)).max() < 1e-5
    assert 0 <= got.min() < got.max() <= 1


def test_the_transform_gives_64_columns_a_second() -> None:
    transform = MelTransform()
    assert [transform(torch.zeros(n)).shape[1] for n in (64000, 64001, 63999, 160000, 10)] == [256, 257, 256, 640, 16]
    spec = transform(torch.randn(5000))
    assert torch.equal(transform(spec), spec)
    for wrong in (torch.zeros(0), torch.zeros(2, 100), torch.zeros(100, dtype=torch.int16)):
        with pytest.raises(ValueError, match="expected float"):
            transform(wrong)


def test_frames_are_squeezed_to_a_square_as_pillow_does() -> None:
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 30, 47), generator=generator, dtype=torch.uint8)
    large = frames.repeat_interleave(11, 2).repeat_interleave(9, 3)
    transform = FrameTransform()
    for x in (frames, large):
        got = transform(x)
        assert (got.shape, got.dtype) == ((2, 3, 224, 224), torch.uint8)
        for a, b in zip(got, x, strict=True):
            expected = image.fromarray(b.permute(1, 2, 0).numpy()).resize((224, 224), image.Resampling.BILINEAR)
            assert np.abs(np.asarray(expected, dtype=int) - a.permute(1, 2, 0).numpy()).max() <= 1
    assert transform(got) is got
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        transform(torch.rand(2, 3, 8, 8))


def ffmpeg_choice(path: Path, fps: str) -> list[float]:
    """Timestamps of the frames that ffmpeg's filter `fps` takes."""
    av = pytest.importorskip("av")
    from av.filter import Graph

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = Graph()
        source = graph.add_buffer(template=stream, time_base=stream.time_base)
        chosen, sink = graph.add("fps", f"fps={fps}"), graph.add("buffersink")
        source.link_to(chosen)
        chosen.link_to(sink)
        graph.configure()
        seen: dict[bytes, float] = {}
        taken = []
        for frame in [*container.decode(stream), None]:
            if frame is not None:
                seen[frame.to_ndarray(format="rgb24").tobytes()] = float(frame.pts * stream.time_base)
            graph.push(frame)
            while True:
                try:
                    taken.append(seen[graph.pull().to_ndarray(format="rgb24").tobytes()])
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return taken


@pytest.mark.parametrize("fps", [10, 24, 25, 30])
def test_frames_are_taken_where_ffmpeg_takes_them(tmp_path: Path, make_video, read_number, fps: int) -> None:  # type: ignore[no-untyped-def]
    path = make_video(tmp_path / "v.mp4", seconds=3.0, fps=fps)
    ((_, frames),) = video_windows(Media(path), 4.0, phase=CavpEncoder.frame_phase)
    own = [read_number(frame) / fps for frame in frames]
    assert own == pytest.approx(ffmpeg_choice(path, "4")[: len(own)], abs=1e-3)
    with pytest.raises(ValueError, match="phase: got 1"):
        next(video_windows(Media(path), 4.0, phase=1))
