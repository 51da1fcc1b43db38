"""Compares a folder of shards with its manifest: what is missing, truncated, altered, left over or not listed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from diffgap_lightning.data.losses import ShardError
from diffgap_lightning.data.manifest import MANIFEST_NAME, Manifest, Shard
from diffgap_lightning.data.shard_index import Spec, open_shards
from diffgap_lightning.data.shard_reader import BlockReader, ShardSet
from diffgap_lightning.data.urls import file_size, is_remote, list_tars, open_binary


def verify_shards(spec: Spec, progress: Callable[[int], object] | None = None) -> list[str]:
    """Check every shard against its manifest.

    Sizes and SHA-256 are compared; where one differs, each block's CRC-32 says which rows are concerned. Shards
    without a SHA-256 (an index of classic tars) are decoded instead.

    Args:
        spec: What `open_shards` takes.
        progress: Called with the number of bytes done since its last call.

    Returns:
        One line a problem, the shard's name first; empty if all is well.

    Raises:
        FileNotFoundError: no manifest.
        ValueError: a damaged manifest.
    """
    shards = open_shards(spec)
    problems = [str(loss) for loss in shards.losses]
    starts = _first_blocks(shards.manifest)
    for number, (shard, url) in enumerate(zip(shards.manifest.shards, shards.urls, strict=True)):
        problems += _verify_one(shards, shard, url, starts[number], progress or (lambda done: None))
    return problems + _extras(shards)


def _verify_one(shards: ShardSet, shard: Shard, url: str, first: int, progress: Callable[[int], object]) -> list[str]:
    try:
        size = file_size(url)
    except FileNotFoundError:
        progress(shard.size)
        return [f"{shard.name}: missing"]
    if shard.sha256 is None:
        progress(shard.size)
        return [f"{shard.name}: {problem}" for problem in _decode(shards, shard, first)]
    if size < shard.size:
        progress(shard.size)
        return [f"{shard.name}: truncated: {size} of {shard.size} bytes{_lost(shards, shard, first)}"]
    if size > shard.size:
        progress(shard.size)
        return [f"{shard.name}: altered: {size} bytes, the manifest says {shard.size}{_lost(shards, shard, first)}"]
    digest = hashlib.sha256()
    with open_binary(url) as file:
        while data := file.read(1 << 20):
            digest.update(data)
            progress(len(data))
    if digest.hexdigest() != shard.sha256:
        return [f"{shard.name}: altered: its SHA-256 differs from the manifest's{_lost(shards, shard, first)}"]
    return []


def _decode(shards: ShardSet, shard: Shard, first: int) -> list[str]:
    reader = BlockReader(shards)
    found = []
    for inner in range(len(shard.blocks)):
        try:
            found += [f"{loss.where}: {loss.reason}" for loss in reader.read(first + inner).losses]
        except ShardError as error:
            found.append(f"{error.loss.where}: {error.loss.reason}")
    return found


def _lost(shards: ShardSet, shard: Shard, first: int) -> str:
    """How many of a damaged shard's rows are concerned."""
    reader, bad = BlockReader(shards), []
    for inner in range(len(shard.blocks)):
        try:
            reader.read(first + inner)
        except ShardError:
            bad.append(inner)
    rows = sum(max(shard.blocks[i].rows) for i in bad)
    return f"; {len(bad)} of {len(shard.blocks)} blocks cannot be read ({rows} rows)"


def _extras(shards: ShardSet) -> list[str]:
    """Tars beside the listed ones, and files of an interrupted write."""
    found = []
    known = set(shards.urls)
    for folder in dict.fromkeys(url.rpartition("/")[0] or "." for url in shards.urls):
        for name in list_tars(folder):
            if f"{folder}/{name}" not in known and not (folder == "." and name in known):
                found.append(f"{name}: not in {MANIFEST_NAME}")
        if not is_remote(folder):
            found += [f"{path.name}: left by an interrupted write" for path in sorted(Path(folder).glob(".*.tmp"))]
    return found


def _first_blocks(manifest: Manifest) -> list[int]:
    starts, total = [], 0
    for shard in manifest.shards:
        starts.append(total)
        total += len(shard.blocks)
    return starts
