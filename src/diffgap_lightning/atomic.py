"""Files and folders that are replaced whole: a reader, a killed process or a power cut leaves the old or the new one.

    temporary name beside it  ->  write  ->  flush to the disk  ->  rename  ->  flush the folder's entry

Without the flushes a rename can reach the disk before the bytes that it names. A folder that exists already changes
places with the new one in a single call where the system has it (Linux, local file systems); elsewhere it steps aside
first, and between the two renames there is neither.

`check_writable` and `check_replaceable` refuse a place before the work is done whose result is to go there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` on success, deleted on any exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    work = Path(name)
    try:
        with naming(path):
            yield work
            work.chmod(0o644)
            commit(work, path)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a system error that names no file, such as "no space left on device", the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that nothing can be written to; one that does not exist yet is judged by the one to make it in.

    Raises:
        OSError: one sentence that names the folder and what stands in the way.
    """
    nearest = next(p for p in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(p))
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
        tempfile.TemporaryFile(dir=nearest).close()  # it has no name, where the system can do that
    except OSError as error:
        where = "" if error.errno == errno.ENOTDIR or nearest == Path(folder) else f" in {nearest}"
        raise type(error)(f"{folder}: cannot be written to ({error.strerror}{where}); choose another folder") from error


def check_replaceable(path: str | os.PathLike[str], folder: bool = False) -> None:
    """Refuse a path that no file, or no `folder`, can be put in the place of.

    Raises:
        OSError: one sentence that names it.
    """
    if os.path.isdir(path) and not folder:
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file to write")
    if os.path.lexists(path) and not os.path.isdir(path) and folder:
        raise NotADirectoryError(f"{path}: is not a folder, and a folder is to be written there; choose another name")
    if os.path.ismount(path):
        raise OSError(f"{path}: is where a file system is mounted, which cannot be replaced; name a folder inside it")
    if folder:
        check_writable(path)
    if not folder or os.path.exists(path):
        check_writable(Path(path).parent)


def commit(work: Path, path: Path) -> None:
    """Rename a whole file to its name, durably."""
    flush(work)
    os.replace(work, path)
    flush(path.parent)


def replace_folder(work: Path, folder: Path) -> None:
    """Rename a whole folder to its name, durably; what was there before is removed afterwards."""
    for path in (*(p for p in work.rglob("*") if p.is_file()), work):
        flush(path)
    if not folder.exists():
        work.rename(folder)
    elif _exchange(work, folder):
        shutil.rmtree(work, ignore_errors=True)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        folder.rename(aside / "old")
        work.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Write a file or a folder's entries to the disk; a file system that cannot is left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened on Windows
        return
    try:
        if path.is_dir():
            with suppress(OSError):
                os.fsync(handle)
        else:
            os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one call; False where the system or the file system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    return call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
