"""Tar members written with known byte offsets, and read from a byte range in memory without copying them.

Nothing is ever extracted to disk, so a member's path can point nowhere. Only regular files are handed out: links,
devices and sparse files (whose claimed size has no bytes behind it) are passed over.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

RECORD = 512
END = b"\0" * (2 * RECORD)


def write_member(file: IO[bytes] | Any, name: str, parts: list[bytes | memoryview]) -> int:
    """Append one member made of `parts` to an open tar; the same input gives the same bytes.

    Returns:
        Bytes written, a multiple of 512.
    """
    size = sum(len(part) for part in parts)
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    written = file.write(info.tobuf(tarfile.USTAR_FORMAT))
    for part in parts:
        file.write(part)
    padding = -size % RECORD
    file.write(b"\0" * padding)
    return written + size + padding


def iter_members(buffer: np.ndarray) -> Iterator[tuple[str, memoryview]]:
    """Name and bytes of every regular file in a `(size,)` uint8 range of a tar; the bytes share the buffer's memory.

    Raises:
        tarfile.TarError: the range is no tar, or ends within a member.
    """
    view = buffer.data
    with tarfile.open(fileobj=_View(view), mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            data = view[member.offset_data : member.offset_data + member.size]
            if len(data) != member.size:
                raise tarfile.ReadError(f"{member.name} claims {member.size} bytes, {len(data)} are there")
            yield member.name, data
            tar.members = []  # type: ignore[attr-defined]  # a tar file remembers every member; a shard may have a million


class _View(io.RawIOBase):
    """A read-only file over a buffer; unlike `io.BytesIO` it copies only what is read."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else min(len(self._view), self._at + size)
        data = bytes(self._view[self._at : end])
        self._at += len(data)
        return data
