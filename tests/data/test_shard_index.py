from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffgap_lightning.data import shard_index
from diffgap_lightning.data.manifest import write_manifest
from diffgap_lightning.data.shard_index import index_shards, open_shards
from diffgap_lightning.data.shard_reader import BlockReader
from diffgap_lightning.functional.pairs import hash_ids


def names(spec: object) -> list[str]:
    return [Path(url).name for url in open_shards(spec).urls]


def test_folder_manifest_file_glob_braces_and_lists_name_the_same_shards(shards: Callable) -> None:
    folder = shards(64, count=4)
    expected = [f"shard-{i:06d}.tar" for i in range(4)]
    for spec in (
        folder,
        f"{folder}/",
        f"{folder}/manifest.json",
        f"{folder}/*.tar",
        f"{folder}/shard-{{000000..000003}}.tar",
    ):
        assert names(spec) == expected, spec
    assert names([f"{folder}/shard-000002.tar", f"{folder}/shard-00000[01].tar"]) == [expected[i] for i in (2, 0, 1)]
    assert open_shards(f"{folder}/shard-000001.tar").manifest.num_rows == {"audio": 16, "text": 16}


def test_several_folders_are_one_set(shards: Callable) -> None:
    first, second = shards(32, count=2, name="a"), shards(16, name="b")
    together = open_shards([first, second])
    assert together.manifest.num_rows["audio"] == 48
    reader = BlockReader(together)
    assert [Path(reader.locate(i)[0]).parent.name for i in range(len(reader))] == ["a", "a", "b"]
    with pytest.raises(ValueError, match="twice"):
        open_shards([first, first / "shard-000000.tar"])


def test_a_deleted_shard_is_still_listed_whatever_the_glob_finds(shards: Callable) -> None:
    folder = shards(64, count=4)
    (folder / "shard-000001.tar").unlink()
    assert len(names(f"{folder}/*.tar")) == 4
    with pytest.raises(FileNotFoundError, match="lists no such shard"):
        open_shards(f"{folder}/other-*.tar")


def test_missing_folders_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing/manifest.json: not found"):
        open_shards(tmp_path / "nothing")
    marker = tmp_path / "executed"
    with pytest.raises(ValueError, match="never opened"):
        open_shards(f"pipe:touch {marker}.tar")
    assert not marker.exists()


@pytest.mark.parametrize("per_block", [4, 1024])
def test_classic_tars_are_counted_and_cut_at_samples(
    classic: Callable, monkeypatch: pytest.MonkeyPatch, per_block: int
) -> None:
    monkeypatch.setattr(shard_index, "SAMPLES_PER_BLOCK", per_block)
    paths = classic(23, count=2)
    found = open_shards(f"{paths[0].parent}/*.tar")
    assert (found.manifest.kind, found.manifest.dims, found.manifest.dtype) == (
        "samples",
        {"audio": 6, "text": 4},
        "float32",
    )
    assert found.manifest.num_rows == {"audio": 23, "text": 23}
    reader = BlockReader(found, extras=True)
    keys = [k for i in range(len(reader)) for k in reader.read(i).arrays["audio_id.str"]]
    assert keys == [f"s{i:04d}" for i in range(23)]
    np.testing.assert_array_equal(
        reader.read(0).arrays["audio_id"], hash_ids(keys[: len(reader.read(0).arrays["audio"])])
    )
    assert len(reader) == (6 if per_block == 4 else 2)


def test_an_index_can_be_kept_as_a_manifest(classic: Callable) -> None:
    paths = classic(9, count=3)
    index = index_shards([str(p) for p in paths])
    write_manifest(paths[0].parent, index.manifest)
    assert open_shards(paths[0].parent).manifest == index.manifest


def test_foreign_members_and_folders_in_keys(tmp_path: Path, tar: Callable) -> None:
    row = np.eye(4, dtype=np.float32)
    path = tar(
        tmp_path / "x.tar",
        {
            "__index__.json": b"{}",
            "README": b"hello",
            "sub.dir/a.audio.npy": row[0],
            "sub.dir/a.json": b"{}",
            "sub.dir/a.text.npy": row[1],
            "only.json": b"{}",
            "sub.dir/b.AUDIO.npy": row[2],
            "sub.dir/b.evil.pyd": b"x",
            "sub.dir/b.text.npy": row[3],
        },
    )
    found = open_shards(path)
    data = BlockReader(found, extras=True).read(0)
    assert data.arrays["audio_id.str"].tolist() == ["sub.dir/a", "sub.dir/b"]
    assert data.losses == ()
    np.testing.assert_array_equal(data.arrays["text"], row[[1, 3]])


def test_wanted_modalities_only(tmp_path: Path, tar: Callable) -> None:
    row = np.eye(4, dtype=np.float32)
    path = tar(tmp_path / "x.tar", {"a.audio.npy": row[0], "a.text.npy": row[1], "a.mel.npy": row[2]})
    assert open_shards(path).manifest.modalities == ("audio", "mel", "text")
    assert open_shards(path, ["text", "audio"]).manifest.modalities == ("text", "audio")
    with pytest.raises(ValueError, match=r"the first sample lacks video.npy, it has audio"):
        open_shards(path, ["audio", "video"])


def test_what_cannot_be_indexed_is_reported_with_an_estimate(classic: Callable) -> None:
    paths = classic(40, count=4)
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:3000])
    paths[3].write_bytes(b"\x1f\x8b garbage" * 500)
    found = open_shards(f"{paths[0].parent}/{{000..004}}.tar")
    reasons = {loss.shard: (loss.rows, loss.reason) for loss in found.losses}
    assert set(reasons) == {"001.tar", "002.tar", "003.tar", "004.tar"}
    assert "No such file" in reasons["004.tar"][1]
    assert found.manifest.num_rows["audio"] + sum(n for n, _ in reasons.values()) == pytest.approx(5 * 6, abs=8)
    with pytest.raises(ValueError, match="no shard has a readable sample"):
        open_shards([paths[1], paths[3]])
