"""Audio decoding: any file or container to mono float32 waveforms at the encoder's sample rate.

Channels are averaged, then the signal is resampled by a windowed sinc (torchaudio) and clamped to [-1, 1], because
lossy codecs and resampling overshoot. Every window is read and resampled on its own, so its samples do not depend on
which other windows were read. wav, flac, mp3 and ogg are read by soundfile; mp4 and other containers by PyAV.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffgap_lightning.data.container import decode_errors, open_container, reason, seek_to, stream_seconds
from diffgap_lightning.data.media import Media, MediaError, MediaLimits, iter_windows, need

_SOUNDFILE = {"wav", "flac", "mp3", "ogg", "opus"}


def audio_windows(
    media: Media,
    sample_rate: int,
    window: float | None = None,
    hop: float | None = None,
    *,
    first_only: bool = False,
    limits: MediaLimits | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Decode a clip's audio window by window.

    Args:
        media: The clip.
        sample_rate: Of the result, in Hz.
        window: In s; None gives one window over the whole clip (bounded by `limits`).
        hop: In s; `window` by default.
        first_only: Stop after the first window.
        limits: What one file may cost.

    Yields:
        `(start, waveform)`: seconds from the clip's beginning; `(T,)` float32 in [-1, 1],
        T = round(length x sample_rate) up to one sample.

    Raises:
        MediaError: the file is missing, broken, silent of streams, too large or too long.
        ImportError: the extra `media` is not installed.
    """
    limits = limits or MediaLimits()
    media.check(limits)
    by_soundfile = media.format in _SOUNDFILE
    reader: _SoundFileReader | _ContainerReader = _SoundFileReader(media) if by_soundfile else _ContainerReader(media)
    try:
        for start, signal in iter_windows(reader, media, limits, window, hop, first_only):
            yield start, _finish(signal, reader.sample_rate, sample_rate)
    finally:
        reader.close()


def _finish(channels: Tensor, source_rate: int, sample_rate: int) -> Tensor:
    """`(C, T)` at the file's rate -> `(T',)` mono at `sample_rate`, in [-1, 1]."""
    if channels.shape[1] == 0:
        raise MediaError("no audio samples in the window")
    mono = channels.mean(dim=0)
    if not torch.isfinite(mono).all():
        raise MediaError("NaN or infinite samples")
    return resample(mono, source_rate, sample_rate).clamp_(-1.0, 1.0)


def resample(waveform: Tensor, source_rate: int, sample_rate: int) -> Tensor:
    """`(..., T)` at one rate to `(..., T')` at another (both in Hz), by a windowed sinc; itself at equal rates."""
    return waveform if source_rate == sample_rate else _resampler(source_rate, sample_rate)(waveform)


@lru_cache(maxsize=16)
def _resampler(source_rate: int, sample_rate: int) -> nn.Module:
    """A sinc resampler; its kernel is computed once for a pair of rates."""
    transforms: Any = need("torchaudio.transforms")
    return transforms.Resample(source_rate, sample_rate)


class _SoundFileReader:
    """libsndfile: sample-exact seeking."""

    def __init__(self, media: Media) -> None:
        soundfile: Any = need("soundfile")
        source: Any = media.open()
        if isinstance(source, str) and os.name == "posix":
            source = os.fsencode(source)  # a name need not be text
        try:
            self._file = soundfile.SoundFile(source)
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise MediaError(f"cannot open audio: {reason(error)}") from error
        self._error = soundfile.LibsndfileError
        self.sample_rate = int(self._file.samplerate)
        self.duration = self._file.frames / self.sample_rate

    def read(self, start: float, length: float) -> Tensor:
        """`(C, T)` float32 of [start, start + length) s."""
        first = round(start * self.sample_rate)
        count = round((start + length) * self.sample_rate) - first
        try:
            self._file.seek(first)
            block = self._file.read(count, dtype="float32", always_2d=True)
        except (self._error, RuntimeError, OSError) as error:
            raise MediaError(f"cannot decode audio: {reason(error)}") from error
        if len(block) < 0.9 * count:
            raise MediaError(f"truncated audio: {len(block)} of {count} samples at {start:g} s")
        return torch.from_numpy(np.ascontiguousarray(block.T))

    def close(self) -> None:
        """Release the file."""
        self._file.close()


class _ContainerReader:
    """PyAV: the first audio stream of a container."""

    def __init__(self, media: Media) -> None:
        self._container = open_container(media)
        if not self._container.streams.audio:
            self._container.close()
            raise MediaError("no audio stream")
        self._stream = self._container.streams.audio[0]
        self.sample_rate = int(self._stream.rate or 0)
        self._origin = float((self._stream.start_time or 0) * self._stream.time_base)
        self.duration = stream_seconds(self._container, self._stream)
        if self.sample_rate <= 0 or self.duration <= 0:
            self._container.close()
            raise MediaError("audio stream without a sample rate or duration; remux it")

    def read(self, start: float, length: float) -> Tensor:
        """`(C, T)` float32 of [start, start + length) s; decoding starts a little earlier and is cut by timestamps."""
        first = round(start * self.sample_rate)
        count = round((start + length) * self.sample_rate) - first
        blocks: list[np.ndarray] = []
        position: int | None = None  # sample number of the first kept block
        have = 0
        try:
            seek_to(self._container, self._stream, self._origin + start - 0.1)
            converter = need("av").AudioResampler(format="fltp", rate=self.sample_rate)
            for frame in self._container.decode(self._stream):
                if frame.pts is None:
                    continue
                at = round((float(frame.pts * self._stream.time_base) - self._origin) * self.sample_rate)
                end = at + round(frame.samples * self.sample_rate / frame.sample_rate)
                if end <= first:
                    continue
                position = at if position is None else position
                blocks.extend(part.to_ndarray() for part in converter.resample(frame))
                have = end - first
                if have >= count:
                    break
        except decode_errors() as error:
            raise MediaError(f"cannot decode audio: {reason(error)}") from error
        if position is None or have < 0.9 * count - 2048:
            raise MediaError(f"truncated audio: {max(have, 0)} of {count} samples at {start:g} s")
        signal = np.concatenate(blocks, axis=1)[:, max(0, first - position) :]
        return torch.from_numpy(np.ascontiguousarray(signal[:, :count]))

    def close(self) -> None:
        """Release the file."""
        self._container.close()
