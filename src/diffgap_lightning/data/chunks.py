"""What one row of the shards consists of, and the way there from tables and from chunks of arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.data.batches import PairIndex
from diffgap_lightning.data.manifest import check_modality, column_owner
from diffgap_lightning.data.permutation import permuted
from diffgap_lightning.data.shuffle import Rows
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.pairs import hash_ids


@dataclass
class Layout:
    """Modalities, columns and their types; turns a chunk into records and back.

    Attributes:
        dims: Modality -> dimension.
        dtype: Of the embeddings.
        aligned: Rows of all modalities stand side by side.
        named: Modalities with string ids.
        fields: Numeric column -> its type, with the shape of one entry.
        texts: Columns of strings.
    """

    dims: dict[str, int]
    dtype: np.dtype
    aligned: bool
    named: tuple[str, ...] = ()
    fields: dict[str, np.dtype] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns beside embeddings and ids."""
        return (*self.fields, *self.texts)

    @classmethod
    def of_table(cls, table: EmbeddingTable, dtype: np.dtype, aligned: bool) -> Layout:
        """The layout of a table's rows."""
        for modality, rows in table.embeddings.items():
            if rows.ndim != 2:
                raise ValueError(
                    f"{modality}: got shape {tuple(rows.shape)}, but shards hold embeddings (N, D); train on sequences "
                    "from a table in memory (EmbeddingDataModule)"
                )
        fields = {n: np.dtype((c.dtype, c.shape[1:])) for n, c in table.columns.items() if c.dtype.kind != "U"}
        texts = tuple(name for name in table.columns if name not in fields)
        return cls(table.dims, dtype, aligned, tuple(m for m in table.modalities if m in table.names), fields, texts)

    @classmethod
    def of_chunk(cls, chunk: Mapping[str, Any], dtype: np.dtype, aligned: bool) -> Layout:
        """The layout that a first chunk shows; it must hold every modality and column."""
        modalities = [name for name in chunk if f"{name}_id" in chunk]
        if not modalities:
            raise ValueError(f"chunk: got {sorted(chunk)}, expected <modality> and <modality>_id")
        dims, named, fields, texts = {}, [], {}, []
        for name, value in chunk.items():
            if name in modalities:
                if not check_modality(name) or np.ndim(value) != 2:
                    raise ValueError(f"chunk: {name}: got {np.shape(value)}, expected (n, D) rows, as of audio")
                dims[name] = np.shape(value)[1]
            elif name.removesuffix("_id") in modalities and name.endswith("_id"):
                named += [name.removesuffix("_id")] if np.asarray(value).dtype.kind == "U" else []
            else:
                if column_owner(name, modalities) is None:
                    raise ValueError(f"chunk: {name}: belongs to none of {modalities}; name it <modality>_<column>")
                array = np.asarray(value)
                if array.dtype.kind == "U":
                    texts.append(name)
                else:
                    fields[name] = np.dtype((array.dtype, array.shape[1:]))
        return cls(dims, dtype, aligned, tuple(named), fields, tuple(texts))

    def check(self, chunk: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A chunk as NumPy arrays, with `<modality>_id.str` where ids were strings.

        Raises:
            ValueError: a modality or column that is missing or new, rows that are no embeddings, ids that differ.
        """
        where = f"chunk {number}"
        present = [m for m in self.dims if m in chunk]
        owned = [c for c in self.columns if column_owner(c, self.dims) in present]
        expected = {*present, *(f"{m}_id" for m in present), *owned}
        if set(chunk) != expected or not present or (self.aligned and len(present) != len(self.dims)):
            missing = sorted(expected | set(self.dims))
            raise ValueError(f"{where}: got {sorted(chunk)}, expected {missing} as in the first")
        arrays: dict[str, Any] = {c: np.asarray(chunk[c]) for c in owned}
        for modality in present:
            rows = _tensor(chunk[modality])
            check_embeddings(rows, f"{where}: {modality}", dim=self.dims[modality], unit=True)
            arrays[modality] = rows.cpu().numpy()
            ids = chunk[f"{modality}_id"]
            ids = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
            if (ids.dtype.kind == "U") != (modality in self.named) or ids.dtype.kind not in "iuU":
                raise ValueError(f"{where}: {modality}_id: got {ids.dtype}, expected ids of the first chunk's kind")
            if ids.dtype.kind == "U":
                arrays[f"{modality}_id.str"], ids = ids, hash_ids(ids.tolist()).numpy()
            arrays[f"{modality}_id"] = ids.astype(np.int64)
        for name, array in arrays.items():
            rows_there = len(arrays[name if name in self.dims else str(column_owner(name, self.dims))])
            if len(array) != rows_there:
                raise ValueError(f"{where}: {name}: got {len(array)} values for {rows_there} rows")
        if self.aligned:
            ids = [arrays[f"{m}_id"] for m in self.dims]
            if any(not np.array_equal(ids[0], other) for other in ids[1:]):
                raise ValueError(f"{where}: ids of {', '.join(self.dims)} differ; pairs need equal ids row by row")
        return arrays

    def to_rows(self, chunk: Mapping[str, Any], modality: str | None = None) -> Rows:
        """Records of all modalities side by side, or of one."""
        dtype = self._record(modality)
        first = chunk[modality or next(iter(self.dims))]
        records = np.empty(len(first), dtype)
        for name in dtype.names or ():
            records[name] = chunk[name]
        texts = self._texts(modality)
        strings = [list(row) for row in zip(*(chunk[t].tolist() for t in texts), strict=True)] if texts else []
        return Rows(records, strings)

    def from_rows(self, rows: Rows, modality: str | None = None) -> dict[str, np.ndarray]:
        """The inverse of `to_rows`."""
        block = {name: rows.records[name] for name in rows.records.dtype.names or ()}
        texts = self._texts(modality)
        columns = zip(*rows.strings, strict=True) if texts else ()
        return block | {name: np.array(column) for name, column in zip(texts, columns, strict=True)}

    def _record(self, modality: str | None) -> np.dtype:
        parts: list[tuple[str, Any]] = []
        for m, dim in self.dims.items():
            if modality in (None, m):
                parts += [(m, (self.dtype, (dim,))), (f"{m}_id", np.dtype(np.int64))]
                parts += [(c, t) for c, t in self.fields.items() if column_owner(c, self.dims) == m]
        return np.dtype([(name, kind) for name, kind in parts])

    def _texts(self, modality: str | None) -> list[str]:
        chosen = [m for m in self.dims if modality in (None, m)]
        ids = [f"{m}_id.str" for m in chosen if m in self.named]
        return ids + [c for c in self.texts if column_owner(c, self.dims) in chosen]


def _tensor(value: Any) -> Tensor:
    """Any array as a tensor; a read-only one (a memory map) is copied, because tensors are always writable."""
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = np.array(value)
    return torch.as_tensor(value)


def table_pairs(table: EmbeddingTable, seed: int, size: int) -> Iterator[dict[str, Any]]:
    """Blocks of `size` pairs of a table, in an order drawn from `seed`: all combinations of rows with equal ids."""
    pairs = PairIndex(table.ids)
    for start in range(0, len(pairs), size):
        numbers = permuted(np.arange(start, min(start + size, len(pairs))), len(pairs), (seed, 3))
        yield _gather(table, {m: torch.from_numpy(rows) for m, rows in pairs.rows(numbers).items()})


def table_rows(table: EmbeddingTable, size: int) -> Iterator[dict[str, Any]]:
    """Blocks of `size` rows of one modality after the other."""
    for modality, ids in table.ids.items():
        for start in range(0, len(ids), size):
            yield _gather(table, {modality: torch.arange(start, min(start + size, len(ids)))})


def _gather(table: EmbeddingTable, index: Mapping[str, Tensor]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for modality, rows in index.items():
        block |= {modality: table.embeddings[modality][rows], f"{modality}_id": table.ids[modality][rows]}
        if modality in table.names:
            block[f"{modality}_id.str"] = table.names[modality][rows.numpy()]
    for name, column in table.columns.items():
        owner = column_owner(name, table.modalities)
        if owner in index:
            block[name] = column[index[str(owner)].numpy()]
    return block
