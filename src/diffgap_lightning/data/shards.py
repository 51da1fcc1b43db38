"""Block shards from embeddings and back: `write_embedding_shards`, `read_embedding_shards`.

    kind "pairs"   every row holds one embedding of each modality that belong together; rows are shuffled over the whole
                   input, so that a reader that takes neighbouring rows still sees a random sample. For training.
    kind "rows"    each modality's own rows, each once, in the order given, in blocks of one modality; pairs are where
    ids
                   are equal, so five captions of a clip cost five text rows and one audio row. For evaluation.

The whole folder is written under a temporary name and renamed when the manifest is in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffgap_lightning.atomic import check_replaceable, replace_folder
from diffgap_lightning.data.chunks import Layout, table_pairs, table_rows
from diffgap_lightning.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from diffgap_lightning.data.shard_writer import ShardWriter
from diffgap_lightning.data.shuffle import Rows, reblock, shuffle_rows
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.table_fields import same_encoder

Chunk = Mapping[str, Any]


def write_embedding_shards(
    source: EmbeddingTable | Iterable[Chunk],
    folder: str | os.PathLike[str],
    *,
    kind: str = "pairs",
    rows_per_block: int = 4096,
    rows_per_shard: int = 262_144,
    dtype: str = "float16",
    seed: int = 0,
    encoder: str | None = None,
    split: str | None = None,
    memory: int = 256 << 20,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Manifest:
    """Write block shards and their manifest into `folder`.

    Args:
        source: A table, or chunks of any size: `<modality>` (n, D) floating unit rows, `<modality>_id` (n,) integers or
            strings, and `<modality>_<column>` (n,) arrays, as arrays or tensors. For kind `"pairs"` the rows of a
            chunk are aligned and ids equal row by row; for kind `"rows"` a chunk may hold any modalities in any
            numbers.
        folder: Absent or empty, unless `overwrite`.
        kind: `"pairs"` or `"rows"`. A table's pairs are all combinations of rows with equal ids.
        rows_per_block: Rows read and decoded at a time.
        rows_per_shard: Rows of one modality in a tar.
        dtype: `"float16"` or `"float32"`.
        seed: Decides the order of pairs.
        encoder: Fingerprint of the model that made the rows; a table's own by default.
        split: A name for the manifest, e.g. `"train"`.
        memory: About as many bytes are held while shuffling; the rest waits in temporary files beside `folder`.
        overwrite: Replace shards that are already there.
        progress: Called with the number of rows of each block written.

    Returns:
        The manifest.

    Raises:
        ValueError: rows that are no embeddings, pairs whose ids differ, nothing to write, or a folder in use.
        OSError: `folder` cannot be written to.
    """
    if kind not in ("pairs", "rows"):
        raise ValueError(f"kind: got {kind!r}, expected 'pairs' or 'rows'")
    if rows_per_block < 1 or rows_per_shard < rows_per_block:
        raise ValueError(
            f"got {rows_per_block} rows a block and {rows_per_shard} a shard; expected 1 <= block <= shard"
        )
    folder = Path(folder)
    _check_free(folder, overwrite)
    check_replaceable(folder, folder=True)
    if isinstance(source, EmbeddingTable):
        encoder = same_encoder(encoder, source.encoder, "the table")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        layout, chunks = _open(source, kind, np.dtype(dtype), seed, rows_per_block)
        with ShardWriter(
            work,
            layout.dims,
            aligned=kind == "pairs",
            dtype=dtype,
            columns=layout.columns,
            named=layout.named,
            rows_per_shard=rows_per_shard,
        ) as writer:
            if isinstance(source, EmbeddingTable):
                blocks = chunks
            elif kind == "pairs":
                rows = (layout.to_rows(chunk) for chunk in chunks)
                shuffled = reblock(shuffle_rows(rows, seed, memory=memory, folder=work), rows_per_block)
                blocks = (layout.from_rows(block) for block in shuffled)
            else:
                blocks = _reblock_modalities(layout, chunks, rows_per_block)
            for block in blocks:
                writer.write(block)
                if progress is not None:
                    progress(max(len(block[m]) for m in layout.dims if m in block))
        if not writer.shards:
            raise ValueError(f"{folder}: nothing to write: the input holds no {kind}")
        manifest = Manifest(
            kind, layout.dims, tuple(writer.shards), dtype, encoder, split, layout.columns, layout.named,
            seed if kind == "pairs" else None,
        )  # fmt: skip
        write_manifest(work, manifest)
        work.chmod(0o755)
        replace_folder(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def _open(
    source: EmbeddingTable | Iterable[Chunk], kind: str, dtype: np.dtype, seed: int, rows_per_block: int
) -> tuple[Layout, Iterator[Chunk]]:
    """The layout of the rows, and blocks of a table or the checked chunks of an iterable."""
    if isinstance(source, EmbeddingTable):
        source.check("table")
        layout = Layout.of_table(source, dtype, aligned=kind == "pairs")
        blocks = table_pairs(source, seed, rows_per_block) if kind == "pairs" else table_rows(source, rows_per_block)
        return layout, blocks
    chunks = iter(source)
    first = next(chunks, None)
    if first is None:
        raise ValueError("nothing to write: the input has no chunks")
    layout = Layout.of_chunk(first, dtype, aligned=kind == "pairs")
    return layout, (layout.check(chunk, number) for number, chunk in enumerate(_chain(first, chunks)))


def _chain(first: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from rest


def _reblock_modalities(layout: Layout, chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """Blocks of one modality each; what does not fill a block waits for the next chunk."""
    held: dict[str, list[Rows]] = {m: [] for m in layout.dims}
    for chunk in chunks:
        for modality in layout.dims:
            if modality not in chunk:
                continue
            held[modality].append(layout.to_rows(chunk, modality))
            if sum(len(rows.records) for rows in held[modality]) >= size:
                blocks = list(reblock(held[modality], size))
                held[modality] = blocks[-1:] if len(blocks[-1].records) < size else []
                yield from (layout.from_rows(block, modality) for block in blocks if len(block.records) == size)
    for modality, rest in held.items():
        yield from (layout.from_rows(block, modality) for block in reblock(rest, size))


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder; choose another name")
    if (folder / MANIFEST_NAME).is_file():
        if not overwrite:
            raise ValueError(f"{folder}: holds shards already; choose another folder or overwrite them")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder}: exists, is not empty and holds no {MANIFEST_NAME}; choose an empty or new folder")
