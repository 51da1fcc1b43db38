"""What is embedded, cut into parts: a part is the unit of work that is done, written and never done again.

    CatalogCorpus   part p holds clips [p n, (p + 1) n) of the catalog
    RawCorpus       part p is the p-th tar of raw media, read from its beginning to its end

Parts depend on the corpus alone, so a run may go on with other batch sizes, workers or ranks.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffgap_lightning.data.catalog import Catalog, Clip
from diffgap_lightning.data.raw_shards import MAX_MEMBER_BYTES, Skip, iter_raw_clips, raw_shard_ids
from diffgap_lightning.data.urls import file_size

_STEP = 64  # clips; parts are multiples of it, so that common batch sizes fill them
_MOST = 4096


class Corpus(Protocol):
    """Clips in parts."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def digest(self) -> str:
        """Changes where the clips of any part change."""

    @property
    def part_clips(self) -> list[int] | None:
        """Clips of each part, if that is known before reading."""

    def __len__(self) -> int:
        """Number of parts."""

    def clips(self, part: int) -> Iterator[Clip | Skip]:
        """The clips of a part, in an order that never changes."""


def default_part_size(clips: int) -> int:
    """Clips a part: about a thousand parts, between 64 and 4096 clips each."""
    return min(_MOST, max(_STEP, math.ceil(clips / 1000 / _STEP) * _STEP))


@dataclass(frozen=True)
class CatalogCorpus:
    """The clips of a catalog, in its order.

    Args:
        catalog: What `read_catalog` gave.
        part_size: Clips a part; 0 chooses by `default_part_size`.
    """

    catalog: Catalog
    part_size: int = 0

    @property
    def name(self) -> str:
        """The catalog's path."""
        return str(self.catalog.path)

    @property
    def size(self) -> int:
        """Clips a part."""
        return self.part_size or default_part_size(len(self.catalog))

    @property
    def digest(self) -> str:
        """Over ids, texts and the size of parts; media may still arrive between two runs."""
        digest = hashlib.sha256(f"parts of {self.size}".encode())
        for clip in self.catalog.clips:
            digest.update("\0".join((clip.id, *clip.texts, "")).encode())
        return digest.hexdigest()

    @property
    def part_clips(self) -> list[int]:
        """Clips of each part."""
        return [min(self.size, len(self.catalog) - start) for start in range(0, len(self.catalog), self.size)]

    def __len__(self) -> int:
        """Number of parts."""
        return math.ceil(len(self.catalog) / self.size)

    def clips(self, part: int) -> Iterator[Clip | Skip]:
        """The clips of a part."""
        yield from self.catalog.clips[part * self.size : (part + 1) * self.size]


class RawCorpus:
    """Tars of raw media, one part each.

    Args:
        spec: A folder, path, glob or brace pattern, or several.
        max_bytes: Of one member of a tar.
    """

    part_clips = None

    def __init__(
        self, spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], max_bytes: int = MAX_MEMBER_BYTES
    ) -> None:
        self._tars = list(raw_shard_ids(spec).items())
        self._max_bytes = max_bytes
        parts = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
        self.name = ", ".join(str(os.fspath(part)) for part in parts)

    @property
    def digest(self) -> str:
        """Over the tars' ids and sizes."""
        digest = hashlib.sha256()
        for url, prefix in self._tars:
            digest.update(f"{prefix}\0{_size(url)}\0".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of tars."""
        return len(self._tars)

    def clips(self, part: int) -> Iterator[Clip | Skip]:
        """The clips of a tar."""
        return iter_raw_clips(*self._tars[part], max_bytes=self._max_bytes)


def available_modalities(corpus: Corpus, modalities: Sequence[str]) -> tuple[str, ...]:
    """Those of `modalities` that at least one clip has; of raw tars, that the first usable clip has."""
    if isinstance(corpus, CatalogCorpus):
        clips: Iterator[Clip] = iter(corpus.catalog.clips)
    else:
        found = (clip for part in range(len(corpus)) for clip in corpus.clips(part) if isinstance(clip, Clip))
        clips = iter([clip for clip, _ in zip(found, range(1), strict=False)])
    seen: set[str] = set()
    for clip in clips:
        seen |= {"text"} if clip.texts else set()
        seen |= {m for m in ("audio", "video") if getattr(clip, m) is not None}
        if len(seen) == 3:
            break
    return tuple(m for m in modalities if m in seen)


def first_problem(corpus: Corpus) -> str | None:
    """Why the first clip, or tar, that cannot be used cannot; None if there is no such one."""
    found = (clip for part in range(len(corpus)) for clip in corpus.clips(part) if isinstance(clip, Skip))
    return next((f"{skip.path or skip.id}: {skip.reason}" for skip in found), None)


def _size(url: str) -> int:
    try:
        return file_size(url)
    except OSError:
        return -1  # reported as a damaged tar when it is read
