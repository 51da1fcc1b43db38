"""Media to tensors: one waveform or one stack of frames for each window of a file, a path or bytes in memory.

Decoders do not trust their input: what cannot be decoded raises `MediaError` with a short reason (so that a caller can
count it and go on), and `MediaLimits` bounds what a hostile or mistaken file may cost. Audio comes from soundfile or,
for containers such as mp4, from PyAV; frames come from PyAV. Both are in the optional extra `media`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch import Tensor

from diffgap_lightning.data.windows import cut_windows

AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi")
ALREADY_CUT_SLACK = 2.0  # s; a recording at most this much longer than the clip is the clip itself


class MediaError(Exception):
    """One medium cannot be used; the message is the reason, short and without the file's name."""


@dataclass(frozen=True)
class MediaLimits:
    """What one medium may cost; more is refused before it is decoded.

    Args:
        max_bytes: Size of the encoded file.
        max_seconds: Duration of the whole recording.
        max_pixels: Width times height of a frame.
    """

    max_bytes: int = 4 << 30
    max_seconds: float = 4 * 3600.0
    max_pixels: int = 8192 * 4352


@dataclass(frozen=True, slots=True)
class Media:
    """Where one clip's audio or video lies.

    Args:
        source: A file, or its bytes.
        extension: Of the format, lower case, without the dot; the path's own by default.
        start: Of the clip within the recording, in s.
        duration: Of the clip, in s; None runs to the end.
        maybe_cut: The file may hold the clip alone (many downloaders name both alike): if the recording is not longer
            than `duration + ALREADY_CUT_SLACK`, `start` is taken as 0.
    """

    source: Path | bytes
    extension: str = ""
    start: float = 0.0
    duration: float | None = None
    maybe_cut: bool = False

    @property
    def format(self) -> str:
        """The extension that decides the decoder."""
        if self.extension or isinstance(self.source, bytes):
            return self.extension.lower()
        return self.source.suffix[1:].lower()

    def open(self) -> io.BufferedIOBase | str:
        """What soundfile and PyAV open: a whole path, as names such as `-` and `http:x` mean other things to them."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else os.path.abspath(self.source)

    def check(self, limits: MediaLimits) -> None:
        """Refuse missing, empty and oversized files.

        Raises:
            MediaError: with the reason.
        """
        if isinstance(self.source, bytes):
            size = len(self.source)
        elif not os.path.isfile(self.source):  # unlike `is_file`, also where no file can have such a name
            raise MediaError("file not found")
        else:
            size = os.path.getsize(self.source)
        if size == 0:
            raise MediaError("empty file")
        if size > limits.max_bytes:
            raise MediaError(f"file larger than {limits.max_bytes} bytes")


class Reader(Protocol):
    """An opened recording."""

    duration: float

    def read(self, start: float, length: float) -> Tensor:
        """The signal of [start, start + length) s of the recording."""

    def close(self) -> None:
        """Release the file."""


def iter_windows(
    reader: Reader, media: Media, limits: MediaLimits, window: float | None, hop: float | None, first_only: bool
) -> Iterator[tuple[float, Tensor]]:
    """Decode a clip window by window, so that memory holds one window at a time.

    Yields:
        `(start, signal)`: seconds from the clip's beginning, and what the reader gives for that window.

    Raises:
        MediaError: the recording is too long, or ends before the clip starts.
    """
    begin, length = _clip_span(media, reader.duration, limits)
    windows = cut_windows(length, window, hop)
    for start, seconds in windows[:1] if first_only else windows:
        yield start, reader.read(begin + start, seconds)


def _clip_span(media: Media, recorded: float, limits: MediaLimits) -> tuple[float, float]:
    """`(start, length)` of the clip within its recording, in s."""
    if not recorded > 0:
        raise MediaError("no signal: duration 0 s")
    if recorded > limits.max_seconds:
        raise MediaError(f"longer than {limits.max_seconds:g} s")
    start, length = media.start, media.duration
    if media.maybe_cut and length is not None and recorded <= length + ALREADY_CUT_SLACK:
        start = 0.0
    if start >= recorded:
        raise MediaError(f"recording of {recorded:.1f} s ends before the clip's start at {start:g} s")
    rest = recorded - start
    return start, rest if length is None else min(length, rest)


def need(module: str) -> ModuleType:
    """Import an optional module of the extra `media`.

    Raises:
        ImportError: one sentence naming the extra.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"decoding media needs {package} ({error}); install it with pip install 'diffgap-lightning[media]'"
        ) from error
