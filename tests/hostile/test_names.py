"""File names as attackers and ordinary people make them: nothing is run, nothing mangled, two names stay two files."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffgap_lightning.cli.arguments import one_line
from diffgap_lightning.cli.main import main
from diffgap_lightning.data.mux import read_wav
from diffgap_lightning.data.raw_shards import raw_shard_ids
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.generation.items import read_items
from diffgap_lightning.refiner import DiffGAPRefiner

pytest.importorskip("av", reason="needs the extra media")
pytest.importorskip("soundfile", reason="needs the extra media")
pytestmark = pytest.mark.filterwarnings("ignore")
Make = Callable[..., Path]

NAMES = (
    "a b", " a b", "a b ", "-", "-rf", "--help", "$(touch executed)", "`touch executed`", "; touch executed;", "~",
    "|touch executed", "& touch executed &", "$HOME", "*", "?", "[ab]", "a", "b", "{a,b}", "{1..3}", "{", "it's",
    'say "x"', "x\\y", "x\\\\y", "new\nline", "cr\rlf", "tab\t", "\x1b[31mred", "<script>alert(1)<!--", "&amp;", "&",
    "'><img src=x onerror=alert(1)>", "50%", "%s%n", "%2e%2e", "%03d", "a#b?c=d", "http:x", "concat:a|b", "file:a",
    "pipe:0", "雨", "風", "\u00e9", "e\u0301", "\u202egpj", "a.b", "CON", "x" * 200,
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canary: Path) -> None:
    """Names are relative, where they mean most to other programs; a shell would create the canary."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr("os.system", lambda command: canary.touch())


def run(*arguments: object) -> int:
    """The exit status of a command."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_embed(kind: str, make_audio: Make, make_video: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Media under hostile names give what they give under plain ones."""
    common = ["--encoder", "hashing", "--encoder.dim", "8", "--no-progress", "--num-workers", "0", "--dtype", "float32"]
    common += ["--kind", "rows", "--window", "0"]
    video = make_video(Path.cwd().parent / "v.mp4", seconds=0.2, fps=5)
    found = {}
    for folder, names in {"plain": [f"name{n}" for n in range(len(NAMES))], "hostile": list(NAMES)}.items():
        Path(folder).mkdir()
        os.chdir(folder)
        for number, name in enumerate(names):
            make_audio(Path(f"{name}.wav"), seconds=0.05, sample_rate=8000, hz=100 + 50 * number)
            shutil.copy(video, f"{name}.mp4")
        assert len(os.listdir()) == 2 * len(NAMES)
        rows = [{"id": f"id {n}", "audio": f"{name}.wav", "video": f"{name}.mp4"} for n, name in enumerate(names)]
        with open(f"c.{kind}", "w", newline="", encoding="utf-8") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        assert run("embed", *common, "--catalog", f"c.{kind}", "--out", "../../out $(x)") == 0
        assert f"embedded {len(NAMES)} of {len(NAMES)} clips" in capsys.readouterr().out
        found[folder] = read_embedding_shards("../../out $(x)")
        shutil.rmtree("../../out $(x)")
        os.chdir("..")
    for modality in ("audio", "video"):
        assert list(found["hostile"].names[modality]) == list(found["plain"].names[modality])
        torch.testing.assert_close(
            found["hostile"].embeddings[modality], found["plain"].embeddings[modality], rtol=0, atol=0
        )


