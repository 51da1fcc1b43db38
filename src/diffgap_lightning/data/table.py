"""An embedding table: rows of several modalities and the ids that say which of them belong together.

In a file, `<modality>` is (N, D) floating, `<modality>_id` is (N,) integers or strings, any `<modality>_<column>`
(N, ...) is carried along (folds, captions, names), and `encoder` may name the model that made the rows. Rows of two
modalities are a positive pair where their ids are equal; several rows with one id are normal. Other fields are ignored.

    rows that are NaN, zero or not of unit norm    refused
    a modality that shares no id with any other    refused, unless `require_pairs=False`
    single rows without a partner                  kept, with one warning that counts them
    half and double precision                      read as float32; half is brought back to unit norm
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.data.arrays import Array, read_arrays, write_arrays
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.pairs import hash_ids

Index = Tensor | np.ndarray | Sequence[int]


@dataclass
class EmbeddingTable:
    """Embeddings, ids and columns of several modalities, all in memory.

    Attributes:
        embeddings: Modality -> `(N_m, D_m)` float32 unit rows.
        ids: Modality -> `(N_m,)` int64; equal ids across modalities are positive pairs.
        names: Modality -> `(N_m,)` original ids, where they were strings.
        columns: `"<modality>_<column>"` -> `(N_m, ...)`, e.g. `"audio_fold"`, `"text_caption"`.
        encoder: Fingerprint of the model that made the rows, if known.

    Example:
        >>> x = torch.eye(3)
        >>> table = EmbeddingTable({"audio": x, "text": x[:2]}, {"audio": torch.arange(3), "text": torch.arange(2)})
        >>> table.select([1]).num_rows
        {'audio': 1, 'text': 1}
    """

    embeddings: dict[str, Tensor]
    ids: dict[str, Tensor]
    names: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    encoder: str | None = None

    def __post_init__(self) -> None:
        """Check that every part has one entry a row; values are checked by `read`, `write` and `check`."""
        if set(self.embeddings) != set(self.ids):
            raise ValueError(f"got embeddings of {sorted(self.embeddings)} but ids of {sorted(self.ids)}; give both")
        for modality, ids in self.ids.items():
            if ids.dtype != torch.int64 or ids.ndim != 1:
                raise ValueError(f"{modality}_id: got {tuple(ids.shape)} of {ids.dtype}, expected (N,) int64")
        lengths = {f"{m}_id": (m, len(v)) for m, v in self.ids.items()}
        lengths |= {f"{m}_id (names)": (m, len(v)) for m, v in self.names.items()}
        lengths |= {name: (self._owner(name), len(column)) for name, column in self.columns.items()}
        for name, (modality, length) in lengths.items():
            if length != len(self.embeddings[modality]):
                rows = len(self.embeddings[modality])
                raise ValueError(f"{name}: got {length} values for {rows} rows of {modality}; expected one a row")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities, in the order of the file."""
        return tuple(self.embeddings)

    @property
    def num_rows(self) -> dict[str, int]:
        """Modality -> number of rows."""
        return {modality: len(rows) for modality, rows in self.embeddings.items()}

    @property
    def dims(self) -> dict[str, int]:
        """Modality -> embedding dimension."""
        return {modality: rows.shape[1] for modality, rows in self.embeddings.items()}

    def paired(self) -> dict[str, Tensor]:
        """Modality -> `(N_m,)` bool: the row's id occurs in at least one other modality."""
        unique = {modality: torch.unique(ids) for modality, ids in self.ids.items()}
        masks = {}
        for modality, ids in self.ids.items():
            others = [unique[other] for other in self.modalities if other != modality]
            masks[modality] = torch.isin(ids, torch.cat(others)) if others else torch.zeros(len(ids), dtype=torch.bool)
        return masks

    def select(self, ids: Tensor | Iterable[int]) -> EmbeddingTable:
        """The rows of every modality whose id is among `ids`, in their present order."""
        wanted = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), dtype=torch.int64)
        return self.select_rows({modality: torch.isin(own, wanted) for modality, own in self.ids.items()})

    def select_rows(self, rows: Mapping[str, Index]) -> EmbeddingTable:
        """Some rows of some modalities.

        Args:
            rows: Modality -> row numbers or a `(N_m,)` bool mask; a modality that is not named keeps all its rows.
        """
        index = {m: torch.as_tensor(rows[m]) if m in rows else torch.arange(len(self.ids[m])) for m in self.modalities}
        index = {m: i.nonzero()[:, 0] if i.dtype == torch.bool else i.long() for m, i in index.items()}
        return replace(
            self,
            embeddings={m: x[index[m]] for m, x in self.embeddings.items()},
            ids={m: i[index[m]] for m, i in self.ids.items()},
            names={m: n[index[m].numpy()] for m, n in self.names.items()},
            columns={name: column[index[self._owner(name)].numpy()] for name, column in self.columns.items()},
        )

    def check(self, where: str = "table", require_pairs: bool = False) -> EmbeddingTable:
        """Return the table if every row is a unit embedding.

        Args:
            where: What opens the error messages, e.g. the file's name.
            require_pairs: Also refuse a modality that shares no id with any other.

        Raises:
            ValueError: NaN, zero or non-unit rows, an empty modality, or no pairs.
        """
        for modality, rows in self.embeddings.items():
            check_embeddings(rows, f"{where}: {modality}", unit=True)
        if require_pairs:
            _check_pairs(self, where)
        return self

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        modalities: Sequence[str] | None = None,
        dims: Mapping[str, int] | None = None,
        normalize: bool = False,
        require_pairs: bool = True,
    ) -> EmbeddingTable:
        """Read and check a table.

        Args:
            path: A `.npz` or `.safetensors` file.
            modalities: Read these only, in this order; by default all.
            dims: The expected dimension of some modalities.
            normalize: Scale rows to unit norm instead of refusing rows that are not.
            require_pairs: Refuse a modality that shares no id with any other, and warn of single rows that do not.

        Raises:
            FileNotFoundError: no such file.
            ValueError: anything malformed; one line that names file and field.
        """
        path = Path(path)
        arrays = read_arrays(path)
        chosen = _find_modalities(path, arrays, modalities)
        embeddings, ids, names = {}, {}, {}
        for modality in chosen:
            rows = _to_rows(f"{path}: {modality}", arrays[modality], (dims or {}).get(modality), normalize)
            embeddings[modality] = rows
            ids[modality], strings = _to_ids(f"{path}: {modality}_id", arrays[f"{modality}_id"], len(rows))
            if strings is not None:
                names[modality] = strings
        _check_same_kind(path, chosen, names)
        table = cls(embeddings, ids, names, _find_columns(path, arrays, embeddings), _find_encoder(path, arrays))
        if require_pairs:
            _check_pairs(table, str(path))
        return table

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the table atomically as `.npz` or `.safetensors`; `read` gives the same table back.

        Raises:
            ValueError: another suffix, or rows that `read` would refuse.
        """
        self.check(str(path))
        arrays: dict[str, Array] = {}
        for modality in self.modalities:
            arrays[modality] = self.embeddings[modality].detach().cpu().numpy()
            arrays[f"{modality}_id"] = self.names.get(modality, self.ids[modality].cpu().numpy())
        arrays |= self.columns
        if self.encoder is not None:
            arrays["encoder"] = np.array(self.encoder)
        return write_arrays(path, arrays)

    def _owner(self, column: str) -> str:
        owner = _owner(column, self.embeddings)
        if owner is None:
            raise ValueError(f"{column}: belongs to none of {list(self.embeddings)}; name it <modality>_<column>")
        return owner


def _owner(name: str, modalities: Iterable[str]) -> str | None:
    """The modality that a column belongs to: the longest one that, with `_`, opens its name."""
    return max((m for m in modalities if name.startswith(f"{m}_")), key=len, default=None)


def _find_modalities(path: Path, arrays: Mapping[str, Array], wanted: Sequence[str] | None) -> list[str]:
    found = [name for name in arrays if f"{name}_id" in arrays]
    for name, array in arrays.items():
        if name not in found and array.ndim == 2 and _owner(name, found) is None:
            raise ValueError(f"{path}: {name}: no {name}_id beside it; add (N,) ids: equal ids are positive pairs")
        if name.endswith("_id") and name.removesuffix("_id") not in found and _owner(name, found) is None:
            raise ValueError(f"{path}: {name}: no {name.removesuffix('_id')} beside it; add its (N, D) rows")
    missing = [name for name in wanted or () if name not in found]
    if missing or not found:
        what = f"no {missing[0]} and {missing[0]}_id" if missing else "no <modality> with <modality>_id"
        raise ValueError(f"{path}: {what} among its fields ({', '.join(arrays) or 'none'})")
    return list(wanted) if wanted is not None else found


def _to_rows(name: str, array: Array, dim: int | None, normalize: bool) -> Tensor:
    """Checked `(N, D)` float32 unit rows."""
    if isinstance(array, np.ndarray) and array.dtype.kind != "f":
        raise ValueError(f"{name}: got {array.dtype}, expected floating (N, D) rows; convert with .astype('float32')")
    if isinstance(array, np.ndarray) and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    rows = check_embeddings(torch.as_tensor(array), name, dim=dim)
    if not normalize:
        try:
            check_embeddings(rows, name, unit=True)
        except ValueError as error:
            raise ValueError(f"{error}, or read with normalize=True") from error
    half = rows.dtype in (torch.float16, torch.bfloat16)
    rows = rows.float()
    return torch.nn.functional.normalize(rows, dim=1) if half or normalize else rows


def _to_ids(name: str, array: Array, rows: int) -> tuple[Tensor, np.ndarray | None]:
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


def _check_same_kind(path: Path, modalities: Sequence[str], names: Mapping[str, np.ndarray]) -> None:
    numbers = [modality for modality in modalities if modality not in names]
    if names and numbers:
        raise ValueError(
            f"{path}: {numbers[0]}_id holds integers but {next(iter(names))}_id strings, which can never be equal; "
            "use one kind for all modalities"
        )


def _find_columns(path: Path, arrays: Mapping[str, Array], embeddings: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    columns = {}
    for name, array in arrays.items():
        owner = _owner(name, embeddings)
        if owner is None or name in embeddings or name.removesuffix("_id") in arrays and name.endswith("_id"):
            continue
        if array.ndim == 0 or len(array) != len(embeddings[owner]):
            rows = len(embeddings[owner])
            raise ValueError(
                f"{path}: {name}: got shape {tuple(array.shape)}, expected ({rows}, ...): one a {owner} row"
            )
        columns[name] = array if isinstance(array, np.ndarray) else array.float().numpy()
    return columns


def _find_encoder(path: Path, arrays: Mapping[str, Array]) -> str | None:
    encoder = arrays.get("encoder")
    if encoder is None:
        return None
    if not isinstance(encoder, np.ndarray) or encoder.ndim or encoder.dtype.kind != "U":
        raise ValueError(f"{path}: encoder: got shape {tuple(encoder.shape)} of {encoder.dtype}, expected one string")
    return str(encoder)


def _check_pairs(table: EmbeddingTable, where: str) -> None:
    paired = table.paired()
    for modality, mask in paired.items():
        if not mask.any():
            others = ", ".join(f"{m}_id" for m in table.modalities if m != modality) or "another modality"
            raise ValueError(f"{where}: {modality}_id: shares no id with {others}; give positive pairs equal ids")
    alone = {modality: int((~mask).sum()) for modality, mask in paired.items()}
    if any(alone.values()):
        counts = ", ".join(f"{n} of {len(paired[m])} {m} rows" for m, n in alone.items() if n)
        warnings.warn(f"{where}: {counts} have no partner with the same id in another modality", stacklevel=3)
