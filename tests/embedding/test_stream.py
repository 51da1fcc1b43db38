from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from diffgap_lightning.data.catalog import Catalog, Clip
from diffgap_lightning.embedding.corpus import CatalogCorpus
from diffgap_lightning.embedding.decode import ClipDecoder, EmbedSettings
from diffgap_lightning.embedding.stream import Packed, PartStream, part_loader
from diffgap_lightning.encoders.hashing import HashingEncoder


def test_packed_tensors_come_back() -> None:
    items = [torch.arange(n * 3).reshape(n, 3) for n in (2, 0, 5, 1)]
    packed = Packed.of(items)
    for before, after in zip(items, packed.unpack(), strict=True):
        assert torch.equal(before, after)
    for before, after in zip(items[1:3], packed.slice(1, 3).unpack(), strict=True):
        assert torch.equal(before, after)


def stream(count: int, part_size: int, batch_size: int, parts: list[int] | None = None) -> PartStream:
    clips = [Clip(f"c{i}", () if i % 5 == 3 else (f"text {i}", "x")) for i in range(count)]
    corpus = CatalogCorpus(Catalog(Path("c.csv"), clips), part_size)
    decoder = ClipDecoder(EmbedSettings(("text",)), HashingEncoder(dim=4))
    return PartStream(corpus, list(range(len(corpus))) if parts is None else parts, decoder, batch_size)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_clip_of_the_parts_once_and_each_part_ends_once(num_workers: int) -> None:
    batches = list(part_loader(stream(23, 5, 2), num_workers, pin_memory=False))
    looked_at = sorted([i for b in batches for i in b.ids] + [s.id for b in batches for s in b.skips])
    assert looked_at == sorted(f"c{i}" for i in range(23))
    assert sorted(b.part for b in batches if b.last) == [0, 1, 2, 3, 4]
    for part in range(5):
        own = [b for b in batches if b.part == part]
        assert [b.last for b in own] == [False] * (len(own) - 1) + [True]
        assert {int(i[1:]) // 5 for b in own for i in b.ids} <= {part}
        assert all(0 < b.seen <= 2 for b in own)


def test_skips_have_reasons_and_owners_follow() -> None:
    (batch,) = stream(5, 5, 10)
    assert batch.ids == ["c0", "c1", "c2", "c4"]
    assert batch.skips == [("c3", "text: none", "")]
    assert batch.items["text"] == ["text 0", "x", "text 1", "x", "text 2", "x", "text 4", "x"]
    assert batch.owners["text"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_stream_travels_to_spawned_workers_without_weights() -> None:
    data = pickle.dumps(stream(23, 5, 2))
    assert len(data) < 5000
    assert [b.ids for b in pickle.loads(data)] == [b.ids for b in stream(23, 5, 2)]


def test_no_parts_no_batches() -> None:
    assert list(part_loader(stream(5, 5, 2, parts=[]), 2, pin_memory=False)) == []


def test_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size: got 0"):
        stream(5, 5, 0)