def test_evaluate(make_audio: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Every clip finds its reference and its own captions by name; a broken one is told in one line."""
    for number, name in enumerate(NAMES):
        for folder in ("made", "real"):
            make_audio(Path(folder) / f"{name}.wav", seconds=0.05, sample_rate=8000, hz=100 + 50 * number)
    with open("captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "caption"), *((f"{name}.wav", f"caption {name}") for name in NAMES)])
    Path("captions.jsonl").write_text(
        "".join(json.dumps({"file": f"{name}.wav", "caption": f"caption {name}"}) + "\n" for name in NAMES)
    )
    for captions in ("captions.csv", "captions.jsonl"):
        command = ["evaluate", "made", "real", "--encoder", "hashing", "--captions", captions, "--error-budget", "0"]
        assert run(*command, "--json", "-out $(x).json") == 0
        records = json.loads(Path("-out $(x).json").read_text())
        (clap,) = (record for record in records if record["metric"] == "clap")
        assert clap["n_generated"] == len(NAMES)
        assert "no caption" not in capsys.readouterr().out
    Path("made/\x1b[31mred.wav").write_bytes(b"\0" * 64)
    assert run("evaluate", "made", "--encoder", "hashing", "--captions", "captions.csv") == 0
    assert "\\x1b[31mred.wav (cannot open audio" in capsys.readouterr().out


def test_shards(capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of shards are packed, verified and read, each its own."""
    for number, name in enumerate(NAMES):
        rows = torch.tensor([[math.cos(number), math.sin(number)]]).expand(4, 2)
        table = EmbeddingTable({"audio": rows, "text": rows}, dict.fromkeys(("audio", "text"), torch.arange(4)))
        table.write(f"{name}.npz")
        folder = Path("shards") / name
        assert run("shards", "pack", f"./{name}.npz", folder) == 0
        assert run("shards", "verify", folder) == 0
        assert run("shards", "info", folder) == 0
        (tar,) = folder.glob("*.tar")
        for spec in (folder, tar, f"{folder}/manifest.json"):
            assert torch.allclose(read_embedding_shards(spec).embeddings["audio"].float(), rows, atol=1e-3)
        assert list(raw_shard_ids(folder)) == [str(tar)]
    assert capsys.readouterr().out.count("all good") == len(NAMES)
    assert len(os.listdir("shards")) == len(NAMES)
    shutil.copytree("shards/a", "shards/x.tar")
    assert run("shards", "verify", "shards/x.tar") == 0
    os.rename(next(Path("shards/[ab]").glob("*.tar")), "shards/[ab]/\x1b[31m[a].tar")
    assert run("shards", "verify", "shards/[ab]") == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.fixture
def generate(tmp_path: Path, generator_folder: Path, sound_refiner: DiffGAPRefiner) -> Callable[..., int]:
    sound_refiner.save_pretrained(tmp_path / "refiner")
    fixed = ["--model", generator_folder, "--refiner", tmp_path / "refiner", "--encoder", "hashing", "--encoder.dim"]
    fixed += ["24", "--steps", "1", "--device", "cpu", "--no-progress", "--crossfade", "0"]
    return lambda *arguments: run("generate", *arguments, *fixed)


@pytest.mark.slow
def test_generate(generate: Callable[..., int], make_video: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal videos under many names are as many items, whose page shows the names and nothing else."""
    names = ("<script>alert(1)<!--", "'><img src=x onerror=alert(1)>", "http:x", "$(touch executed)", "雨", "風")
    video = make_video(Path("../v.mp4"), seconds=0.1, fps=10)
    for name in (*names, os.fsdecode(b"not text \xff")):
        shutil.copy(video, f"{name}.mp4")
    Path("-prompts.txt").write_text("\n".join(names), encoding="utf-8")
    assert generate(".", "./-prompts.txt", "--out", "http:out", "--batch-size", "64") == 0
    assert "left out" not in capsys.readouterr().err
    records = [json.loads(path.read_text()) for path in Path("http:out/records").iterdir()]
    shown = sorted(record["text"] for record in records if record["kind"] == "video")
    assert shown == sorted([*(f"{name}.mp4" for name in names), "not text \\xff.mp4"])
    assert len({record["key"] for record in records}) == len(records)
    for record in records:
        assert record["key"].replace("-", "").isalnum()
        assert all(len(read_wav(f"http:out/{version['audio']}")[0]) > 0 for version in record["versions"])
    page = Path("http:out/index.html").read_text(encoding="utf-8")
    for text in (*shown, *names):
        assert html.escape(text) in page
    for bad in ("<script>alert", "<img src=x", "\udcff"):
        assert bad not in page


def test_every_video_of_a_folder_is_an_item(make_video: Make) -> None:
    video = make_video(Path("../v.mp4"), seconds=0.1, fps=10)
    for name in NAMES:
        shutil.copy(video, f"{name}.mp4")
    items = read_items(["."])
    assert sorted(item.text for item in items) == sorted(f"{name}.mp4" for name in NAMES)
    assert len({item.key for item in items}) == len(NAMES)
    assert all(item.key.replace("-", "").isalnum() and item.key.isascii() for item in items)


def test_equal_videos_with_other_names_keep_their_keys(make_video: Make) -> None:
    """Whatever else is on the list, and in whatever order; the same name in two folders is one item."""
    video = make_video(Path("a b.mp4"), seconds=0.1, fps=10)
    alone = read_items(["a b.mp4"])
    for name in ("a&b.mp4", "a-b.mp4"):
        shutil.copy(video, name)
    keys = {item.text: item.key for item in read_items(["a b.mp4", "a&b.mp4"])}
    assert len(set(keys.values())) == 2
    assert {item.text: item.key for item in read_items(["a&b.mp4", "a-b.mp4", "a b.mp4"])}.items() >= keys.items()
    Path("other").mkdir()
    shutil.copy(video, "other/a b.mp4")
    assert [item.key for item in read_items(["a b.mp4", "other"])] == [item.key for item in alone]


def test_a_message_is_one_line_that_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line("a\n b\t\x1b[31m \u202e c \udcff 雨 é") == "a b \\x1b[31m \\u202e c \\udcff 雨 é"
    for name in ("\x1b]0;title\x07 a\nb.csv", "\udcff.csv"):
        assert run("embed", "--encoder", "hashing", "--catalog", name, "--out", "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "\x1b" not in error
        assert "no such catalog" in error


def test_a_catalog_with_names_that_no_file_can_have(make_audio: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """They are missing files: counted, and the others are embedded."""
    make_audio(Path("good.wav"), seconds=0.05)
    bytes_name = os.fsdecode(b"not text \xff")
    Path(f"{bytes_name}.wav").write_bytes(b"\0" * 99)
    os.rename("good.wav", f"good {bytes_name}.wav")
    rows = [{"id": "1", "audio": f"good {bytes_name}.wav"}, {"id": "2", "audio": f"{bytes_name}.wav"}]
    rows += [{"id": f"x{n}", "audio": name} for n, name in enumerate(["\0.wav", "x" * 5000 + ".wav"])]
    Path("c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("embed", "--encoder", "hashing", "--catalog", "c.jsonl", "--out", "out", "--no-progress",
               "--num-workers", "0") == 0  # fmt: skip
    assert "embedded 1 of 4 clips" in capsys.readouterr().out
    assert open_shards("out").manifest.num_rows == {"audio": 1}
    skipped = [json.loads(line) for line in Path("out/skipped.jsonl").read_text().splitlines()]
    assert skipped[0]["path"] == f"{bytes_name}.wav"
    Path("c.jsonl").write_text(json.dumps({"id": "\ud800", "audio": "x.wav"}))
    assert run("embed", "--encoder", "hashing", "--catalog", "c.jsonl", "--out", "other") == 2
    assert "line 1, field id: got '\\ud800', expected text" in capsys.readouterr().err
