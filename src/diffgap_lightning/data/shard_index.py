"""From what a user names (folder, files, glob, braces) to a `ShardSet`: by its manifest, or by reading tar headers.

Where a folder has a `manifest.json`, that decides what must be there, also for a glob over the folder: a shard that is
listed and gone is a loss, not a smaller data set. Classic WebDataset tars have none, so their headers are read
once (no data) to count samples and to cut each tar into blocks of neighbouring samples; `diffgap shards index` keeps
that result as a manifest.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from diffgap_lightning.data.losses import Loss
from diffgap_lightning.data.manifest import (
    MANIFEST_NAME,
    Block,
    Manifest,
    Shard,
    check_modality,
    manifest_from_json,
    merge_manifests,
)
from diffgap_lightning.data.npy import decode_npy
from diffgap_lightning.data.samples import split_name
from diffgap_lightning.data.shard_reader import ShardSet
from diffgap_lightning.data.tar import RECORD, iter_headers
from diffgap_lightning.data.urls import (
    check_url,
    expand_braces,
    expand_glob,
    is_remote,
    join_url,
    open_binary,
    read_bytes,
    read_range,
)

SAMPLES_PER_BLOCK = 1024
Spec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def open_shards(spec: Spec, modalities: Sequence[str] | None = None) -> ShardSet:
    """The shards that a specification names.

    Args:
        spec: A folder of shards, a `manifest.json`, tar files, a glob, a brace pattern, or a list of those; local or
            `http(s)`, `s3`, `gs`.
        modalities: The modalities of classic tars, where not all `.npy` members are wanted.

    Raises:
        FileNotFoundError: a folder without a manifest or tars, or a glob that matches nothing.
        ValueError: addresses that may not be opened, a damaged manifest, or sets that do not go together.
    """
    parts = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    texts = [text for part in parts for text in expand_braces(check_url(os.fspath(part)))]
    sets: list[ShardSet] = []
    loose: list[str] = []
    for text in dict.fromkeys(texts):
        if os.path.isdir(text):
            sets.append(_open_folder(text))
        elif not (text.partition("?")[0] if is_remote(text) else text).endswith(".tar"):
            sets.append(_open_folder(text.removesuffix(MANIFEST_NAME).rstrip("/") or "."))
        elif (listed := _open_listed(text)) is not None:
            sets.append(listed)
        else:
            loose += expand_glob(text)
    if loose:
        sets.append(index_shards(loose, modalities))
    if not sets:
        raise ValueError(f"{spec!r}: names no shards; give a folder, a path, a glob or a brace pattern")
    manifest = merge_manifests([s.manifest for s in sets], str(spec))
    urls = tuple(url for s in sets for url in s.urls)
    repeated = [url for url in dict.fromkeys(urls) if urls.count(url) > 1] if len(set(urls)) < len(urls) else []
    if repeated:
        raise ValueError(f"{spec!r}: names {repeated[0]} twice; name each shard once")
    return ShardSet(manifest, urls, tuple(loss for s in sets for loss in s.losses))


def index_shards(urls: Sequence[str], modalities: Sequence[str] | None = None) -> ShardSet:
    """Count the samples of classic tars by reading their headers.

    Tars that cannot be read are reported in `ShardSet.losses`, with the mean number of samples of the others.

    Raises:
        ValueError: no tar has a readable sample, or the tars hold blocks and have lost their manifest.
    """
    shards: list[Shard] = []
    losses: list[Loss] = []
    dims: dict[str, int] = {}
    dtype = "float32"
    for url in urls:
        name = posixpath.basename(url.partition("?")[0]) if is_remote(url) else os.path.basename(url)
        try:
            if not dims:
                dims, dtype = _probe(url, modalities)
            blocks, size, problem = _index_one(url, tuple(dims))
        except (OSError, tarfile.TarError) as error:
            blocks, size, problem = (), 0, " ".join(str(error).split()) or type(error).__name__
        shards.append(Shard(name, size, blocks))
        if problem:
            losses.append(Loss(name, "shard", 0, problem))
    if not dims:
        told = "; ".join(map(str, losses[:3])) or "no samples"
        raise ValueError(f"{urls[0]}: no shard has a readable sample: {told}; expected key.<modality>.npy members")
    rows = {shard.name: sum(b.rows[0] for b in shard.blocks) for shard in shards}
    mean = round(float(np.mean([n for n in rows.values() if n])))
    losses = [loss._replace(rows=max(1, mean - rows[loss.shard])) for loss in losses]
    return ShardSet(Manifest("samples", dims, tuple(shards), dtype), tuple(urls), tuple(losses))


def _open_folder(folder: str) -> ShardSet:
    address = join_url(folder, MANIFEST_NAME)
    try:
        manifest = manifest_from_json(read_bytes(address), address)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{address}: not found; without their manifest shards are incomplete: write them with "
            "`diffgap shards pack`, or name classic tars as FOLDER/*.tar"
        ) from error
    return ShardSet(manifest, tuple(join_url(folder, shard.name) for shard in manifest.shards))


def _open_listed(text: str) -> ShardSet | None:
    """The part of a folder's manifest that a tar's name or glob selects; None where there is no manifest."""
    folder, _, pattern = text.rpartition("/")
    if "?" in text and is_remote(text) or (any(c in folder for c in "*?[") and not os.path.isdir(folder)):
        return None
    try:
        whole = _open_folder(folder or ("/" if text.startswith("/") else "."))
    except OSError:
        return None
    names = [shard.name for shard in whole.manifest.shards]
    chosen = [i for i, name in enumerate(names) if name == pattern]
    chosen = chosen or [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
    if not chosen:
        raise FileNotFoundError(f"{text}: {MANIFEST_NAME} beside it lists no such shard")
    manifest = replace(whole.manifest, shards=tuple(whole.manifest.shards[i] for i in chosen))
    return ShardSet(manifest, tuple(whole.urls[i] for i in chosen))


def _headers(url: str) -> Iterator[tarfile.TarInfo]:
    with open_binary(url) as file:
        yield from iter_headers(file)


def _probe(url: str, modalities: Sequence[str] | None) -> tuple[dict[str, int], str]:
    """Dimensions and type of the first sample's embeddings."""
    dims: dict[str, int] = {}
    dtype, first = "float32", None
    for member in _headers(url):
        parts = split_name(member.name)
        if parts is None or not member.isreg() or member.issparse() or not parts[1].endswith(".npy"):
            continue
        if first is not None and parts[0] != first and dims:
            break
        first = parts[0]
        modality = parts[1].removesuffix(".npy")
        if modality not in (modalities or [modality]) or not check_modality(modality):
            continue
        try:
            array = decode_npy(read_range(url, member.offset_data, member.size).data, member.name)
        except ValueError:
            continue
        if array.ndim == 2:
            raise ValueError(f"{url}: holds blocks, but no {MANIFEST_NAME} is beside it; copy the whole folder")
        if array.ndim == 1 and array.dtype.kind == "f" and array.size:
            dims[modality], dtype = len(array), str(array.dtype)
    missing = [m for m in modalities or () if m not in dims]
    if dims and missing:
        raise ValueError(f"{url}: the first sample lacks {missing[0]}.npy, it has {', '.join(dims)}")
    ordered = {m: dims[m] for m in (modalities or sorted(dims))} if dims else {}
    return ordered, dtype if dtype in ("float16", "float32", "float64") else "float32"


