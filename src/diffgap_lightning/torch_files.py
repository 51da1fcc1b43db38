"""Files that `torch.save` wrote, read as data: no code, no more memory than the file has bytes, one kind of error.

Such a file is a pickle. PyTorch's restricted unpickler builds tensors and plain containers and refuses everything else;
NumPy numbers and arrays are let through, because training scripts store their best metric and their sampler's order as
such, and they are data too. The archive around the pickle is checked first: `torch.save` never compresses, so an entry
that claims to unpack to more than it holds is a bomb. A damaged file makes the unpickler raise almost any exception;
all of them become a `ValueError` that names the file.
"""

from __future__ import annotations

import pickle
import zipfile
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NUMPY_1 = "numpy.core.multiarray"


class HoldsCodeError(ValueError):
    """The file names functions or classes that are no tensors and no plain containers; nothing was called."""


def read_torch_file(path: Path, map_location: Any = "cpu") -> Any:
    """What `torch.save` wrote: tensors (mapped from the file where the format allows it) in plain containers.

    Raises:
        FileNotFoundError: no such file.
        HoldsCodeError: it needs more than tensors and plain values.
        ValueError: damaged, truncated, or an archive that claims more than it holds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    archive = check_archive(path)
    if not archive:
        _check_pickle(path)
    try:
        with numpy_allowed():
            return torch.load(path, map_location=map_location, weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        if "nsupported" not in str(error) and "Trying to call" not in str(error):
            raise _unreadable(path, error) from error
        raise HoldsCodeError(f"{path}: holds more than tensors ({first_sentence(error)})") from error
    except Exception as error:  # the unpickler trusts its opcodes: KeyError, IndexError, AssertionError, ...
        raise _unreadable(path, error) from error


def check_archive(path: Path) -> bool:
    """Whether the file is a zip archive (older ones are not), having checked what the archive claims.

    Raises:
        ValueError: a damaged directory, compressed entries, or entries that claim more bytes than the file has.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile lets struct.error, UnicodeDecodeError and others through
        raise _unreadable(path, error) from error
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"{path}: {size} bytes claim to unpack to {claimed}; torch.save does not compress, so this is no file of "
            "its making: get it from where it was made"
        )
    return True


def _check_pickle(path: Path) -> None:
    """Refuse what is neither an archive nor a pickle as PyTorch writes it: it holds no code, but no weights either.

    Raises:
        ValueError: a picture, a text, an empty file, ...
    """
    with path.open("rb") as file:
        first = file.read(1)
    if first != pickle.PROTO:
        what = "is no file of torch.save" if first else "is empty"
        raise ValueError(f"{path}: not a readable PyTorch file (it {what}); give the file with the weights")


def numpy_allowed() -> AbstractContextManager[Any]:
    """Let the restricted unpickler build NumPy numbers and arrays, which NumPy 1 and 2 pickle under two names."""
    if not hasattr(torch.serialization, "safe_globals"):  # before PyTorch 2.5
        return nullcontext()
    newer = int(np.__version__.split(".")[0]) >= 2
    multiarray = import_module("numpy._core.multiarray" if newer else _NUMPY_1)
    functions = [multiarray.scalar, multiarray._reconstruct]
    kinds = ("f4", "f8", "i4", "i8", "u4", "u8", "?")
    allowed = [*functions, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
    if newer:
        allowed += [(function, f"{_NUMPY_1}.{function.__name__}") for function in functions]
    return torch.serialization.safe_globals(allowed)


def first_sentence(error: BaseException) -> str:
    """The part of a long message that names the reason."""
    text = " ".join(str(error).split())
    found = text.find("Unsupported global")
    return text[found if found >= 0 else 0 :].split(". ")[0][:160] or type(error).__name__


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable PyTorch file ({first_sentence(error)}); copy it again")
