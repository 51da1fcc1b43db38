from __future__ import annotations

import itertools
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_reader import BlockReader
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.data.shard_writer import ShardWriter
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.functional.pairs import hash_ids


def named_table(table: EmbeddingTable) -> EmbeddingTable:
    """The same rows with string ids and columns."""
    names = {m: np.array([f"clip {i}" for i in ids.tolist()]) for m, ids in table.ids.items()}
    ids = {m: hash_ids(n.tolist()) for m, n in names.items()}
    count = len(table.ids["text"])
    columns = {
        "text_caption": np.array([f"a caption, {i}\n" for i in range(count)]),
        "audio_fold": np.arange(len(table.ids["audio"])) % 5,
        "text_weight": np.linspace(0, 1, 2 * count).reshape(count, 2),
    }
    return EmbeddingTable(table.embeddings, ids, names, columns, "clap-x")


def all_pairs(source: Path) -> list[tuple]:
    reader = BlockReader(open_shards(source))
    found = []
    for i in range(len(reader)):
        a = reader.read(i).arrays
        assert np.array_equal(a["audio_id"], a["text_id"])
        found += [
            (int(k), x.tobytes(), y.tobytes()) for k, x, y in zip(a["audio_id"], a["audio"], a["text"], strict=True)
        ]
    return found


def test_pairs_are_all_combinations_of_equal_ids_each_once(table: Callable, tmp_path: Path) -> None:
    source = table(20, captions=3)
    manifest = write_embedding_shards(source, tmp_path / "out", rows_per_block=8, rows_per_shard=16, dtype="float32")
    expected = Counter(
        (int(i), source.embeddings["audio"][a].numpy().tobytes(), source.embeddings["text"][t].numpy().tobytes())
        for (a, i), (t, j) in itertools.product(enumerate(source.ids["audio"]), enumerate(source.ids["text"]))
        if i == j
    )
    assert Counter(all_pairs(tmp_path / "out")) == expected
    assert manifest.num_rows == {"audio": 60, "text": 60}
    assert [s.name for s in manifest.shards] == [f"shard-{i:06d}.tar" for i in range(4)]
    assert verify_shards(tmp_path / "out") == []


