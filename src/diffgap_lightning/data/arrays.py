"""Named arrays in a `.npz` or `.safetensors` file, read without pickle and without trusting a header.

A header is only a claim. Before anything is allocated, what it claims must fit the bytes that are there: an array's
shape times its item size must be the size of its entry, and a whole archive may not unpack to more than
`MAX_EXPANSION` times its own size. Strings live in `.npz` files as NumPy unicode arrays and in `.safetensors` files,
which know only numbers, as JSON in the metadata.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from diffgap_lightning.atomic import replacing
from diffgap_lightning.data.npy import decode_npy

SUFFIXES = (".npz", ".safetensors")
MAX_EXPANSION = 100
FREE_EXPANSION = 64 << 20
MAX_METADATA = 90_000_000
STRINGS_KEY = "strings"

# What zipfile lets through where an archive is cut, garbled, encrypted or compressed in a way that it does not know.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, UnicodeDecodeError, RuntimeError)

Array = np.ndarray | Tensor


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read every array of a file.

    Args:
        path: A `.npz` or `.safetensors` file.

    Returns:
        Field name -> array; strings as NumPy unicode arrays, bfloat16 as a torch tensor because NumPy has no such type.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a truncated or altered file, object arrays, a header that claims too much.
    """
    path = Path(path)
    check_suffix(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not found"
        raise FileNotFoundError(f"{path}: {found}; expected an embedding table ({' or '.join(SUFFIXES)})")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes); write or copy it again")
    return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write named arrays atomically: to a temporary name in the same folder, then renamed into place.

    Raises:
        ValueError: another suffix, an object array, or more strings than a `.safetensors` header can hold.
    """
    path = Path(path)
    check_suffix(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiubU":
            raise ValueError(f"{path}: {name}: got dtype {array.dtype}, expected numbers or strings; convert it first")
    with replacing(path) as work:
        write = _write_npz if path.suffix == ".npz" else _write_safetensors
        write(work, path, arrays)
    return path


def check_suffix(path: Path) -> None:
    """Refuse a file name that says neither `.npz` nor `.safetensors`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}, expected {' or '.join(SUFFIXES)}; convert the file")


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members)
            return {m.filename.removesuffix(".npy"): _read_member(path, archive, m) for m in members}
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); truncated or damaged: copy it again") from error


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    seen = set()
    for name in (member.filename for member in members):
        if not name.endswith(".npy"):
            raise ValueError(f"{path}: {name}: not an array; expected a file written by numpy.savez")
        if name in seen:
            raise ValueError(f"{path}: {name.removesuffix('.npy')}: stored twice; write the file again, once a name")
        seen.add(name)
    size, claimed = path.stat().st_size, sum(member.file_size for member in members)
    if claimed > FREE_EXPANSION + MAX_EXPANSION * size:
        largest = max(members, key=lambda member: member.file_size)
        raise ValueError(
            f"{path}: {largest.filename.removesuffix('.npy')}: {size} bytes claim to unpack to {claimed}; "
            "this is no embedding table, or write it uncompressed with numpy.savez"
        )


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    data = memoryview(bytearray(member.file_size))
    done = 0
    with archive.open(member) as file:
        while block := file.read(1 << 20):
            data[done : done + len(block)] = block
            done += len(block)
    if done < len(data):
        raise EOFError(f"{member.filename} has {done} of {len(data)} bytes")
    return decode_npy(data, f"{path}: {member.filename.removesuffix('.npy')}")


def _read_safetensors(path: Path) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    try:
        with safe_open(path, framework="pt") as file:
            strings = (file.metadata() or {}).get(STRINGS_KEY, "{}")
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_tensor(name)
                arrays[name] = tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: not a readable .safetensors file ({reason}); truncated or damaged: copy it again"
        ) from error
    for name, array in _parse_strings(path, strings).items():
        if name in arrays:
            raise ValueError(f"{path}: {name}: stored twice, as numbers and as strings; write it again, once a name")
        arrays[name] = array
    return arrays


def _parse_strings(path: Path, text: str) -> dict[str, np.ndarray]:
    try:
        fields = json.loads(text)
        good = isinstance(fields, dict) and all(_is_strings(value) for value in fields.values())
    except (json.JSONDecodeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path}: metadata {STRINGS_KEY!r}: expected JSON of field -> list of strings; write it again")
    return {name: np.array(value, dtype=np.str_) for name, value in fields.items()}


def _is_strings(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _write_npz(work: Path, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(work, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_safetensors(work: Path, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    strings = {n: a.tolist() for n, a in arrays.items() if a.dtype.kind == "U"}
    text = json.dumps(strings, ensure_ascii=False)
    if len(text.encode()) > MAX_METADATA:
        raise ValueError(
            f"{path}: {', '.join(strings)}: {len(text.encode())} bytes of strings, a .safetensors header holds "
            f"{MAX_METADATA}; write a .npz file, or shards"
        )
    numbers = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name not in strings}
    save_file(numbers, work, metadata={STRINGS_KEY: text})
