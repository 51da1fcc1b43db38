"""Reads one block of a shard set: one byte range, its CRC-32, then only the members that are expected.

    range of the tar -> CRC-32 -> members -> `<modality>.npy`, `<modality>_id.npy`   (kinds "pairs", "rows")
                                          -> `key.<modality>.npy`, one row a key     (kind "samples")

Other members are never decoded, whatever their name. Arrays are read without pickle and their headers are compared
with the bytes that are there. A block that is not what the manifest says raises `ShardError`; a bad sample of a
classic tar is left out and reported.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import torch

from diffgap_lightning.data.losses import Loss, ShardError
from diffgap_lightning.data.manifest import Block, Manifest, column_owner
from diffgap_lightning.data.npy import decode_npy
from diffgap_lightning.data.samples import iter_samples
from diffgap_lightning.data.tar import iter_members
from diffgap_lightning.data.urls import read_range
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.pairs import hash_ids


@dataclass(frozen=True)
class ShardSet:
    """A manifest and the address of each of its shards, which may come from several folders.

    Attributes:
        manifest: What is in the shards.
        urls: `(shards,)` addresses.
        losses: What could not even be indexed (only where there was no manifest).
    """

    manifest: Manifest
    urls: tuple[str, ...]
    losses: tuple[Loss, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Changes when shards are added, removed or rewritten; the same wherever they lie."""
        digest = hashlib.sha256(self.manifest.block_rows.tobytes())
        for shard in self.manifest.shards:
            digest.update(f"{shard.name} {shard.size} {shard.sha256}\n".encode())
        return digest.hexdigest()[:16]


@dataclass
class BlockData:
    """What was read from one block.

    Attributes:
        arrays: `<modality>` (n, D) as stored, `<modality>_id` (n,) int64, and where asked for `<modality>_id.str` and
            columns.
        kept: `(n,)` numbers of these rows within the block, None where none is missing.
        losses: Samples left out.
    """

    arrays: dict[str, np.ndarray]
    kept: np.ndarray | None = None
    losses: tuple[Loss, ...] = ()


