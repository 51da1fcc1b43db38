"""One `.npy` array from bytes in memory and back, without pickle, without a copy, and without trusting the header.

The header claims a shape and a type; the claim is compared with the bytes that are there before anything is made of
them, so a header of ten terabytes costs nothing, and object arrays, which only pickle can read, are refused.
"""

from __future__ import annotations

import io
import math
import os

import numpy as np

_HEADER_LIMIT = 20_000


def decode_npy(data: memoryview | bytes, name: str) -> np.ndarray:
    """An array over `data`; it shares memory with it unless the byte order is foreign.

    Args:
        data: The whole `.npy` file.
        name: What opens the error messages.

    Raises:
        ValueError: not a `.npy` file, Python objects, or a header that does not fit the data.
    """
    shape, fortran, dtype, start = _read_header(bytes(data[:_HEADER_LIMIT]), name)
    claimed, stored = math.prod(shape) * dtype.itemsize, len(data) - start
    if claimed != stored:
        raise ValueError(f"{name}: the header claims shape {shape} of {dtype} ({claimed} bytes), {stored} are stored")
    array = np.frombuffer(data, dtype=dtype, offset=start) if claimed else np.empty(0, dtype)
    array = array.reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def decode_npy_header(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and start of the data of a C-ordered `.npy` file.

    Raises:
        ValueError: as `decode_npy`, or a Fortran-ordered array.
    """
    with open(path, "rb") as file:
        shape, fortran, dtype, start = _read_header(file.read(_HEADER_LIMIT), str(path))
    stored = os.path.getsize(path) - start
    if fortran or math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"{path}: the header claims C-ordered {shape} of {dtype}, {stored} bytes are stored")
    return shape, dtype, start


def npy_header(array: np.ndarray) -> bytes:
    """The bytes that go before a C-contiguous array's own to make a `.npy` file.

    Raises:
        ValueError: an array of Python objects.
    """
    if array.dtype.hasobject:
        raise ValueError(f"got {array.dtype}, expected numbers or strings; objects are never pickled")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()


def _read_header(head: bytes, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = parse(file)
    except Exception as error:  # NumPy reads the header as Python's syntax, whose parts raise whatever they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name}: not a readable .npy header ({reason})") from error
    if dtype.hasobject:
        raise ValueError(f"{name}: holds Python objects, which are never unpickled")
    if dtype.kind not in "fiubU" or any(n < 0 for n in shape):
        raise ValueError(f"{name}: got shape {shape} of {dtype}, expected an array of numbers or strings")
    return tuple(int(n) for n in shape), bool(fortran), dtype, file.tell()
