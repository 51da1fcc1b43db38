"""What a set of shards holds: `manifest.json`, and where its files lie.

A manifest lists shards, and in each shard its blocks: a byte range of the tar (headers included), that range's
CRC-32, and the rows of every modality in it. So one block is one read, steps per epoch are known before any data is
touched, and blocks can be dealt to ranks and workers whatever the number of shards.

    kind "pairs"    row i of every modality in a block belongs together (training streams)
    kind "rows"     each modality's own rows, each once, paired by equal ids (evaluation, many captions a clip)
    kind "samples"  a classic WebDataset tar, one key a sample, `key.<modality>.npy`; `index_shards` makes the manifest

The manifest is written last, under a temporary name and renamed: a folder without one is not a data set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffgap_lightning.atomic import replacing

SCHEMA_VERSION = 1
FORMAT = "diffgap-shards"
MANIFEST_NAME = "manifest.json"
KINDS = ("pairs", "rows", "samples")

_MODALITY = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*\Z")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar\Z")
_COLUMN = re.compile(r"[A-Za-z0-9_-]+\Z")
_LIMIT = 1 << 53


@dataclass(frozen=True)
class Block:
    """A byte range of a shard: `rows[m]` rows of the m-th modality. `crc32` is None where nobody computed one."""

    offset: int
    size: int
    rows: tuple[int, ...]
    crc32: int | None = None


@dataclass(frozen=True)
class Shard:
    """One tar file. `sha256` is None in an index of somebody else's tars."""

    name: str
    size: int
    blocks: tuple[Block, ...]
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        kind: `"pairs"`, `"rows"` or `"samples"`.
        dims: Modality -> embedding dimension D_m; its order is the order of `Block.rows`.
        shards: The tar files.
        dtype: How rows are stored, `"float16"` or `"float32"`.
        encoder: Fingerprint of the model that made the rows, if known.
        split: `"train"`, `"val"`, ... where the writer said so.
        columns: Further `<modality>_<column>` arrays beside the rows.
        named: Modalities whose ids were strings; the strings lie beside the int64 ids.
        seed: Seed of the shuffle at writing, None where rows keep the order in which they came.
    """

    kind: str
    dims: Mapping[str, int]
    shards: tuple[Shard, ...]
    dtype: str = "float16"
    encoder: str | None = None
    split: str | None = None
    columns: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities, in the order of `Block.rows`."""
        return tuple(self.dims)

    @cached_property
    def block_rows(self) -> np.ndarray:
        """`(blocks, modalities)` int64: rows of every block, in shard order."""
        rows = [block.rows for shard in self.shards for block in shard.blocks]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.dims))

    @property
    def num_rows(self) -> dict[str, int]:
        """Modality -> rows in all shards."""
        totals = self.block_rows.sum(axis=0)
        return {modality: int(total) for modality, total in zip(self.dims, totals, strict=True)}

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        record = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "split": self.split,
            "encoder": self.encoder,
            "dtype": self.dtype,
            "modalities": {m: {"dim": self.dims[m], "rows": n} for m, n in self.num_rows.items()},
            "columns": list(self.columns),
            "named": list(self.named),
            "seed": self.seed,
        }
        head = json.dumps(record, indent=2, ensure_ascii=False)[:-2]
        return head + ',\n  "shards": [\n    ' + ",\n    ".join(shard_to_json(s) for s in self.shards) + "\n  ]\n}\n"


def shard_to_json(shard: Shard) -> str:
    """One shard's record, on one line; a block is `[offset, size, crc32, rows of each modality ...]`."""
    blocks = [[b.offset, b.size, b.crc32, *b.rows] for b in shard.blocks]
    return json.dumps({"name": shard.name, "bytes": shard.size, "sha256": shard.sha256, "blocks": blocks})


def shard_from_json(record: Any, modalities: int, where: str = MANIFEST_NAME) -> Shard:
    """Read one shard's record; every number in it is checked before anything believes it.

    Raises:
        ValueError: a record that `shard_to_json` would not have written.
    """
    try:
        name, size, sha256 = record["name"], record["bytes"], record["sha256"]
        blocks = tuple(Block(b[0], b[1], tuple(b[3:]), b[2]) for b in record["blocks"])
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{where}: shard record {str(record)[:80]!r} lacks {error}; the file was altered") from error
    if not isinstance(name, str) or not _SHARD_NAME.match(name):
        raise ValueError(f"{where}: shard name {name!r}, expected a plain file name that ends in .tar")
    if not _is_count(size) or not (sha256 is None or isinstance(sha256, str)):
        raise ValueError(f"{where}: {name}: bytes {size!r} and sha256 {sha256!r}; the file was altered")
    for i, b in enumerate(blocks):
        good = all(map(_is_count, (b.offset, b.size, *b.rows))) and (b.crc32 is None or _is_count(b.crc32))
        if not good or len(b.rows) != modalities or b.offset % 512 or b.size == 0 or b.offset + b.size > size:
            raise ValueError(f"{where}: {name}: block {i} {b} does not lie in a file of {size} bytes; it was altered")
        if max(b.rows, default=0) > b.size:
            raise ValueError(f"{where}: {name}: block {i} claims {max(b.rows)} rows in {b.size} bytes; it was altered")
    return Shard(name, size, blocks, sha256)


