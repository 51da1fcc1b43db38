"""Block shards, written one block at a time: `000000.<modality>.npy` with `000000.<modality>_id.npy` beside it.

    shard-000000.tar
      000000.audio.npy       (n, D) float16        rows of block 0
      000000.audio_id.npy    (n,) int64
      000000.audio_id.str.npy                      the original ids, where they were strings
      000000.text.npy  ...
      000001.audio.npy  ...                        rows of block 1

The names follow WebDataset's convention (key, dot, kind of content), so any tar or WebDataset reader can open a shard.
A shard is written under a temporary name and renamed when it is complete; the manifest comes last.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

from diffgap_lightning.atomic import commit, naming
from diffgap_lightning.data.manifest import Block, Shard, check_modality, column_owner
from diffgap_lightning.data.npy import npy_header
from diffgap_lightning.data.tar import END, write_member
from diffgap_lightning.functional.checks import check_embeddings

DTYPES = ("float16", "float32")


class ShardWriter:
    """Appends blocks to numbered shards in a folder; `close` (or leaving the `with` block) finishes the last one.

    The caller writes the manifest, from `writer.shards`, when all writers of the folder are done. After an exception
    the unfinished shard is removed and the finished ones stay.

    Args:
        folder: Where the shards go; made if absent.
        dims: Modality -> dimension.
        aligned: Every block holds the same number of rows of every modality, with equal ids (kind `"pairs"`).
        dtype: `"float16"` or `"float32"`.
        columns: Further `<modality>_<column>` arrays that come with the blocks.
        named: Modalities whose string ids come with the blocks, under `<modality>_id.str`.
        rows_per_shard: A shard is finished when it holds this many rows of one modality.
        prefix: Shards are named `<prefix>-000000.tar`; several writers into one folder need several prefixes.
        first: Number of the first shard.

    Raises:
        ValueError: another dtype, or a modality that cannot name a member.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dims: Mapping[str, int],
        *,
        aligned: bool = True,
        dtype: str = "float16",
        columns: Sequence[str] = (),
        named: Sequence[str] = (),
        rows_per_shard: int = 262_144,
        prefix: str = "shard",
        first: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, expected {' or '.join(DTYPES)}")
        for name in dims:
            if not check_modality(name):
                raise ValueError(f"modality {name!r}: expected lower-case letters, digits and _, e.g. audio")
        self.folder, self.dims, self.aligned = Path(folder), dict(dims), aligned
        self.dtype, self.columns, self.named = np.dtype(dtype), tuple(columns), tuple(named)
        self.rows_per_shard, self.prefix, self.first = rows_per_shard, prefix, first
        self.shards: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._blocks: list[Block] = []
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, block: Mapping[str, Any]) -> None:
        """Append one block.

        Args:
            block: `<modality>` (n, D) floating unit rows and `<modality>_id` (n,) int64, as arrays or tensors; for
                named modalities also `<modality>_id.str`, and the columns. A modality may be absent unless rows are
                aligned.

        Raises:
            ValueError: rows that are no embeddings, lengths that differ, pairs whose ids differ.
        """
        arrays = self._checked(block)
        file = self._open()
        key, offset, size = f"{len(self._blocks):06d}", self._offset, 0
        tee = _Tee(file, self._digest)
        for name, array in arrays.items():
            data = np.ascontiguousarray(array)
            with naming(self.folder / self._name):
                size += write_member(tee, f"{key}.{name}.npy", [npy_header(data), data.reshape(-1).view(np.uint8).data])
        rows = tuple(len(arrays.get(m, ())) for m in self.dims)
        self._blocks.append(Block(offset, size, rows, tee.crc))
        self._offset += size
        if max(np.sum([b.rows for b in self._blocks], axis=0)) >= self.rows_per_shard:
            self._finish()

    def close(self) -> tuple[Shard, ...]:
        """Finish the shard that is open and return the records of all."""
        self._finish()
        return tuple(self.shards)

    def __enter__(self) -> ShardWriter:
        """Start writing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the last shard, or remove it after an exception."""
        if kind is None:
            self.close()
        elif self._file is not None:
            with suppress(OSError):  # what is still buffered may not fit on the disk either
                self._file.close()
            self._work.unlink(missing_ok=True)
            self._file = None

    def _checked(self, block: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for modality, dim in self.dims.items():
            if modality not in block:
                continue
            rows = torch.as_tensor(block[modality])
            check_embeddings(rows, modality, dim=dim, unit=True)
            arrays[modality] = rows.cpu().numpy().astype(self.dtype, copy=False)
            arrays[f"{modality}_id"] = np.asarray(block[f"{modality}_id"]).astype(np.int64, copy=False)
            if modality in self.named:
                arrays[f"{modality}_id.str"] = np.asarray(block[f"{modality}_id.str"], dtype=np.str_)
            own = [c for c in self.columns if column_owner(c, self.dims) == modality]
            arrays |= {c: np.asarray(block[c]) for c in own}
            for name in (f"{modality}_id", *([f"{modality}_id.str"] if modality in self.named else []), *own):
                if len(arrays[name]) != len(rows):
                    raise ValueError(f"{name}: got {len(arrays[name])} values for {len(rows)} rows of {modality}")
        if not arrays or (self.aligned and any(m not in arrays for m in self.dims)):
            raise ValueError(f"block: got {sorted(block)}, expected rows of {', '.join(self.dims)}")
        if self.aligned:
            ids = [arrays[f"{m}_id"] for m in self.dims]
            if any(not np.array_equal(ids[0], other) for other in ids[1:]):
                raise ValueError(f"block: ids of {', '.join(self.dims)} differ; pairs need equal ids row by row")
        return arrays

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._name = f"{self.prefix}-{self.first + len(self.shards):06d}.tar"
            self._work = self.folder / f".{self._name}.tmp"
            self._file, self._digest, self._offset, self._blocks = self._work.open("wb"), hashlib.sha256(), 0, []
        return self._file

    def _finish(self) -> None:
        if self._file is None:
            return
        self._digest.update(END)
        with naming(self.folder / self._name):
            self._file.write(END)
            self._file.close()
            self._file = None
            commit(self._work, self.folder / self._name)
        size = self._offset + len(END)
        self.shards.append(Shard(self._name, size, tuple(self._blocks), self._digest.hexdigest()))


class _Tee:
    """Writes to a file while computing the SHA-256 of all and the CRC-32 of one block."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file, self._digest, self.crc = file, digest, 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self.crc = zlib.crc32(data, self.crc)
        return self._file.write(data)
