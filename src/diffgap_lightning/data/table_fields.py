"""From the raw arrays of a file to the checked fields of an embedding table: names, rows, ids, columns.

Every refusal is one line that names the file and the field, and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.data.arrays import Array
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.pairs import hash_ids


def owner_of(name: str, modalities: Iterable[str]) -> str | None:
    """The modality that a column belongs to: the longest one that, with `_`, opens its name."""
    return max((m for m in modalities if name.startswith(f"{m}_")), key=len, default=None)


def find_modalities(path: Path, arrays: Mapping[str, Array], wanted: Sequence[str] | None) -> list[str]:
    """The fields that have ids beside them, or those of them that are wanted."""
    found = [name for name in arrays if f"{name}_id" in arrays]
    for name, array in arrays.items():
        if name not in found and array.ndim in (2, 3) and owner_of(name, found) is None:
            raise ValueError(f"{path}: {name}: no {name}_id beside it; add (N,) ids: equal ids are positive pairs")
        if name.endswith("_id") and name.removesuffix("_id") not in found and owner_of(name, found) is None:
            raise ValueError(f"{path}: {name}: no {name.removesuffix('_id')} beside it; add its (N, D) rows")
    missing = [name for name in wanted or () if name not in found]
    if missing or not found:
        what = f"no {missing[0]} and {missing[0]}_id" if missing else "no <modality> with <modality>_id"
        raise ValueError(f"{path}: {what} among its fields ({', '.join(arrays) or 'none'})")
    return list(wanted) if wanted is not None else found


def to_rows(name: str, array: Array, dim: int | None, normalize: bool) -> Tensor:
    """Checked `(N, D)` float32 unit rows, or `(N, T, D)` sequences of unit frames."""
    if isinstance(array, np.ndarray) and array.dtype.kind != "f":
        raise ValueError(f"{name}: got {array.dtype}, expected floating (N, D) rows; convert with .astype('float32')")
    if isinstance(array, np.ndarray) and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    rows = torch.as_tensor(array)
    frames = rows.flatten(0, 1) if rows.ndim == 3 else rows
    check_embeddings(frames, name, dim=dim)
    if not normalize:
        try:
            check_embeddings(frames, name, unit=True)
        except ValueError as error:
            raise ValueError(f"{error}, or read with normalize=True") from error
    half = rows.dtype in (torch.float16, torch.bfloat16)
    rows = rows.float().contiguous()
    return torch.nn.functional.normalize(rows, dim=-1) if half or normalize else rows


def to_ids(name: str, array: Array, rows: int) -> tuple[Tensor, np.ndarray | None]:
    """`(ids, strings)`: int64 ids, and the original ids where they are strings."""
    if array.ndim != 1 or len(array) != rows:
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected ({rows},): one id a row")
    if isinstance(array, Tensor) or array.dtype.kind not in "iuU":
        raise ValueError(f"{name}: got {array.dtype}, expected integers or strings; convert it with .astype('int64')")
    if array.dtype.kind == "U":
        return hash_ids(array.tolist()), array
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: got {array.max()}, which int64 cannot hold; use smaller ids or strings")
    return torch.from_numpy(array.astype(np.int64)), None


def check_same_kind(path: Path, modalities: Sequence[str], names: Mapping[str, np.ndarray]) -> None:
    """Refuse integer ids in one modality and strings in another."""
    numbers = [modality for modality in modalities if modality not in names]
    if names and numbers:
        raise ValueError(
            f"{path}: {numbers[0]}_id holds integers but {next(iter(names))}_id strings, which can never be equal; "
            "use one kind for all modalities"
        )


def find_columns(path: Path, arrays: Mapping[str, Array], embeddings: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The further fields, one entry a row, of the modalities that are read."""
    columns = {}
    for name, array in arrays.items():
        owner = owner_of(name, embeddings)
        if owner is None or name in embeddings or name.removesuffix("_id") in arrays and name.endswith("_id"):
            continue
        if array.ndim == 0 or len(array) != len(embeddings[owner]):
            rows = len(embeddings[owner])
            raise ValueError(
                f"{path}: {name}: got shape {tuple(array.shape)}, expected ({rows}, ...): one a {owner} row"
            )
        columns[name] = array if isinstance(array, np.ndarray) else array.float().numpy()
    return columns


def find_encoder(path: Path, arrays: Mapping[str, Array]) -> str | None:
    """The fingerprint of the model that made the rows, if the file has one."""
    encoder = arrays.get("encoder")
    if encoder is None:
        return None
    if not isinstance(encoder, np.ndarray) or encoder.ndim or encoder.dtype.kind != "U":
        raise ValueError(f"{path}: encoder: got shape {tuple(encoder.shape)} of {encoder.dtype}, expected one string")
    return str(encoder)


def same_encoder(given: str | None, own: str | None, where: str) -> str | None:
    """The fingerprint of rows that may have one already.

    Raises:
        ValueError: both are known and they differ.
    """
    if None not in (given, own) and given != own:
        raise ValueError(f"{where}: its rows were made by encoder {own!r}, got {given!r}; embed with that one instead")
    return own if given is None else given
