"""Opening mp4 and other containers with PyAV, without letting their content reach for anything else.

FFmpeg tells formats by content, and some formats are lists of further addresses to open (a playlist can be named
`.mp4`). So only the demultiplexers of `FORMATS` and no protocol but plain files are allowed.
"""

from __future__ import annotations

from typing import Any

from diffgap_lightning.data.media import Media, MediaError, need

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,aac,mp3,ogg,flac,wav"
_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}


def open_container(media: Media) -> Any:
    """An opened PyAV input container.

    Raises:
        MediaError: not a container of `FORMATS`.
        ImportError: the extra `media` is not installed.
    """
    av: Any = need("av")
    try:
        return av.open(media.open(), options=dict(_OPTIONS))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"cannot open container: {reason(error)}") from error


def decode_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on damaged data."""
    av: Any = need("av")
    return (av.FFmpegError, OSError, ValueError)


def seek_to(container: Any, stream: Any, seconds: float) -> None:
    """Move to the last keyframe at or before a time, in s; to the beginning where the format cannot seek there."""
    container.seek(max(0, int(seconds / stream.time_base)), stream=stream, backward=True)


def stream_seconds(container: Any, stream: Any) -> float:
    """The duration of a stream in s, or of its container where the stream states none; 0 if neither does."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6


def reason(error: BaseException) -> str:
    """The first line of a decoder's complaint, without the file's name, so that equal reasons can be counted."""
    text = str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:120]
