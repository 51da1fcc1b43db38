"""Batches of decoded clips, part by part: the data set that loader workers iterate.

Worker w of W reads parts w, w + W, ... of a rank's list. A batch never crosses parts; the last one of a part says so.
The tensors of a modality travel as one flat tensor, because each tensor that a worker sends costs a file descriptor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffgap_lightning.data.raw_shards import Skip
from diffgap_lightning.embedding.corpus import Corpus
from diffgap_lightning.embedding.decode import ClipDecoder, DecodedClip


@dataclass
class Packed:
    """Tensors of any shapes, end to end in one."""

    data: Tensor
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, items: Sequence[Tensor]) -> Packed:
        """Pack tensors of one dtype."""
        return cls(torch.cat([item.reshape(-1) for item in items]), [tuple(item.shape) for item in items])

    def slice(self, start: int, stop: int) -> Packed:
        """Some consecutive tensors, sharing memory."""
        sizes = [prod(shape) for shape in self.shapes]
        low, high = sum(sizes[:start]), sum(sizes[:stop])
        return Packed(self.data[low:high], self.shapes[start:stop])

    def unpack(self, data: Tensor | None = None) -> list[Tensor]:
        """The tensors, as views of `data` (by default of the own data)."""
        flat = self.data if data is None else data
        pieces = flat.split([prod(shape) for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


@dataclass
class PartBatch:
    """Some clips of one part.

    Attributes:
        part: Which part.
        ids: Of the clips that were decoded.
        items: Modality -> texts or packed tensors, all clips' one after the other.
        owners: Modality -> the clip of each item, as an index into `ids`.
        starts: Modality -> start of each item in its clip, in s.
        skips: Clips that cannot be used.
        last: The part ends here.
    """

    part: int
    ids: list[str] = field(default_factory=list)
    items: dict[str, Packed | list[str]] = field(default_factory=dict)
    owners: dict[str, list[int]] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    last: bool = False

    @property
    def seen(self) -> int:
        """Clips that were looked at."""
        return len(self.ids) + len(self.skips)

    def pin_memory(self) -> PartBatch:
        """Copy tensors to page-locked memory (called by the loader)."""
        for packed in self.items.values():
            if isinstance(packed, Packed):
                packed.data = packed.data.pin_memory()
        return self


class PartStream(IterableDataset[PartBatch]):
    """Decoded batches of some parts of a corpus.

    Args:
        corpus: The clips.
        parts: Which of its parts.
        decoder: Turns a clip into inputs.
        batch_size: Clips a batch, skipped ones included.
    """

    def __init__(self, corpus: Corpus, parts: Sequence[int], decoder: ClipDecoder, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        self.corpus, self.parts, self.decoder, self.batch_size = corpus, list(parts), decoder, batch_size

    def __iter__(self) -> Iterator[PartBatch]:
        """The batches of this worker's parts."""
        worker = get_worker_info()
        mine = self.parts if worker is None else self.parts[worker.id :: worker.num_workers]
        for part in mine:
            yield from self._batches(part)

    def _batches(self, part: int) -> Iterator[PartBatch]:
        clips: list[DecodedClip] = []
        skips: list[Skip] = []
        for clip in self.corpus.clips(part):
            if len(clips) + len(skips) == self.batch_size:
                yield _collate(part, clips, skips)
                clips, skips = [], []
            result = clip if isinstance(clip, Skip) else self.decoder(clip)
            if isinstance(result, Skip):
                skips.append(result)
            else:
                clips.append(result)
        yield _collate(part, clips, skips, last=True)


def part_loader(stream: PartStream, num_workers: int, pin_memory: bool) -> DataLoader[PartBatch]:
    """A loader that decodes ahead of the encoder."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=min(num_workers, len(stream.parts)),
        collate_fn=_same,
        pin_memory=pin_memory,
        prefetch_factor=2 if min(num_workers, len(stream.parts)) else None,
    )


def _same(batch: Any) -> Any:
    return batch


def _collate(part: int, clips: Sequence[DecodedClip], skips: Sequence[Skip], last: bool = False) -> PartBatch:
    batch = PartBatch(part, [clip.id for clip in clips], skips=list(skips), last=last)
    for modality in clips[0].items if clips else ():
        items = [item for clip in clips for item in clip.items[modality]]
        batch.items[modality] = items if modality == "text" else Packed.of(items)
        batch.owners[modality] = [i for i, clip in enumerate(clips) for _ in clip.items[modality]]
        batch.starts[modality] = [start for clip in clips for start in clip.starts[modality]]
    return batch
