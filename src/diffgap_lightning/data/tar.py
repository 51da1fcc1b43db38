"""Tar members written with known byte offsets, and read from a byte range in memory without copying them.

Nothing is ever extracted to disk, so a member's path can point nowhere. Only regular files are handed out: links,
devices and sparse files (whose claimed size has no bytes behind it) are passed over.

Python's `tarfile` believes the sizes in headers: a negative one makes it read the same header for ever, a huge one in
an extended header makes it ask for that much memory. Here it reads through a window that is as long as the file and
gives headers alone, and it must move forward.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

RECORD = 512
END = b"\0" * (2 * RECORD)
MAX_HEADER = 1 << 20  # bytes of an extended header: a longer path or list of attributes is no honest one


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


def iter_headers(file: IO[bytes] | Any, whole: bool = False) -> Iterator[tarfile.TarInfo]:
    """Headers of all members of a tar, in order; the file may be read elsewhere between two of them.

    Args:
        file: A seekable binary file.
        whole: Also refuse a tar that stops at something else than a block of zeros. `tarfile` stops without a word at a
            damaged header.

    Raises:
        tarfile.TarError: no tar, or a damaged or lying header.
    """
    window = _Window(file)
    end = -1
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it remembers every member; a shard may have a million
                if member.size < 0 or member.offset_data <= end:
                    raise tarfile.ReadError(f"the header at byte {member.offset} claims {member.size} bytes")
                end = member.offset_data
                yield member
            stopped = tar.offset
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:  # tarfile's parser lets ValueError, OverflowError, RecursionError and others through
        reason = " ".join(str(error).split())[:200]
        raise tarfile.ReadError(
            f"damaged header after byte {max(end, 0)} ({type(error).__name__}: {reason})"
        ) from error
    if whole:
        window.seek(stopped)
        block = window.read(RECORD)
        if len(block) < RECORD or block.count(0) != RECORD:
            raise tarfile.ReadError(f"no end mark at byte {stopped}: truncated or altered there")


def iter_members(buffer: np.ndarray) -> Iterator[tuple[str, memoryview]]:
    """Name and bytes of every regular file in a `(size,)` uint8 range of a tar; the bytes share the buffer's memory.

    Raises:
        tarfile.TarError: the range is no tar, or ends within a member.
    """
    view = buffer.data
    for member in iter_headers(_View(view)):
        if not member.isreg() or member.issparse():
            continue
        data = view[member.offset_data : member.offset_data + member.size]
        if len(data) != member.size:
            raise tarfile.ReadError(f"{member.name} claims {member.size} bytes, {len(data)} are there")
        yield member.name, data


class _Window(io.RawIOBase):
    """A file as `tarfile` may see it: positions within it, and reads as long as a header."""

    def __init__(self, file: IO[bytes] | Any) -> None:
        self._file, self._at = file, 0
        self._size = file.seek(0, io.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        if self._at < 0:
            raise tarfile.ReadError(f"a header points to byte {self._at}")
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"an extended header claims {size} bytes")
        count = min(size, max(0, self._size - self._at))
        self._file.seek(min(self._at, self._size))
        data = self._file.read(count)
        self._at += len(data)
        return data


class _View(io.RawIOBase):
    """A read-only file over a buffer; unlike `io.BytesIO` it copies only what is read."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset if whence == io.SEEK_SET else len(self._view)
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._view[self._at : self._at + size])
        self._at += len(data)
        return data