def manifest_from_json(text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Read and check the text of a `manifest.json`.

    Raises:
        ValueError: not a manifest, a newer schema, or numbers that contradict each other.
    """
    try:
        record = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); the file was altered or truncated") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{where}: no manifest of shards (format {FORMAT!r}); write it with `diffgap shards pack`")
    version = record.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"{where}: schema_version {version!r}, this version reads 1 to {SCHEMA_VERSION}; upgrade diffgap-lightning"
        )
    fields = _checked_fields(record, where)
    count = len(fields["dims"])
    shards = record.get("shards")
    if not isinstance(shards, list):
        raise ValueError(f"{where}: no list of shards; the file was altered")
    manifest = Manifest(**fields, shards=tuple(shard_from_json(s, count, where) for s in shards))
    check_manifest(manifest, where)
    stated = {m: v.get("rows") for m, v in record["modalities"].items()}
    if stated != manifest.num_rows:
        raise ValueError(f"{where}: states {stated} rows, its blocks hold {manifest.num_rows}; the file was altered")
    return manifest


def check_manifest(manifest: Manifest, where: str) -> None:
    """Refuse repeated shards and, where rows are aligned, blocks whose modalities differ in length."""
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: lists a shard twice; the file was altered")
    rows = manifest.block_rows
    if manifest.kind != "rows" and rows.size and (rows != rows[:, :1]).any():
        raise ValueError(f"{where}: kind {manifest.kind!r} with blocks of unequal rows; the file was altered")


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write `manifest.json` atomically. It belongs last, after every shard it lists."""
    check_manifest(manifest, str(folder))
    path = Path(folder) / MANIFEST_NAME
    with replacing(path) as work:
        work.write_text(manifest.to_json(), encoding="utf-8")
    return path


def merge_manifests(manifests: Sequence[Manifest], where: str = "shards") -> Manifest:
    """One manifest over the shards of several, which must agree in everything but the shards and their names.

    Raises:
        ValueError: different modalities, dimensions, kinds or encoders.
    """
    first = manifests[0]
    encoders = {m.encoder for m in manifests} - {None}
    if len(encoders) > 1:
        raise ValueError(f"{where}: made by different encoders: {', '.join(sorted(map(str, encoders)))}; use one")
    for other in manifests[1:]:
        for name in ("kind", "dims"):
            if getattr(other, name) != getattr(first, name):
                both = f"{getattr(first, name)} and {getattr(other, name)}"
                raise ValueError(f"{where}: {name} {both} do not go together")
    columns = tuple(c for c in first.columns if all(c in m.columns for m in manifests))
    named = tuple(m for m in first.named if all(m in other.named for other in manifests))
    shards = tuple(shard for manifest in manifests for shard in manifest.shards)
    return replace(first, shards=shards, encoder=next(iter(encoders), None), columns=columns, named=named)


def _checked_fields(record: dict[str, Any], where: str) -> dict[str, Any]:
    kind, dtype, modalities = record.get("kind"), record.get("dtype"), record.get("modalities")
    if kind not in KINDS or dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"{where}: kind {kind!r} of {dtype!r}, expected {' or '.join(KINDS)} of float16 or float32")
    if not isinstance(modalities, dict) or not modalities:
        raise ValueError(f"{where}: modalities {modalities!r}, expected name -> dim and rows; the file was altered")
    for name, value in modalities.items():
        dim = value.get("dim") if isinstance(value, dict) else None
        if not check_modality(name) or not _is_count(dim) or not 0 < int(dim or 0) < 1 << 24:
            raise ValueError(f"{where}: modality {name!r}: {value!r}; expected a name like audio, its dim and its rows")
    columns, named = record.get("columns", []), record.get("named", [])
    for values in (columns, named):
        if not isinstance(values, list) or not all(isinstance(v, str) and _COLUMN.match(v) for v in values):
            raise ValueError(f"{where}: columns {columns!r} and named {named!r}, expected lists of names")
    for name in ("encoder", "split"):
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"{where}: {name} {record[name]!r}, expected a string or null")
    seed = record.get("seed")
    return {
        "kind": kind,
        "dtype": dtype,
        "dims": {m: int(v["dim"]) for m, v in modalities.items()},
        "encoder": record.get("encoder"),
        "split": record.get("split"),
        "columns": tuple(columns),
        "named": tuple(named),
        "seed": seed if isinstance(seed, int) else None,
    }


def check_modality(name: str) -> bool:
    """Whether `name` can name a modality or column: lower-case words joined by `_`."""
    return bool(_MODALITY.match(name))


def column_owner(name: str, modalities: Iterable[str]) -> str | None:
    """The modality that a column belongs to: the longest one that, with `_`, opens its name."""
    return max((m for m in modalities if name.startswith(f"{m}_")), key=len, default=None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LIMIT