def _index_one(url: str, modalities: tuple[str, ...]) -> tuple[tuple[Block, ...], int, str]:
    """Blocks of neighbouring samples, the end of the last one, and what is wrong with the tar, if anything."""
    wanted = {f"{m}.npy" for m in modalities}
    starts: list[int] = []
    end, key, problem = 0, None, ""
    try:
        for member in _headers(url):
            parts = split_name(member.name)
            if parts is None or not member.isreg() or member.issparse() or parts[1] not in wanted:
                continue
            if parts[0] != key:
                key = parts[0]
                starts.append(member.offset)
            end = member.offset_data + -(-member.size // RECORD) * RECORD
    except tarfile.TarError as error:
        problem = f"truncated or damaged: {error}"
    if problem and starts:
        end = starts.pop()  # the last sample may lack its end
    if not starts:
        return (), end, problem or "holds no samples"
    cuts = [*starts[::SAMPLES_PER_BLOCK], end]
    counts = [min(SAMPLES_PER_BLOCK, len(starts) - i) for i in range(0, len(starts), SAMPLES_PER_BLOCK)]
    width = len(modalities)
    blocks = tuple(Block(a, b - a, (n,) * width) for a, b, n in zip(cuts, cuts[1:], counts, strict=False))
    return blocks, end, problem
