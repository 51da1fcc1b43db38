"""Writing media: a waveform as a wav file, and a waveform as the sound of an existing video.

The video's packets are copied, never decoded: the picture is bit-identical and its timestamps stay. The new sound
starts with the first frame and is encoded as AAC (mp4, mov, mkv) or Opus (webm); soundtracks, subtitles and other
streams of the source are left out. Files are written under a temporary name and renamed when they are whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.atomic import replacing
from diffgap_lightning.data.container import decode_errors, open_container, reason, stream_seconds
from diffgap_lightning.data.media import Media, MediaError, MediaLimits, need

# Suffix -> FFmpeg's name of the container, and the audio codec that players expect in it.
CONTAINERS = {".mp4": ("mp4", "aac"), ".mov": ("mov", "aac"), ".mkv": ("matroska", "aac"), ".webm": ("webm", "libopus")}
_CHUNK = 0.5  # s of sound that is encoded at a time, so that sound and picture are interleaved in the file
_OPUS_RATE = 48000  # Hz; the others of its rates would lose what lies above them


def write_wav(path: str | os.PathLike[str], waveform: Tensor, sample_rate: int) -> Path:
    """Write a mono waveform as 16-bit PCM, atomically; samples beyond [-1, 1] are clipped.

    Args:
        path: The file to write.
        waveform: `(T,)`, floating.
        sample_rate: In Hz.

    Raises:
        ValueError: an empty, non-finite or not one-dimensional waveform.
        ImportError: the extra `media` is not installed.
    """
    samples = _checked(waveform)
    soundfile: Any = need("soundfile")
    with replacing(path) as work:
        soundfile.write(str(work), samples, sample_rate, format="WAV", subtype="PCM_16")
    return Path(path)


def read_wav(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """`(T,)` float32 (channels averaged) and its sample rate in Hz, of a file that `write_wav` or anyone wrote."""
    soundfile: Any = need("soundfile")
    samples, sample_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    return torch.from_numpy(samples.mean(axis=1)), int(sample_rate)


def video_seconds(media: Media, limits: MediaLimits | None = None) -> float:
    """Duration of a file's video stream, in s.

    Raises:
        MediaError: the file is missing, broken, without video or too long.
    """
    limits = limits or MediaLimits()
    media.check(limits)
    with open_container(media) as container:
        if not container.streams.video:
            raise MediaError("no video stream")
        seconds = stream_seconds(container, container.streams.video[0])
    if not seconds > 0:
        raise MediaError("video stream without a duration; remux it")
    if seconds > limits.max_seconds:
        raise MediaError(f"{seconds:.1f} s long, more than {limits.max_seconds:g} s")
    return seconds


def write_video_with_audio(
    path: str | os.PathLike[str], video: Media | str | os.PathLike[str], waveform: Tensor, sample_rate: int
) -> Path:
    """Write a copy of a video with another sound, atomically.

    Args:
        path: The file to write; its suffix, one of `CONTAINERS`, decides the container.
        video: Where the picture comes from.
        waveform: `(T,)`, floating; it starts with the first frame.
        sample_rate: In Hz.

    Raises:
        ValueError: an unknown suffix or an unusable waveform.
        MediaError: the video is missing, broken, without a video stream, or not of a kind that the container holds.
        ImportError: the extra `media` is not installed.
    """
    path, samples = Path(path), _checked(waveform)
    if path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{path.name}: got suffix {path.suffix!r}, expected one of {', '.join(CONTAINERS)}")
    container_format, codec = CONTAINERS[path.suffix.lower()]
    av: Any = need("av")
    source = video if isinstance(video, Media) else Media(Path(video))
    source.check(MediaLimits())
    with open_container(source) as incoming, replacing(path) as work:
        if not incoming.streams.video:
            raise MediaError("no video stream")
        picture = incoming.streams.video[0]
        with av.open(os.path.abspath(work), "w", format=container_format) as outgoing:
            try:
                copied = outgoing.add_stream_from_template(picture)
                sound = _Sound(outgoing, codec, samples, sample_rate, start=_start_seconds(picture))
                for packet in _packets(incoming, picture):
                    sound.encode_until(float(packet.dts * packet.time_base) + _CHUNK)
                    packet.stream = copied
                    outgoing.mux(packet)
                sound.finish()
            except decode_errors() as error:
                name = picture.codec_context.name
                raise MediaError(f"cannot put {name} video into {path.suffix} ({reason(error)})") from error
    return path


def playable_suffix(video: Path) -> str:
    """`.webm` for sources in that container, `.mp4` for all others: what browsers play."""
    return ".webm" if video.suffix.lower() == ".webm" else ".mp4"


class _Sound:
    """Encodes a waveform into a container little by little."""

    def __init__(self, container: Any, codec: str, samples: np.ndarray, sample_rate: int, start: float) -> None:
        self._av: Any = need("av")
        rate = _OPUS_RATE if codec == "libopus" else sample_rate
        self._container, self._samples, self._rate = container, samples, sample_rate
        self._stream = container.add_stream(codec, rate=rate)
        self._stream.layout = "mono"
        self._stream.bit_rate = min(128_000, 5 * rate)
        self._start, self._done = start, 0

    def encode_until(self, seconds: float) -> None:
        """Encode what belongs before a time of the video's clock."""
        size = round(_CHUNK * self._rate)
        while self._done < len(self._samples) and self._start + self._done / self._rate < seconds:
            block = self._samples[self._done : self._done + size]
            frame = self._av.AudioFrame.from_ndarray(block[None], format="fltp", layout="mono")
            frame.sample_rate = self._rate
            frame.time_base = Fraction(1, self._rate)
            frame.pts = round(self._start * self._rate) + self._done
            self._container.mux(self._stream.encode(frame))
            self._done += len(block)

    def finish(self) -> None:
        """Encode the rest."""
        self.encode_until(float("inf"))
        self._container.mux(self._stream.encode())


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets that a muxer accepts; old containers such as avi state decoding times only."""
    for packet in container.demux(stream):
        if packet.dts is None:
            continue  # the end
        if packet.pts is None:
            if stream.codec_context.has_b_frames:
                raise ValueError("frames without timestamps; remux the video first")
            packet.pts = packet.dts
        yield packet


def _start_seconds(stream: Any) -> float:
    return max(0.0, float((stream.start_time or 0) * stream.time_base))


def _checked(waveform: Tensor) -> np.ndarray:
    """`(T,)` float32 within [-1, 1], on the CPU."""
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"waveform: got shape {tuple(waveform.shape)}, expected (T,) with at least one sample")
    samples = waveform.detach().float().cpu()
    if not torch.isfinite(samples).all():
        raise ValueError("waveform: got NaN or infinite samples; the generator overflowed, try float32")
    return np.ascontiguousarray(samples.clamp(-1, 1).numpy())
