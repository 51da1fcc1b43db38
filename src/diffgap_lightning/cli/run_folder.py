"""A run's folder: who trains in it, and which of its checkpoints a command reads."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO

from diffgap_lightning.atomic import check_writable

CHECKPOINTS = "checkpoints"
LOCK = ".lock"
_SHARDED = (".metadata", "checkpoint")  # in the folders of FSDP and its like, and of DeepSpeed


class RunLock:
    """Held while a process trains in a folder: a second one would replace the checkpoints of the first.

    It is the process's own: the system takes it back when the process ends, however it ends, and data-loading
    processes do not inherit it. Systems without such locks (Windows, some network file systems) refuse nothing.

    Raises:
        ValueError: (in `with`) another process holds it.
        OSError: (in `with`) the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Take the lock, of a folder that can be written to."""
        try:
            for folder in (self.folder, self.folder / CHECKPOINTS):
                check_writable(folder)
        except OSError as error:
            raise type(error)(f"--trainer.default_root_dir: {error}") from error
        try:
            import fcntl
        except ImportError:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"--trainer.default_root_dir: {holder} is training in {self.folder}; give this run another folder, "
                "or wait for it"
            ) from error
        except OSError as error:
            warnings.warn(f"{self.folder}: cannot be locked ({error}); keep other runs out of it", stacklevel=2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def resolve_checkpoint(given: str | None, folder: str, command: str) -> str | None:
    """Which checkpoint file a command reads.

    Args:
        given: The value of `--ckpt_path`: a file, `"best"` or `"last"` of the run's folder, `"auto"` for the furthest
            one in it, or None.
        folder: The run's folder.
        command: The command; all but `fit` read `"best"` by default.

    Returns:
        The file's path, or None to start anew.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint.
    """
    if given is None and command == "fit":
        return None
    if given == "auto":
        furthest = furthest_checkpoint(Path(folder) / CHECKPOINTS)
        if furthest is not None or command == "fit":
            return None if furthest is None else str(furthest)
    path = Path(folder) / CHECKPOINTS / f"{given or 'best'}.ckpt" if given in (None, "best", "last") else Path(given)
    if path.is_dir():  # sharded checkpoints are folders: the strategy that wrote one reads it
        if not any((path / name).exists() for name in _SHARDED):
            raise ValueError(f"--ckpt_path: {path} is a folder, and none of a sharded checkpoint; give a file")
        return str(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"--ckpt_path: {path} not found; train first with `diffgap fit --trainer.default_root_dir {folder}`, "
            "or give another file"
        )
    from diffgap_lightning.torch_files import check_archive
    from diffgap_lightning.training.restore import read_checkpoint

    try:
        if not check_archive(path):
            raise ValueError(f"{path} is not a checkpoint written by fit, or is truncated; give another one")
        read_checkpoint(path)  # tensors are only mapped: it costs little to refuse a bad file before a run starts
    except ValueError as error:
        raise ValueError(f"--ckpt_path: {error}") from error
    return str(path)


def furthest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder, whatever the files' times say; `last.ckpt` among equals."""
    import torch

    found: list[tuple[int, bool, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            steps = int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"])
        except Exception as error:  # whatever is wrong with a file, another one may be right
            warnings.warn(f"{path}: passed over, it cannot be read ({str(error).splitlines()[0]})", stacklevel=2)
            continue
        found.append((steps, path.stem == "last", path))
    return max(found)[2] if found else None
