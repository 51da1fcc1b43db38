"""What `diffgap shards pack` takes: a table, shards of any kind, or a folder of aligned `.npy` arrays, split by ids.

    table.npz                                in memory
    shards/train, "tars/{000..041}.tar"      streamed block by block
    folder with audio.npy, audio_id.npy ...  streamed in slices, so that it may be larger than memory

Training shards of streamed input are written in bounded memory; what is written as `"rows"` (validation and test) is
gathered in memory first, because each row of a modality is to lie there once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffgap_lightning.data.arrays import SUFFIXES
from diffgap_lightning.data.manifest import MANIFEST_NAME, Manifest
from diffgap_lightning.data.npy import decode_npy_header
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_reader import BlockReader, ShardSet
from diffgap_lightning.data.shard_table import Arrays, Keep, read_embedding_shards, scramble, select, table_of
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.splits import split_by_fraction
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.table_fields import same_encoder
from diffgap_lightning.functional.pairs import hash_ids

SLICE_ROWS = 65_536


def pack(
    source: str,
    folder: str | os.PathLike[str],
    *,
    kind: str | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    encoder: str | None = None,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> dict[str, Manifest]:
    """Write block shards from whatever holds embeddings.

    Args:
        source: A table, shards, or a folder of aligned arrays.
        folder: Where the shards go; with fractions, its subfolders `train`, `val` and `test`.
        kind: `"pairs"` or `"rows"`; by default pairs, and rows for `val` and `test`.
        val_fraction: Share of the ids for validation.
        test_fraction: Share of the ids for the test.
        seed: Of the split and of the order.
        encoder: Fingerprint of the model that made the rows; by default the source's own.
        progress: Called with the number of rows of each block written.
        **options: `rows_per_block`, `rows_per_shard`, `dtype`, `overwrite` of `write_embedding_shards`.

    Returns:
        Split (`""` where nothing was split) -> manifest.
    """
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(f"val {val_fraction} and test {test_fraction}: expected shares of the ids that sum below 1")
    shared = {"seed": seed, "progress": progress, **options}
    shares = {"train": 1.0, "val": val_fraction, "test": test_fraction}
    wanted = {name: share for name, share in shares.items() if share} if val_fraction or test_fraction else {"": 1.0}
    if source.endswith(SUFFIXES):
        table = EmbeddingTable.read(source)
        parts: Mapping[str, Any] = {"": table}
        if "" not in wanted:
            parts = split_by_fraction(table, val_fraction, test_fraction, seed, where=source)
        getters = {name: _given(parts[name]) for name in wanted}
    else:
        stream = _Stream(source)
        encoder = same_encoder(encoder, stream.encoder, source)
        keeps = {name: None if not name else _share(name, val_fraction, test_fraction, seed) for name in wanted}
        getters = {name: _streamed(stream, keep) for name, keep in keeps.items()}
    written = {}
    for name, get in getters.items():
        chosen = kind or ("rows" if name in ("val", "test") else "pairs")
        target = Path(folder) / name
        written[name] = write_embedding_shards(
            get(chosen), target, kind=chosen, split=name or None, encoder=encoder, **shared
        )
    return written


def _given(table: EmbeddingTable) -> Callable[[str], EmbeddingTable]:
    return lambda kind: table


def _streamed(stream: _Stream, keep: Keep | None) -> Callable[[str], Any]:
    return lambda kind: stream.chunks(keep) if kind == "pairs" and stream.aligned else stream.table(keep)


def _share(name: str, val: float, test: float, seed: int) -> Keep:
    """Which ids belong to a split: each id has a place between 0 and 1 that depends on `seed` alone."""
    lo, hi = {"val": (0.0, val), "test": (val, val + test), "train": (val + test, 1.0)}[name]

    def keep(ids: np.ndarray) -> np.ndarray:
        place = (scramble(ids, seed) >> np.uint64(11)).astype(np.float64) / 2**53
        return (place >= lo) & (place < hi)

    return keep


class _Stream:
    """Input that is read piece by piece, any number of times."""

    def __init__(self, source: str) -> None:
        self.source, self.shards = source, None if _is_array_folder(source) else open_shards(source)
        self.encoder = self.shards.manifest.encoder if self.shards else None
        self.aligned = self.shards is None or self.shards.manifest.kind != "rows"

    def chunks(self, keep: Keep | None) -> Iterator[Arrays]:
        """Aligned rows, as `write_embedding_shards` takes them."""
        for part in self._parts(keep):
            yield {n.removesuffix(".str"): a for n, a in part.items() if f"{n}.str" not in part}

    def _parts(self, keep: Keep | None) -> Iterator[Arrays]:
        for part in _shard_chunks(self.shards) if self.shards is not None else array_chunks(self.source):
            chunk = part if keep is None else select(part, keep)
            if any(map(len, chunk.values())):
                yield chunk

    def table(self, keep: Keep | None) -> EmbeddingTable:
        """Each row once, in memory."""
        if self.shards is not None:
            return read_embedding_shards(self.shards, keep=keep)
        parts = list(self._parts(keep))
        names = [name for name in parts[0] if f"{name}_id" in parts[0]] if parts else []
        return table_of(parts, names, where=self.source)


def _shard_chunks(shards: ShardSet) -> Iterator[Arrays]:
    reader = BlockReader(shards, extras=True)
    for index in range(len(reader)):
        yield reader.read(index).arrays


def _is_array_folder(source: str) -> bool:
    folder = Path(source)
    return folder.is_dir() and not (folder / MANIFEST_NAME).exists() and any(folder.glob("*_id.npy"))


def array_chunks(folder: str | os.PathLike[str], size: int = SLICE_ROWS) -> Iterator[Arrays]:
    """Aligned slices of the `.npy` arrays in a folder: `<modality>.npy`, `<modality>_id.npy`, columns.

    String ids come as the reader gives them: hashed, and as `<modality>_id.str`.

    Slices are read, not mapped: mapped pages would count as this process's memory.

    Raises:
        ValueError: arrays of different lengths, or none.
    """
    headers = {}
    for path in sorted(Path(folder).glob("*.npy")):
        headers[path.stem] = (path, *decode_npy_header(path))
    lengths = {name: shape[0] for name, (_, shape, _, _) in headers.items() if shape}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{folder}: arrays of lengths {lengths}; expected aligned rows")
    total = next(iter(lengths.values()))
    for start in range(0, total, size):
        count, chunk = min(size, total - start), {}
        for name, (path, shape, dtype, offset) in headers.items():
            width = int(np.prod(shape[1:], dtype=np.int64))
            data = np.fromfile(path, dtype, count * width, offset=offset + start * width * dtype.itemsize)
            chunk[name] = data.reshape(count, *shape[1:])
        for name in [n for n in chunk if n.endswith("_id") and chunk[n].dtype.kind == "U"]:
            chunk[f"{name}.str"], chunk[name] = chunk[name], hash_ids(chunk[name].tolist()).numpy()
        yield chunk
