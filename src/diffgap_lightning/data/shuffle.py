"""A uniform shuffle of more rows than memory holds, in two passes over temporary files.

Every row goes to one of K buckets drawn at random; each bucket is then read into memory and permuted. The result is
uniform over all orders (Rao 1961, Sandelius 1962): independent bucket labels make every assignment equally likely,
and within a bucket every order is. A bucket that is still too large is shuffled in the same way again.

Rows are NumPy records, one field a column, so that a row moves as one piece; strings are kept beside them as JSON
lines.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """`(n,)` records and, for each of them, its strings (no lists at all where there are none)."""

    records: np.ndarray
    strings: list[list[str]]

    def take(self, index: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(self.records[index], [self.strings[i] for i in index] if self.strings else [])


def shuffle_rows(
    chunks: Iterable[Rows],
    seed: int,
    *,
    buckets: int = 256,
    memory: int = 256 << 20,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[Rows]:
    """Yield all rows of `chunks` in a random order, in chunks of any size.

    Args:
        chunks: Rows with the same fields.
        seed: Decides the order.
        buckets: Temporary files at a time.
        memory: About as many bytes are held; a larger bucket is shuffled in another pass.
        folder: Where temporary files go; by default the system's place for them.
    """
    yield from _shuffle(chunks, [seed, 3], buckets, memory, folder)


def _shuffle(
    chunks: Iterable[Rows], seeds: list[int], buckets: int, memory: int, folder: str | os.PathLike[str] | None
) -> Iterator[Rows]:
    random = np.random.default_rng(seeds)
    with tempfile.TemporaryDirectory(prefix="shuffle-", suffix=".tmp", dir=folder) as work:
        files = [_Bucket(Path(work) / f"{i}") for i in range(buckets)]
        for chunk in _larger(chunks, memory // 16):
            labels = random.integers(buckets, size=len(chunk.records))
            order = np.argsort(labels, kind="stable")
            cuts = np.searchsorted(labels[order], np.arange(buckets + 1))
            for i in np.unique(labels):
                files[i].append(chunk.take(order[cuts[i] : cuts[i + 1]]))
        for i, bucket in enumerate(files):
            if bucket.size > memory and bucket.rows > 1:
                inner = bucket.read(max(1, memory // (4 * max(1, bucket.size // bucket.rows))))
                yield from _shuffle(inner, [*seeds, i], buckets, memory, folder)
            else:
                for rows in bucket.read(None):
                    yield rows.take(random.permutation(len(rows.records)))
            bucket.remove()


def _larger(chunks: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows in chunks of about `size` bytes, so that a bucket gets more than a few rows at a time."""
    held: list[Rows] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(rows.records.nbytes for rows in held) >= size:
            yield _join(held)
            held = []
    if held:
        yield _join(held)


class _Bucket:
    """One temporary file of records, and one of strings beside it. Nothing is held open between appends."""

    def __init__(self, path: Path) -> None:
        self._path, self._dtype = path, np.dtype(np.uint8)
        self.rows = self.size = 0

    def append(self, rows: Rows) -> None:
        self._dtype = rows.records.dtype
        data = np.ascontiguousarray(rows.records)
        with self._path.open("ab") as file:
            data.tofile(file)
        if rows.strings:
            text = "".join(json.dumps(s) + "\n" for s in rows.strings)
            with self._path.with_suffix(".jsonl").open("a", encoding="utf-8") as lines:
                self.size += lines.write(text)
        self.rows += len(data)
        self.size += data.nbytes

    def read(self, count: int | None) -> Iterator[Rows]:
        """Everything in chunks of `count` rows; None is one chunk."""
        if not self.rows:
            return
        count = count or self.rows
        strings = self._path.with_suffix(".jsonl")
        lines = strings.open(encoding="utf-8") if strings.exists() else None
        try:
            with self._path.open("rb") as file:
                while len(records := np.fromfile(file, self._dtype, count)):
                    yield Rows(records, [json.loads(next(lines)) for _ in range(len(records))] if lines else [])
        finally:
            if lines:
                lines.close()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".jsonl").unlink(missing_ok=True)


def reblock(chunks: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows in the same order, in chunks of `size`; the last one may be smaller."""
    held: list[Rows] = []
    count = 0
    for chunk in chunks:
        start = 0
        while count + len(chunk.records) - start >= size:
            stop = start + size - count
            yield _join([*held, _slice(chunk, start, stop)])
            held, count, start = [], 0, stop
        if start < len(chunk.records):
            held.append(_slice(chunk, start, len(chunk.records)))
            count += len(chunk.records) - start
    if held:
        yield _join(held)


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(rows.records[start:stop], rows.strings[start:stop])


def _join(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(np.concatenate([p.records for p in parts]), [s for p in parts for s in p.strings])