def test_the_seed_decides_the_order_and_the_bytes(table: Callable, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_embedding_shards(table(200), tmp_path / name, rows_per_block=64, seed=seed)
    first, again, other = (open_shards(tmp_path / name).manifest for name in "abc")
    assert first == again
    ids = [[i for i, _, _ in all_pairs(tmp_path / name)] for name in "ac"]
    assert sorted(ids[0]) == sorted(ids[1]) == list(range(200))
    assert ids[0] != ids[1]
    assert ids[0] != sorted(ids[0])
    assert first.shards[0].sha256 != other.shards[0].sha256


def test_chunks_give_the_same_rows_as_a_table_within_any_memory(table: Callable, tmp_path: Path) -> None:
    source = named_table(table(100))
    chunks = [
        {m: source.embeddings[m][i : i + 7].numpy() for m in ("audio", "text")}
        | {f"{m}_id": source.names[m][i : i + 7] for m in ("audio", "text")}
        | {name: column[i : i + 7] for name, column in source.columns.items()}
        for i in range(0, 100, 7)
    ]
    write_embedding_shards(source, tmp_path / "table", dtype="float32", rows_per_block=16)
    for memory in (1 << 20, 2000):
        write_embedding_shards(
            iter(chunks),
            tmp_path / f"chunks{memory}",
            dtype="float32",
            rows_per_block=16,
            memory=memory,
            encoder="clap-x",
        )
        assert Counter(all_pairs(tmp_path / "table")) == Counter(all_pairs(tmp_path / f"chunks{memory}"))
        first, second = (read_embedding_shards(tmp_path / n) for n in ("table", f"chunks{memory}"))
        for one, two in ((first, second), (second, first)):
            lookup = {n: (c, w.tolist()) for n, c, w in zip(one.names["text"], *columns(one), strict=True)}
            assert lookup == {n: (c, w.tolist()) for n, c, w in zip(two.names["text"], *columns(two), strict=True)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chunks1048576", "chunks2000", "table"]


def columns(table: EmbeddingTable) -> tuple[np.ndarray, np.ndarray]:
    return table.columns["text_caption"], table.columns["text_weight"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_keep_each_row_once_in_order_and_come_back_as_the_table(
    table: Callable, tmp_path: Path, dtype: str
) -> None:
    source = named_table(table(30, captions=5))
    manifest = write_embedding_shards(
        source, tmp_path / "val", kind="rows", rows_per_block=16, rows_per_shard=64, dtype=dtype
    )
    assert manifest.num_rows == {"audio": 30, "text": 150}
    assert all(sum(n > 0 for n in b.rows) == 1 for s in manifest.shards for b in s.blocks)
    back = read_embedding_shards(tmp_path / "val")
    for m in ("audio", "text"):
        tolerance = 0 if dtype == "float32" else 1e-3
        torch.testing.assert_close(back.embeddings[m], source.embeddings[m], atol=tolerance, rtol=0)
        assert torch.equal(back.ids[m], source.ids[m])
        assert back.names[m].tolist() == source.names[m].tolist()
    assert back.encoder == "clap-x"
    for name, column in source.columns.items():
        np.testing.assert_array_equal(back.columns[name], column)
    back.check("back")


def test_rows_may_come_in_chunks_of_any_modality(table: Callable, tmp_path: Path) -> None:
    source = table(30, captions=2)

    def rows(modality: str, start: int, stop: int) -> dict:
        return {modality: source.embeddings[modality][start:stop], f"{modality}_id": source.ids[modality][start:stop]}

    chunks = [rows("audio", 0, 30) | rows("text", 0, 3), rows("text", 3, 50), rows("text", 50, 60)]
    manifest = write_embedding_shards(chunks, tmp_path / "out", kind="rows", rows_per_block=8, dtype="float32")
    assert sorted(max(b.rows) for b in manifest.shards[0].blocks) == [4, 6] + [8] * 10
    back = read_embedding_shards(tmp_path / "out")
    assert all(torch.equal(back.embeddings[m], source.embeddings[m]) for m in ("audio", "text"))


def test_pairs_come_back_as_distinct_rows(table: Callable, tmp_path: Path) -> None:
    source = named_table(table(20, captions=5))
    write_embedding_shards(source, tmp_path / "out", dtype="float32")
    back = read_embedding_shards(tmp_path / "out")
    assert back.num_rows == {"audio": 20, "text": 100}
    for m in ("audio", "text"):
        one, two = (sorted(zip(t.names[m].tolist(), t.embeddings[m].tolist(), strict=True)) for t in (source, back))
        assert one == two
    lookup = dict(zip(source.names["audio"], source.columns["audio_fold"], strict=True))
    assert [lookup[n] for n in back.names["audio"]] == back.columns["audio_fold"].tolist()


@pytest.mark.parametrize("kind", ["pairs", "rows"])
def test_a_bounded_sample_is_seeded_and_keeps_pairs_together(shards: Callable, kind: str) -> None:
    folder = shards(400, kind=kind, captions=3)
    first, again, other = (read_embedding_shards(folder, max_rows=120, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.ids["text"], again.ids["text"])
    assert not torch.equal(first.ids["text"], other.ids["text"])
    assert 60 < first.num_rows["text"] <= 120
    assert set(first.ids["text"].tolist()) == set(first.ids["audio"].tolist())
    if kind == "rows":
        assert set(Counter(first.ids["text"].tolist()).values()) == {3}


def test_reading_a_subset_of_modalities_or_ids(shards: Callable) -> None:
    folder = shards(40, captions=2)
    assert read_embedding_shards(folder, modalities=["text"]).modalities == ("text",)
    kept = read_embedding_shards(folder, keep=lambda ids: ids < 10)
    assert sorted(kept.ids["audio"].tolist()) == list(range(10))
    with pytest.raises(ValueError, match="modality 'video': the shards hold audio, text"):
        read_embedding_shards(folder, modalities=["video"])


def test_other_readers_open_a_block_shard(shards: Callable) -> None:
    """The names follow WebDataset's convention, and numpy reads what is in them."""
    wds = pytest.importorskip("webdataset")
    folder = shards(20, block=8)
    samples = list(wds.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False).decode("rgb"))
    assert [s["__key__"] for s in samples] == ["000000", "000001", "000002"]
    assert samples[0]["audio.npy"].shape == (8, 6)
    assert samples[2]["audio_id.npy"].shape == (4,)


def good(n: int = 4) -> dict[str, np.ndarray]:
    eye = np.eye(8, dtype=np.float32)[:n]
    return {"audio": eye, "audio_id": np.arange(n), "text": eye, "text_id": np.arange(n)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": np.full((4, 8), np.nan, np.float32)}, "chunk 1: text: 4 of 4 rows .* NaN"),
        ({"text": 2 * np.eye(8, dtype=np.float32)[:4]}, "chunk 1: text: .* L2 norm different from 1"),
        ({"text": np.eye(7, dtype=np.float32)[:4]}, "chunk 1: text: got dimension 7, expected 8"),
        ({"text_id": np.array([0, 1, 3, 2])}, "chunk 1: ids of audio, text differ"),
        ({"text_id": np.array(list("abcd"))}, "chunk 1: text_id: got <U1, expected ids of the first chunk's kind"),
        ({"text_id": np.arange(3)}, "chunk 1: text_id: got 3 values for 4 rows"),
        ({"text_fold": np.arange(4)}, "chunk 1: got .* as in the first"),
        ({"text_id": np.array([{}, 1, 2, 3], dtype=object)}, "expected ids of the first chunk's kind"),
    ],
)
def test_bad_chunks_are_named_and_nothing_is_left_behind(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_embedding_shards([good(), good() | change], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_empty_input_and_wrong_options(tmp_path: Path, table: Callable) -> None:
    with pytest.raises(ValueError, match="nothing to write"):
        write_embedding_shards([], tmp_path / "out")
    unpaired = EmbeddingTable(
        {"audio": torch.eye(3), "text": torch.eye(3)}, {"audio": torch.arange(3), "text": torch.arange(3, 6)}
    )
    with pytest.raises(ValueError, match="holds no pairs"):
        write_embedding_shards(unpaired, tmp_path / "out")
    for options in (
        {"kind": "x"},
        {"dtype": "int8"},
        {"rows_per_block": 0},
        {"rows_per_block": 9, "rows_per_shard": 8},
    ):
        with pytest.raises(ValueError, match=r"expected"):
            write_embedding_shards(table(3), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_kept_unless_overwriting_succeeds(tmp_path: Path, table: Callable) -> None:
    folder = tmp_path / "out"
    old = write_embedding_shards(table(10), folder)
    with pytest.raises(ValueError, match="holds shards already"):
        write_embedding_shards(table(20), folder)
    with pytest.raises(ValueError, match="NaN"):
        write_embedding_shards([good(), good() | {"text": np.full((4, 8), np.nan, np.float32)}], folder, overwrite=True)
    assert open_shards(folder).manifest == old
    assert write_embedding_shards(table(20), folder, overwrite=True).num_rows["audio"] == 20
    assert verify_shards(folder) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds no manifest.json"):
        write_embedding_shards(table(3), tmp_path / "mine", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_an_interrupted_writer_leaves_finished_shards_and_no_manifest(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, {"audio": 8, "text": 8}, rows_per_shard=4) as writer:
            writer.write(good())
            writer.write(good(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert tarfile.is_tarfile(tmp_path / "shard-000000.tar")
    with pytest.raises(FileNotFoundError, match="without their manifest shards are incomplete"):
        open_shards(tmp_path)
    with pytest.raises(ValueError, match=r"holds blocks, but no manifest.json"):
        open_shards(f"{tmp_path}/*.tar")


def test_half_precision_rows_stay_unit_rows(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(torch.randn(500, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    ids = torch.arange(500)
    write_embedding_shards(EmbeddingTable({"audio": rows, "text": rows}, {"audio": ids, "text": ids}), tmp_path / "out")
    stored = BlockReader(open_shards(tmp_path / "out")).read(0).arrays["audio"]
    assert stored.dtype == np.float16
    norms = np.linalg.norm(stored.astype(np.float32), axis=1)
    assert np.abs(norms - 1).max() < 2e-4