class BlockReader:
    """Reads blocks by their number over all shards.

    Args:
        shards: What to read.
        modalities: Read these only; by default all.
        extras: Also read string ids and columns.
    """

    def __init__(self, shards: ShardSet, modalities: Sequence[str] | None = None, extras: bool = False) -> None:
        manifest = shards.manifest
        self.shards, self.extras = shards, extras
        self.modalities = tuple(modalities or manifest.modalities)
        missing = [m for m in self.modalities if m not in manifest.dims]
        if missing:
            raise ValueError(f"modality {missing[0]!r}: the shards hold {', '.join(manifest.dims)}")
        self._bounds = np.cumsum([len(shard.blocks) for shard in manifest.shards])

    def __len__(self) -> int:
        """Number of blocks."""
        return int(self._bounds[-1]) if len(self._bounds) else 0

    def locate(self, index: int) -> tuple[str, int, Block]:
        """Address of the shard, number within it and record of a block."""
        shard = int(np.searchsorted(self._bounds, index, side="right"))
        inner = index - (int(self._bounds[shard - 1]) if shard else 0)
        return self.shards.urls[shard], inner, self.shards.manifest.shards[shard].blocks[inner]

    def read(self, index: int) -> BlockData:
        """Read a block.

        Raises:
            ShardError: the block is missing, truncated, altered, or not what the manifest says.
        """
        url, inner, block = self.locate(index)
        name = PurePosixPath(url).name
        try:
            buffer = read_range(url, block.offset, block.size)
            if block.crc32 is not None and zlib.crc32(buffer.data) != block.crc32:
                raise ValueError("altered: its CRC-32 differs from the manifest's")
            if self.shards.manifest.kind == "samples":
                return self._decode_samples(buffer, block, name)
            return BlockData(self._decode_block(buffer, block))
        except FileNotFoundError as error:
            raise self._error(name, inner, block, "the file is missing") from error
        except (ValueError, TypeError, OSError, tarfile.TarError) as error:
            raise self._error(name, inner, block, " ".join(str(error).split()) or type(error).__name__) from error

    def _error(self, name: str, inner: int, block: Block, reason: str) -> ShardError:
        return ShardError(Loss(name, f"block {inner}", max(block.rows), reason))

    def _decode_block(self, buffer: np.ndarray, block: Block) -> dict[str, np.ndarray]:
        manifest = self.shards.manifest
        expected = {f"{m}{end}.npy" for m in self.modalities for end in ("", "_id")}
        if self.extras:
            expected |= {f"{m}_id.str.npy" for m in manifest.named if m in self.modalities}
            expected |= {f"{c}.npy" for c in manifest.columns if column_owner(c, manifest.dims) in self.modalities}
        arrays: dict[str, np.ndarray] = {}
        for name, data in iter_members(buffer):
            kind = PurePosixPath(name).name.partition(".")[2]
            if kind not in expected:
                continue
            if kind.removesuffix(".npy") in arrays:
                raise ValueError(f"{name}: a second {kind} in one block")
            arrays[kind.removesuffix(".npy")] = decode_npy(data, name)
        for modality in self.modalities:
            rows = block.rows[manifest.modalities.index(modality)]
            if rows:
                self._check(arrays, modality, rows, trusted=block.crc32 is not None)
        ids = [arrays[f"{m}_id"] for m in self.modalities if f"{m}_id" in arrays]
        if manifest.kind == "pairs" and any(not np.array_equal(ids[0], other) for other in ids[1:]):
            raise ValueError(f"ids of {', '.join(self.modalities)} differ; pairs need equal ids row by row")
        return arrays

    def _check(self, arrays: dict[str, np.ndarray], modality: str, rows: int, trusted: bool) -> None:
        """Shapes and types as in the manifest; values too where no checksum says that a writer checked them."""
        dim = self.shards.manifest.dims[modality]
        for name in (modality, f"{modality}_id"):
            if name not in arrays:
                raise ValueError(f"lacks {name}.npy")
        embeddings, ids = arrays[modality], arrays[f"{modality}_id"]
        if embeddings.shape != (rows, dim) or embeddings.dtype.kind != "f":
            got = f"{embeddings.shape} of {embeddings.dtype}"
            raise ValueError(f"{modality}: got {got}, expected ({rows}, {dim}) floating")
        if ids.shape != (rows,) or ids.dtype.kind not in "iuU":
            raise ValueError(f"{modality}_id: got {ids.shape} of {ids.dtype}, expected ({rows},) integers or strings")
        if ids.dtype.kind == "U":
            arrays[f"{modality}_id.str"] = ids
            arrays[f"{modality}_id"] = hash_ids(ids.tolist()).numpy()
        else:
            arrays[f"{modality}_id"] = ids.astype(np.int64, copy=False)
        if not trusted:
            check_embeddings(torch.from_numpy(np.array(embeddings)), modality, unit=True)

    def _decode_samples(self, buffer: np.ndarray, block: Block, shard: str) -> BlockData:
        """Rows from consecutive samples; a sample with a missing or bad member is left out and reported."""
        dims = {m: self.shards.manifest.dims[m] for m in self.modalities}
        good: dict[int, tuple[str, dict[str, np.ndarray]]] = {}
        losses: list[Loss] = []
        count = 0
        for number, sample in enumerate(iter_samples(buffer, self.modalities)):
            count += 1
            try:
                good[number] = sample.key, {m: sample.row(m, dim) for m, dim in dims.items()}
            except (ValueError, TypeError) as error:
                losses.append(Loss(shard, f"sample {sample.key!r}", 1, str(error)))
        for number, reason in _bad_rows(good, self.modalities):
            losses.append(Loss(shard, f"sample {good.pop(number)[0]!r}", 1, reason))
        if count != block.rows[0] or not good:
            raise ValueError(f"{len(good)} good samples of {count}, the index says {block.rows[0]}")
        keys = [key for key, _ in good.values()]
        ids = hash_ids(keys).numpy()
        arrays: dict[str, np.ndarray] = {m: np.stack([rows[m] for _, rows in good.values()]) for m in self.modalities}
        arrays |= {f"{m}_id": ids for m in self.modalities}
        if self.extras:
            arrays |= {f"{m}_id.str": np.array(keys) for m in self.modalities}
        return BlockData(arrays, np.array(list(good)) if losses else None, tuple(losses))


def _bad_rows(good: dict[int, tuple[str, dict[str, np.ndarray]]], modalities: Sequence[str]) -> list[tuple[int, str]]:
    """Number and reason of samples whose rows are no unit embeddings; one check for all while all are good."""
    found: dict[int, str] = {}
    for modality in modalities:
        stack = {number: torch.from_numpy(rows[modality])[None] for number, (_, rows) in good.items()}
        try:
            if stack:
                check_embeddings(torch.cat(list(stack.values())), modality, unit=True)
        except ValueError:
            for number, row in stack.items():
                try:
                    check_embeddings(row, f"{modality}.npy", unit=True)
                except ValueError as error:
                    found.setdefault(number, str(error))
    return list(found.items())
