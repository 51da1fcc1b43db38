from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.cli.main import main
from diffgap_lightning.cli.shards import run
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.splits import split_by_fraction
from diffgap_lightning.data.table import EmbeddingTable


@pytest.fixture
def table() -> EmbeddingTable:
    random = torch.Generator().manual_seed(0)
    rows = {
        m: torch.nn.functional.normalize(torch.randn(n, 6, generator=random), dim=1)
        for m, n in (("audio", 60), ("text", 120))
    }
    ids = {"audio": torch.arange(60), "text": torch.arange(120) // 2}
    return EmbeddingTable(rows, ids, encoder="clap-x")


@pytest.fixture
def path(table: EmbeddingTable, tmp_path: Path) -> Path:
    return table.write(tmp_path / "table.npz")


def test_pack_verify_info_unpack(
    path: Path, tmp_path: Path, table: EmbeddingTable, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "out")
    assert run(["pack", str(path), out, "--rows-per-block", "16", "--rows-per-shard", "32", "--dtype", "float32"]) == 0
    assert "120 audio (6-d), 120 text (6-d) in 4 shards, kind pairs, float32" in capsys.readouterr().out
    assert run(["verify", out]) == 0
    assert f"{out}: all good" in capsys.readouterr().out
    assert run(["info", out, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["rows"], info["blocks"], info["encoder"]) == ({"audio": 120, "text": 120}, 8, "clap-x")
    assert run(["info", out]) == 0
    assert "rows     audio 120, text 120" in capsys.readouterr().out
    assert run(["unpack", out, str(tmp_path / "back.safetensors")]) == 0
    assert "60 audio rows, 120 text rows" in capsys.readouterr().out
    back = EmbeddingTable.read(tmp_path / "back.safetensors")
    order = {m: np.lexsort(back.embeddings[m].T.numpy()) for m in ("audio", "text")}
    expected = {m: np.lexsort(table.embeddings[m].T.numpy()) for m in ("audio", "text")}
    for m in ("audio", "text"):
        assert torch.equal(back.embeddings[m][order[m]], table.embeddings[m][expected[m]])
        assert torch.equal(back.ids[m][order[m]], table.ids[m][expected[m]])


def test_verify_prints_each_problem_and_exits_with_1(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    run(["pack", str(path), str(out), "--rows-per-block", "16", "--rows-per-shard", "32"])
    (out / "shard-000002.tar").unlink()
    (out / "shard-000001.tar").write_bytes(b"x")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["shards", "verify", str(out)])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert f"{out}: shard-000001.tar: truncated: 1 of" in printed
    assert f"{out}: shard-000002.tar: missing" in printed
    assert "2 problems" in printed


def test_fractions_split_a_table_as_the_datamodule_does(path: Path, tmp_path: Path, table: EmbeddingTable) -> None:
    run(["pack", str(path), str(tmp_path / "out"), "--val-fraction", "0.2", "--test-fraction", "0.1", "--seed", "3"])
    expected = split_by_fraction(table, 0.2, 0.1, 3)
    for name, kind in (("train", "pairs"), ("val", "rows"), ("test", "rows")):
        manifest = open_shards(tmp_path / "out" / name).manifest
        assert (manifest.kind, manifest.split) == (kind, name)
        got = read_embedding_shards(tmp_path / "out" / name)
        assert set(got.ids["text"].tolist()) == set(expected[name].ids["text"].tolist())
        assert got.num_rows == expected[name].num_rows


def test_streamed_input_splits_by_whole_ids_too(path: Path, tmp_path: Path) -> None:
    run(["pack", str(path), str(tmp_path / "all"), "--rows-per-block", "16"])
    run(["pack", str(tmp_path / "all"), str(tmp_path / "out"), "--val-fraction", "0.3", "--test-fraction", "0.2"])
    parts = [read_embedding_shards(tmp_path / "out" / name) for name in ("train", "val", "test")]
    ids = [set(part.ids["audio"].tolist()) for part in parts]
    assert sum(map(len, ids)) == 60
    assert set().union(*ids) == set(range(60))
    assert sum(part.num_rows["text"] for part in parts) == 120
    assert open_shards(tmp_path / "out" / "val").manifest.num_rows["audio"] == len(ids[1])
    assert all(part.encoder == "clap-x" for part in parts)


def test_folders_of_arrays_and_rows_can_be_packed(table: EmbeddingTable, tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    pairs = {"audio": table.embeddings["audio"][table.ids["text"]].numpy(), "text": table.embeddings["text"].numpy()}
    for m, rows in pairs.items():
        np.save(folder / f"{m}.npy", rows)
        np.save(folder / f"{m}_id.npy", np.array([f"id {i}" for i in table.ids["text"]]))
    run(["pack", str(folder), str(tmp_path / "rows"), "--kind", "rows", "--encoder", "e"])
    assert open_shards(tmp_path / "rows").manifest.num_rows == {"audio": 60, "text": 120}
    run(["pack", str(tmp_path / "rows"), str(tmp_path / "pairs")])
    back = read_embedding_shards(tmp_path / "pairs")
    assert back.num_rows == {"audio": 60, "text": 120}
    assert set(back.names["audio"].tolist()) == {f"id {i}" for i in range(60)}
    assert back.encoder == "e"
    run(["pack", str(folder), str(tmp_path / "pairs2"), "--dtype", "float32"])
    assert read_embedding_shards(tmp_path / "pairs2").num_rows == back.num_rows


def test_index_writes_a_manifest_beside_classic_tars(
    table: EmbeddingTable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            for m in ("audio", "text"):
                file = io.BytesIO()
                np.save(file, table.embeddings[m][i].numpy())
                info = tarfile.TarInfo(f"k{i}.{m}.npy")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
    assert run(["index", f"{tmp_path}/*.tar"]) == 0
    assert "5 audio (6-d), 5 text (6-d) in 1 shards, kind samples" in capsys.readouterr().out
    assert run(["verify", str(tmp_path)]) == 0
    run(["pack", str(tmp_path), str(tmp_path / "out")])
    assert set(read_embedding_shards(tmp_path / "out").names["text"].tolist()) == {f"k{i}" for i in range(5)}
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.tar shard: "):
        run(["index", f"{tmp_path}/*.tar"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pack", "nothing.npz", "out"], r"nothing.npz: not found"),
        (["pack", "pipe:ls.tar", "out"], "never opened"),
        (["pack", "table.npz", "out", "--val-fraction", "0.6", "--test-fraction", "0.4"], "sum below 1"),
        (["verify", "nothing"], r"manifest.json: not found"),
        (["unpack", "nothing", "x.txt"], "unknown suffix '.txt'"),
        (["pack"], "the following arguments are required"),
        (["mend"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises((ValueError, OSError), match=words):
        run(argv)
