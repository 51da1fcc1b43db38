"""Where shards lie: a local path, a glob, a brace pattern, or an `http(s)`, `s3` or `gs` address through fsspec.

    shards/train                              a folder (its manifest.json says what is in it)
    shards/train/*.tar                        a glob, local or on s3 and gs
    https://host/train-{000000..000041}.tar   a brace pattern

Only the schemes in `REMOTE_SCHEMES` are opened. `pipe:` addresses, which other readers hand to a shell, are refused by
name, and so is every other scheme, and so are link-local addresses such as 169.254.169.254, where cloud machines keep
their credentials, also where a name or a redirect leads to them; `http_client.py` has the rules. Reading from the
network is tried again before it counts as a failure.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from diffgap_lightning.data.hosts import Nearness, RefusedAddressError, literal_nearness

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs")
RETRY_DELAYS = (0.5, 2.0)

T = TypeVar("T")


def check_url(url: str) -> str:
    """Return `url` with a leading `file://` removed, if it is one that may be opened.

    Raises:
        ValueError: a `pipe:` address, a scheme that is not among `REMOTE_SCHEMES`, or a link-local host.
    """
    if url.startswith("file://"):
        return url.removeprefix("file://")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//|:)?", url)
    scheme = found.group(1).lower() if found else ""
    if scheme == "pipe":
        raise ValueError(f"{url}: pipe: addresses run a shell command and are never opened; give the file's address")
    if found and found.group(2) is not None and (scheme not in REMOTE_SCHEMES or found.group(2) == ":"):
        raise ValueError(f"{url}: cannot open {scheme}: addresses, expected a path or {', '.join(REMOTE_SCHEMES)}")
    if scheme in ("http", "https") and literal_nearness(urlsplit(url).hostname or "") is Nearness.CREDENTIALS:
        raise ValueError(f"{url}: a link-local address, where machines keep their credentials; it is never opened")
    return url


def is_remote(url: str) -> bool:
    """Whether `url` is read over the network."""
    return url.partition("://")[0].lower() in REMOTE_SCHEMES and "://" in url


def join_url(folder: str, name: str) -> str:
    """The address of `name` inside `folder`."""
    return posixpath.join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def read_bytes(url: str) -> bytes:
    """The whole of a small file."""
    check_url(url)
    if is_remote(url):
        return _retry(url, lambda fs: fs.cat_file(url))
    return Path(url).read_bytes()


def read_range(url: str, offset: int, size: int) -> np.ndarray:
    """`size` bytes from `offset`, as a fresh `(size,)` uint8 array.

    Raises:
        OSError: the file is missing, or ends before that.
    """
    check_url(url)
    if is_remote(url):
        data = _retry(url, lambda fs: fs.cat_file(url, start=offset, end=offset + size))
        if len(data) > size:  # a server without range requests sends everything
            data = data[offset : offset + size]
        if len(data) < size:
            raise OSError(f"truncated: {len(data)} of {size} bytes at {offset}")
        return np.frombuffer(bytearray(data), dtype=np.uint8)
    with open(url, "rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        if length < offset + size:  # checked before anything is allocated
            raise OSError(f"truncated: the file has {length} bytes, expected at least {offset + size}")
        buffer = np.empty(size, dtype=np.uint8)
        file.seek(offset)
        done = 0
        while done < size:
            count = file.readinto(buffer.data[done:])
            if not count:
                raise OSError(f"truncated: {done} of {size} bytes at {offset}")
            done += count
    return buffer


def open_binary(url: str) -> Any:
    """A seekable binary file."""
    check_url(url)
    if is_remote(url):
        return _retry(url, lambda fs: fs.open(url, "rb"))
    return open(url, "rb")


def file_size(url: str) -> int:
    """Bytes in the file.

    Raises:
        OSError: the file is missing.
    """
    check_url(url)
    return int(_retry(url, lambda fs: fs.size(url))) if is_remote(url) else os.stat(url).st_size


def list_tars(folder: str) -> list[str]:
    """Names of the `.tar` files in a folder; none where the folder's host cannot list (http)."""
    if not is_remote(folder):
        return sorted(path.name for path in Path(folder).glob("*.tar"))
    if folder.partition("://")[0].lower().startswith("http"):
        return []
    return sorted(posixpath.basename(p) for p in _retry(folder, lambda fs: fs.glob(join_url(folder, "*.tar"))))


def expand_braces(text: str) -> list[str]:
    """`a{0..2}` -> `a0 a1 a2`; a path that exists is one name, whatever is in it."""
    if "{" not in text or os.path.exists(text):
        return [text]
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        return list(braceexpand(text))
    except UnbalancedBracesError as error:
        raise ValueError(f"{text}: braces do not match ({error}); write e.g. train-{{000000..000041}}.tar") from error


def expand_glob(url: str) -> list[str]:
    """The files that a glob matches, sorted; an address without wildcards, or of a file that exists, as it is."""
    if not any(c in url for c in "*?[") or url.startswith(("http://", "https://")) or os.path.exists(url):
        return [url]
    if is_remote(url):
        fs = _remote(url)
        found = sorted(fs.unstrip_protocol(path) for path in fs.glob(url))
    else:
        found = sorted(glob.glob(url))
    if not found:
        raise FileNotFoundError(f"{url}: no file matches")
    return found


def _remote(url: str) -> Any:
    """The file system behind an address; its package may be an extra one (s3fs, gcsfs, aiohttp)."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        if scheme.lower() in ("http", "https"):
            from diffgap_lightning.data.http_client import http_session

            return fsspec.filesystem(scheme.lower(), get_client=http_session)
        return fsspec.filesystem(scheme.lower())
    except ImportError as error:
        raise ImportError(f"{url}: reading {scheme} addresses needs another package ({error})") from error


def _retry(url: str, read: Callable[[Any], T]) -> T:
    """Try again what the network may have failed; a missing file is final, and so is an address that is refused.

    Raises:
        OSError: whatever happened.
    """
    fs = _remote(url)
    for delay in (*RETRY_DELAYS, None):
        try:
            return read(fs)
        except Exception as error:  # each file system has its own exceptions
            if refused := _refusal(error):
                raise PermissionError(f"{url}: {refused}") from error
            if isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            if delay is None:
                raise OSError(f"{url}: {type(error).__name__}: {error}") from error
            time.sleep(delay)
    raise AssertionError("unreachable")


def _refusal(error: BaseException | None) -> str | None:
    """What `http_client.py` refused, if that is why an error was raised."""
    while error is not None:
        if isinstance(error, RefusedAddressError):
            return str(error)
        error = error.__cause__
    return None
