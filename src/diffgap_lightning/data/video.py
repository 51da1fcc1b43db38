"""Video decoding: frames at a given rate, as uint8 RGB.

The frame of time t is the one on screen then: the last one whose timestamp is at most t. At `fps` frames a second and
phase p a window [s, s + l) gives round(l fps) frames at s + (k + p) / fps, whatever the file's own rate (frames are
dropped or repeated, never blended). p = 0 is the beginning of each interval; ffmpeg's filter `fps` takes its middle.
Decoding starts at the keyframe before the window and keeps only what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.data.container import decode_errors, open_container, reason, seek_to, stream_seconds
from diffgap_lightning.data.media import Media, MediaError, MediaLimits, iter_windows

_TOLERANCE = 2e-3  # s; containers round timestamps to as little as 1 ms


def video_windows(
    media: Media,
    fps: float,
    window: float | None = None,
    hop: float | None = None,
    *,
    first_only: bool = False,
    phase: float = 0.0,
    short_side: int | None = None,
    limits: MediaLimits | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Decode a clip's frames window by window.

    Args:
        media: The clip.
        fps: Frames a second of the result.
        window: In s; None gives one window over the whole clip (bounded by `limits`).
        hop: In s; `window` by default.
        first_only: Stop after the first window.
        phase: Of the frames in their intervals, in [0, 1).
        short_side: Reduce frames so that their shorter side has this many pixels; smaller frames stay as they are.
        limits: What one file may cost.

    Yields:
        `(start, frames)`: seconds from the clip's beginning; `(T, 3, H, W)` uint8 RGB.

    Raises:
        MediaError: the file is missing, broken, without video, too large or too long.
        ImportError: the extra `media` is not installed.
    """
    limits = limits or MediaLimits()
    media.check(limits)
    reader = _FrameReader(media, fps, phase, short_side, limits)
    try:
        yield from iter_windows(reader, media, limits, window, hop, first_only)
    finally:
        reader.close()


class _FrameReader:
    """PyAV: the first video stream of a container."""

    def __init__(self, media: Media, fps: float, phase: float, short_side: int | None, limits: MediaLimits) -> None:
        if not fps > 0:
            raise ValueError(f"fps: got {fps}, expected a positive number")
        if not 0 <= phase < 1:
            raise ValueError(f"phase: got {phase}, expected at least 0 and less than 1")
        self._fps, self._phase = fps, phase
        self._container = open_container(media)
        try:
            if not self._container.streams.video:
                raise MediaError("no video stream")
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1  # files are decoded in parallel, by the loader's workers
            self._size = _output_size(self._stream.width, self._stream.height, short_side, limits)
            self._origin = float((self._stream.start_time or 0) * self._stream.time_base)
            self.duration = stream_seconds(self._container, self._stream)
        except MediaError:
            self._container.close()
            raise

    def read(self, start: float, length: float) -> Tensor:
        """`(T, 3, H, W)` uint8: frames on screen at start + (k + phase) / fps, T = round(length x fps), at least 1."""
        count = max(1, round(length * self._fps))
        times = [start + (k + self._phase) / self._fps + _TOLERANCE for k in range(count)]
        chosen: list[np.ndarray] = []
        shown: Any = None
        try:
            seek_to(self._container, self._stream, self._origin + start)
            for frame in self._container.decode(self._stream):
                if frame.pts is None:
                    continue
                at = float(frame.pts * self._stream.time_base) - self._origin
                if at > times[len(chosen)] and shown is not None:
                    image = self._image(shown)
                    while len(chosen) < count and times[len(chosen)] < at:
                        chosen.append(image)
                    if len(chosen) == count:
                        break
                shown = frame
        except decode_errors() as error:
            raise MediaError(f"cannot decode video: {reason(error)}") from error
        if shown is None:
            raise MediaError(f"no frames at {start:g} s")
        if len(chosen) < count:  # the stream ended: its last frame stays on screen
            end = float((shown.pts + (shown.duration or 0)) * self._stream.time_base) - self._origin
            if times[-1] - end > 0.1 * length + 1 / self._fps:
                raise MediaError(f"truncated video: it ends at {end:.2f} s, {start + length:.2f} s were announced")
            chosen.extend([self._image(shown)] * (count - len(chosen)))
        return torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).contiguous()

    def _image(self, frame: Any) -> np.ndarray:
        """`(H, W, 3)` uint8 RGB at the output size."""
        width, height = self._size
        return frame.reformat(width=width, height=height, format="rgb24").to_ndarray()

    def close(self) -> None:
        """Release the file."""
        self._container.close()


def _output_size(width: int, height: int, short_side: int | None, limits: MediaLimits) -> tuple[int, int]:
    """`(width, height)` of the result; only ever smaller than the source, aspect ratio kept."""
    if width <= 0 or height <= 0:
        raise MediaError("video stream without a frame size")
    if width * height > limits.max_pixels:
        raise MediaError(f"frames of {width} x {height} pixels exceed {limits.max_pixels}")
    scale = 1.0 if short_side is None else min(1.0, short_side / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
