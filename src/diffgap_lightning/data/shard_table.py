"""Embedding tables from shards: everything, or a bounded sample that is the same in every process.

A clip with five captions is five pairs in a training shard, so its audio row lies there five times. A table holds each
row once: rows of a modality with the same id and the same values are one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from diffgap_lightning.data.losses import LossLedger, ShardError
from diffgap_lightning.data.manifest import column_owner
from diffgap_lightning.data.shard_index import Spec, open_shards
from diffgap_lightning.data.shard_reader import BlockData, BlockReader, ShardSet
from diffgap_lightning.data.table import EmbeddingTable

Arrays = dict[str, np.ndarray]
Keep = Callable[[np.ndarray], np.ndarray]


def read_embedding_shards(
    source: ShardSet | Spec,
    *,
    modalities: Sequence[str] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    extras: bool = True,
    keep: Keep | None = None,
    ledger: LossLedger | None = None,
) -> EmbeddingTable:
    """Read shards into a table.

    Args:
        source: What `open_shards` takes or gives.
        modalities: Read these only.
        max_rows: At most so many rows of each modality. Pairs and samples come from blocks drawn by `seed`; of kind
            `"rows"` whole ids are drawn, so that what is a pair stays one.
        seed: Decides the sample.
        extras: Also string ids and columns.
        keep: `(n,)` int64 ids -> `(n,)` bool; only rows with these ids are kept, as they are read.
        ledger: Counts blocks that cannot be read; without one the first is an error.

    Raises:
        ShardError: a block cannot be read (without a ledger).
        ShardLossError: more was lost than the ledger's budget.
        ValueError: nothing could be read.
    """
    shards = source if isinstance(source, ShardSet) else open_shards(source, modalities)
    reader = BlockReader(shards, modalities, extras)
    if keep is not None:
        parts = [select(part.arrays, keep) for part in _blocks(reader, range(len(reader)), ledger)]
    elif shards.manifest.kind == "rows":
        parts = _read_by_id(reader, max_rows, seed, ledger)
    else:
        parts = _read_in_turn(reader, max_rows, seed, ledger)
    encoder = shards.manifest.encoder
    return table_of(parts, reader.modalities, encoder, distinct=shards.manifest.kind == "pairs", where=shards.urls[0])


def _blocks(reader: BlockReader, order: Sequence[int], ledger: LossLedger | None) -> Iterator[BlockData]:
    for index in order:
        try:
            data = reader.read(index)
        except ShardError as error:
            if ledger is None:
                raise
            ledger.add([error.loss])
            continue
        if data.losses and ledger is None:
            raise ShardError(data.losses[0])
        if ledger is not None:
            ledger.add(data.losses)
        yield data


def _read_in_turn(reader: BlockReader, max_rows: int | None, seed: int, ledger: LossLedger | None) -> list[Arrays]:
    total = int(reader.shards.manifest.block_rows[:, 0].sum())
    order = np.arange(len(reader))
    if max_rows is not None and max_rows < total:
        order = np.random.default_rng([seed, 4]).permutation(len(reader))
    parts: list[Arrays] = []
    left = total if max_rows is None else max_rows
    for data in _blocks(reader, order.tolist(), ledger):
        parts.append({name: array[:left] for name, array in data.arrays.items()})
        left -= len(parts[-1][f"{reader.modalities[0]}_id"])
        if left <= 0:
            break
    return parts


def _read_by_id(reader: BlockReader, max_rows: int | None, seed: int, ledger: LossLedger | None) -> list[Arrays]:
    """All rows of ids whose scrambled value is small enough; then the largest such set that fits."""
    manifest = reader.shards.manifest
    most = max(manifest.num_rows[m] for m in reader.modalities)
    if max_rows is None or most <= max_rows:
        return [data.arrays for data in _blocks(reader, range(len(reader)), ledger)]
    limit = np.uint64(min(1.0, 1.1 * max_rows / most) * (2**64 - 2048))
    parts = [
        select(data.arrays, lambda ids: scramble(ids, seed) <= limit)
        for data in _blocks(reader, range(len(reader)), ledger)
    ]
    for modality in reader.modalities:
        values = np.sort(np.concatenate([scramble(p[f"{modality}_id"], seed) for p in parts if modality in p]))
        if len(values) > max_rows:  # below the first value that does not fit, ids are whole
            limit = min(limit, values[max_rows] - np.uint64(1))
    return [select(part, lambda ids: scramble(ids, seed) <= limit) for part in parts]


def select(arrays: Arrays, keep: Keep) -> Arrays:
    """Rows of every modality whose ids are kept, with their columns."""
    modalities = [name for name in arrays if f"{name}_id" in arrays]
    masks = {modality: keep(arrays[f"{modality}_id"]) for modality in modalities}
    owners = {name: name if name in masks else column_owner(name, modalities) for name in arrays}
    return {name: array[masks[str(owners[name])]] for name, array in arrays.items()}


def scramble(ids: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 of each id: uniform over uint64, and the same everywhere."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(seed % 2**63) * np.uint64(0xD1342543DE82EF95)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def table_of(
    parts: Sequence[Arrays],
    modalities: Sequence[str],
    encoder: str | None = None,
    *,
    distinct: bool = True,
    where: str = "shards",
) -> EmbeddingTable:
    """One table from arrays as `BlockReader` gives them.

    Args:
        parts: `<modality>`, `<modality>_id`, perhaps `<modality>_id.str` and columns.
        modalities: Which of them the table gets.
        encoder: Fingerprint of the model that made the rows.
        distinct: Keep each row of a modality once.
        where: Opens the error message.

    Raises:
        ValueError: a modality has no rows.
    """
    joined: Arrays = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        joined[name] = np.concatenate([part[name] for part in parts if name in part])
    absent = [m for m in modalities if not len(joined.get(m, ()))]
    if absent:
        raise ValueError(f"{where}: no rows of {absent[0]} could be read")
    embeddings, ids, names = {}, {}, {}
    columns: Arrays = {}
    for modality in modalities:
        index: np.ndarray | slice = slice(None)
        if distinct:
            index = _distinct(joined[modality], joined[f"{modality}_id"])
        stored = joined[modality][index]
        rows = torch.from_numpy(stored.astype(np.float32))
        embeddings[modality] = torch.nn.functional.normalize(rows, dim=1) if stored.dtype == np.float16 else rows
        ids[modality] = torch.from_numpy(joined[f"{modality}_id"][index].copy())
        if f"{modality}_id.str" in joined:
            names[modality] = joined[f"{modality}_id.str"][index]
        taken = {modality, f"{modality}_id", f"{modality}_id.str"}
        own = [n for n in joined if n not in taken and column_owner(n, modalities) == modality and n not in modalities]
        columns |= {name: joined[name][index] for name in own}
    return EmbeddingTable(embeddings, ids, names, columns, encoder)


def _distinct(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Numbers of the first row of each (id, values), in order."""
    order = np.argsort(ids, kind="stable")
    if not (ids[order][1:] == ids[order][:-1]).any():
        return np.arange(len(ids))
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    both = np.empty(len(ids), [("id", np.int64), ("row", keys.dtype)])
    both["id"], both["row"] = ids, keys
    whole = both.view(np.dtype((np.void, both.dtype.itemsize)))
    return np.sort(np.unique(whole, return_index=True)[1])
