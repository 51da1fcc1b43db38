"""An embedding table: rows of several modalities and the ids that say which of them belong together.

In a file, `<modality>` is (N, D) floating, or (N, T, D) for sequences of T frames, `<modality>_id` is (N,) integers or
strings, any `<modality>_<column>` (N, ...) is carried along (folds, captions, names), and `encoder` may name the model
that made the rows. Rows of two modalities are a positive pair where their ids are equal; several rows with one id are
normal. Other fields are ignored.

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

from diffgap_lightning.data import table_fields as fields
from diffgap_lightning.data.arrays import read_arrays, write_arrays
from diffgap_lightning.functional.checks import check_embeddings

Index = Tensor | np.ndarray | Sequence[int]


@dataclass
class EmbeddingTable:
    """Embeddings, ids and columns of several modalities, all in memory.

    Attributes:
        embeddings: Modality -> `(N_m, D_m)` float32 unit rows, or `(N_m, T, D_m)` sequences of unit frames.
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
        return {modality: rows.shape[-1] for modality, rows in self.embeddings.items()}

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
            check_embeddings(rows.flatten(0, -2), f"{where}: {modality}", unit=True)
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
        chosen = fields.find_modalities(path, arrays, modalities)
        embeddings, ids, names = {}, {}, {}
        for modality in chosen:
            rows = fields.to_rows(f"{path}: {modality}", arrays[modality], (dims or {}).get(modality), normalize)
            embeddings[modality] = rows
            ids[modality], strings = fields.to_ids(f"{path}: {modality}_id", arrays[f"{modality}_id"], len(rows))
            if strings is not None:
                names[modality] = strings
        fields.check_same_kind(path, chosen, names)
        table = cls(
            embeddings, ids, names, fields.find_columns(path, arrays, embeddings), fields.find_encoder(path, arrays)
        )
        if require_pairs:
            _check_pairs(table, str(path))
        return table

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the table atomically as `.npz` or `.safetensors`; `read` gives the same table back.

        Raises:
            ValueError: another suffix, or rows that `read` would refuse.
        """
        self.check(str(path))
        arrays: dict[str, np.ndarray] = {}
        for modality in self.modalities:
            arrays[modality] = self.embeddings[modality].detach().cpu().numpy()
            arrays[f"{modality}_id"] = self.names.get(modality, self.ids[modality].cpu().numpy())
        arrays |= self.columns
        if self.encoder is not None:
            arrays["encoder"] = np.array(self.encoder)
        return write_arrays(path, arrays)

    def _owner(self, column: str) -> str:
        owner = fields.owner_of(column, self.embeddings)
        if owner is None:
            raise ValueError(f"{column}: belongs to none of {list(self.embeddings)}; name it <modality>_<column>")
        return owner


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
