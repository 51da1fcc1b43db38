from __future__ import annotations

import io
import tarfile
from pathlib import Path

from diffgap_lightning.data.catalog import Catalog, Clip
from diffgap_lightning.embedding.corpus import CatalogCorpus, RawCorpus, available_modalities, default_part_size


def catalog(count: int) -> Catalog:
    return Catalog(Path("c.csv"), [Clip(f"c{i}", (f"text {i}",)) for i in range(count)])


def test_parts_hold_every_clip_once_in_order() -> None:
    for count, size in ((10, 3), (9, 3), (1, 5), (64, 0), (65, 0)):
        corpus = CatalogCorpus(catalog(count), size)
        ids = [clip.id for part in range(len(corpus)) for clip in corpus.clips(part) if isinstance(clip, Clip)]
        assert ids == [f"c{i}" for i in range(count)]
        assert sum(corpus.part_clips) == count
        assert [len(list(corpus.clips(p))) for p in range(len(corpus))] == corpus.part_clips


def test_default_part_size_is_a_multiple_of_64_and_gives_about_a_thousand_parts() -> None:
    assert [default_part_size(n) for n in (1, 46_000, 200_000, 1_000_000, 10_000_000)] == [64, 64, 256, 1024, 4096]


def test_digest_follows_ids_texts_and_part_size() -> None:
    base = CatalogCorpus(catalog(3), 2)
    assert base.digest == CatalogCorpus(catalog(3), 2).digest
    changed = Catalog(Path("c.csv"), [*catalog(2).clips, Clip("c2", ("another text",))])
    assert len({base.digest, CatalogCorpus(catalog(3), 1).digest, CatalogCorpus(changed, 2).digest}) == 3


def test_a_tar_is_a_part(tmp_path: Path) -> None:
    for number, names in enumerate((["0.txt", "1.txt"], ["0.txt"])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"rain"))
    corpus = RawCorpus(tmp_path)
    assert [[clip.id for clip in corpus.clips(part)] for part in range(len(corpus))] == [["0/0", "0/1"], ["1/0"]]
    assert available_modalities(corpus, ("audio", "text")) == ("text",)
    before = corpus.digest
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes() + b"\0" * 512)
    assert RawCorpus(tmp_path).digest != before


def test_available_modalities_keep_the_encoders_order() -> None:
    assert available_modalities(CatalogCorpus(catalog(2)), ("video", "text", "audio")) == ("text",)
