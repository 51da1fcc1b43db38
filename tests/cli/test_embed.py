from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffgap_lightning.cli.embed import build_encoder, run, split_encoder_arguments
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_table import read_embedding_shards
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.embedding.merge import EmbedSummary
from diffgap_lightning.encoders.hashing import HashingEncoder

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't infer", "ignore:.*treespec")
Make = Callable[..., Path]
LIMIT = 120  # s; a process that hangs is killed

# Writes down every text that it embeds, and dies as by `kill -9` at the batch that the environment names.
ENCODER = """
import os, signal
from diffgap_lightning.encoders.hashing import HashingEncoder

class LoggingEncoder(HashingEncoder):
    batches = 0

    def __init__(self, log: str, die_at: int = -1):
        super().__init__(dim=8)
        self.log, self.die_at = log, die_at

    def embed_text(self, texts):
        if self.batches == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches += 1
        with open(f"{self.log}.{os.environ.get('RANK', '0')}", "a") as file:
            file.writelines(f"{text}\\n" for text in texts)
        return super().embed_text(texts)
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A catalog of 40 texts, and a module with an encoder that logs."""
    (tmp_path / "logging_encoder.py").write_text(ENCODER)
    path = tmp_path / "texts.csv"
    path.write_text("id,text\n" + "".join(f"c{i},text number {i}\n" for i in range(40)))
    return path


def start(folder: Path, launcher: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [
        *launcher,
        "-m",
        "diffgap_lightning.cli.main",
        "embed",
        "--no-progress",
        "--accelerator",
        "cpu",
        *arguments,
    ]
    return subprocess.run(
        command, env=environment, cwd=folder, timeout=LIMIT, capture_output=True, text=True, check=False
    )


def logged(folder: Path, name: str) -> list[str]:
    return [line for path in sorted(folder.glob(f"{name}.*")) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(texts: Path) -> None:
    folder = texts.parent
    common = [
        "--encoder",
        "logging_encoder.LoggingEncoder",
        "--catalog",
        "texts.csv",
        "--part-size",
        "4",
        "--batch-size",
        "2",
    ]
    died = start(folder, [sys.executable], *common, "--out", "out", "--encoder.log=first", "--encoder.die_at=9")
    assert died.returncode == -signal.SIGKILL
    assert not (folder / "out").exists()
    assert len(list((folder / "out.parts").glob("part-*.json"))) == 4  # 9 batches of 2 clips, 4 whole parts of 4
    again = start(folder, [sys.executable], *common, "--out", "out", "--encoder.log=second")
    assert again.returncode == 0, again.stderr
    assert "going on: 4 of 10 parts are finished" in again.stderr
    first, second = logged(folder, "first"), logged(folder, "second")
    assert sorted(first[:16] + second) == sorted(f"text number {i}" for i in range(40))  # finished parts never again

    assert build_and_run(folder, "whole") == 0
    assert (folder / "out" / "manifest.json").read_text() == (folder / "whole" / "manifest.json").read_text()
    assert EmbedSummary.read(folder / "out").embedded == 40


def build_and_run(folder: Path, out: str) -> int:
    """The same corpus, uninterrupted, in this process and with another batch size."""
    sys.path.insert(0, str(folder))
    try:
        return run(
            ["--encoder", "logging_encoder.LoggingEncoder", f"--encoder.log={folder / 'whole_log'}", "--no-progress",
             "--catalog", str(folder / "texts.csv"), "--out", str(folder / out), "--accelerator", "cpu",
             "--part-size", "4", "--num-workers", "0"]
        )  # fmt: skip
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("logging_encoder", None)


@pytest.mark.slow
def test_two_ranks_share_the_work_exactly_once(texts: Path) -> None:
    folder = texts.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(
        folder, launcher, "--encoder", "logging_encoder.LoggingEncoder", "--encoder.log=log", "--catalog", "texts.csv",
        "--out", "out", "--part-size", "8", "--batch-size", "3", "--num-workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("embedded 40 of 40 clips") == 1
    ranks = [set((folder / f"log.{rank}").read_text().splitlines()) for rank in (0, 1)]
    assert [len(r) for r in ranks] == [24, 16]  # five parts of eight clips: three and two
    assert not ranks[0] & ranks[1]
    assert len(logged(folder, "log")) == 40
    assert verify_shards(folder / "out") == []
    table = read_embedding_shards(folder / "out")
    assert sorted(table.names["text"]) == sorted(f"c{i}" for i in range(40))
    assert not (folder / "out.parts").exists()


def test_encoder_arguments_are_taken_out() -> None:
    argv = [
        "--encoder",
        "x",
        "--encoder.dim",
        "8",
        "--catalog",
        "c",
        "--encoder.seed=3",
        "--out",
        "o",
        "--modality",
        "a",
        "b",
    ]
    own, encoder = split_encoder_arguments(argv)
    assert own == ["--encoder", "x", "--catalog", "c", "--out", "o", "--modality", "a", "b"]
    assert encoder == ["--encoder.dim", "8", "--encoder.seed=3"]


def test_encoders_are_built_from_names_and_typed_arguments() -> None:
    encoder = build_encoder("hashing", ["--encoder.dim", "8", "--encoder.window=null"])
    assert isinstance(encoder, HashingEncoder)
    assert (encoder.dim, encoder.window) == (8, None)
    with pytest.raises(ValueError, match="encoder.dim: expected int, got many"):
        build_encoder("hashing", ["--encoder.dim", "many"])
    with pytest.raises(ValueError, match="--encoder.dims"):
        build_encoder("hashing", ["--encoder.dims", "8"])


def test_encoder_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--encoder", "hashing", "--encoder.help"]) == 0
    assert "--encoder.sample_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --catalog FILE or --shards"),
        (["--catalog", "none.csv"], "none.csv: no such catalog"),
        (["--catalog", "none.csv", "--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["--shards", "x.tar", "--media", "."], "--media does not go with --shards"),
        (["--shards", "pipe:cat x"], "never opened"),
        (["--catalog", "none.csv", "--widnow", "3"], "did you mean --window"),
    ],
)
def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(["--encoder", "hashing", "--out", "out", *arguments])


def test_a_decoding_process_that_dies_is_one_line(
    tmp_path: Path, make_audio: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_audio(tmp_path / "a.wav")
    (tmp_path / "c.csv").write_text("id,audio\n1,a.wav\n")
    monkeypatch.setattr(HashingEncoder, "transform", lambda self, modality: die)
    with pytest.raises(ValueError, match="a decoding process died"):
        run(["--encoder", "hashing", "--catalog", str(tmp_path / "c.csv"), "--out", str(tmp_path / "out"),
             "--num-workers", "1", "--no-progress", "--accelerator", "cpu"])  # fmt: skip


def die(waveform: object) -> object:
    """What a file does that takes the decoder's process down."""
    os.kill(os.getpid(), signal.SIGKILL)
    return waveform


def test_splits_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("abcdefghijk,1,rain,train\nbbcdefghijk,2,sun,test\n")
    common = ["--encoder", "hashing", "--catalog", str(tmp_path / "v.csv"), "--no-progress", "--num-workers", "0"]
    with pytest.raises(ValueError, match=r"holds splits train \(1\), test \(1\); choose one with --split"):
        run([*common, "--out", str(tmp_path / "out")])
    assert run([*common, "--out", str(tmp_path / "test"), "--split", "test"]) == 0
    manifest = open_shards(tmp_path / "test").manifest
    assert (manifest.split, manifest.kind, manifest.num_rows) == ("test", "rows", {"text": 1})


def test_missing_media_are_counted_and_named(
    tmp_path: Path, make_audio: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_audio(tmp_path / "media" / "abcdefghijk_1.wav")
    rows = "".join(f"{i},{y}bcdefghijk,1,Rain {i}\n" for i, y in enumerate("aaxyz"))
    (tmp_path / "val.csv").write_text("audiocap_id,youtube_id,start_time,caption\n" + rows)
    arguments = ["--encoder", "hashing", "--catalog", str(tmp_path / "val.csv"), "--media", str(tmp_path / "media")]
    assert run([*arguments, "--out", str(tmp_path / "out"), "--no-progress", "--num-workers", "0"]) == 0
    captured = capsys.readouterr()
    assert "audio: missing for 3 of 4 clips (e.g. xbcdefghijk_1, ybcdefghijk_1, zbcdefghijk_1)" in captured.err
    assert "embedded 1 of 4 clips (rows: 1 audio, 2 text), 2 pairs\n  skipped 3: audio: no file found" in captured.out


def test_real_clips_and_captions_give_verified_shards(tmp_path: Path, shared_data: Path) -> None:
    clips = sorted((shared_data / "vggsound_sample").glob("*.mp4"))
    names = [path.stem.rsplit("_", 2) for path in clips]
    (tmp_path / "v.csv").write_text("".join(f"{y},{int(s) // 1000},thing {y},train\n" for y, s, _ in names))
    common = ["--encoder", "hashing", "--encoder.dim", "32", "--no-progress", "--num-workers", "0"]
    media = ["--media", str(shared_data / "vggsound_sample")]
    assert run([*common, "--catalog", str(tmp_path / "v.csv"), *media, "--out", str(tmp_path / "clips")]) == 0
    assert verify_shards(tmp_path / "clips") == []
    manifest = open_shards(tmp_path / "clips").manifest
    assert (manifest.kind, manifest.num_rows) == ("pairs", {"audio": 4, "text": 4, "video": 4})

    captions = shared_data / "csv" / "audiocaps_val_first200.csv"
    assert run([*common, "--catalog", str(captions), *media, "--out", str(tmp_path / "captions")]) == 0
    assert verify_shards(tmp_path / "captions") == []
    assert open_shards(tmp_path / "captions").manifest.num_rows == {"text": 200}


@pytest.mark.slow
def test_shards_from_embed_train_a_refiner_and_its_predictions_come_back(
    tmp_path: Path, make_audio: Make, shared_data: Path
) -> None:
    """Captions of the official sample, with a tone for each clip's sound: embed, fit, predict."""
    trainer = pytest.importorskip("diffgap_lightning.cli.trainer")
    captions = shared_data / "csv" / "audiocaps_val_first200.csv"
    lines = captions.read_text().splitlines()[:61]
    (tmp_path / "audiocaps.csv").write_text("\n".join(lines) + "\n")
    clips = {tuple(line.split(",")[1:3]) for line in lines[1:]}
    for number, (name, begin) in enumerate(sorted(clips)):
        make_audio(tmp_path / "media" / f"{name}_{begin}.wav", seconds=0.3, sample_rate=16000, hz=150 + 40 * number)
    common = ["--encoder", "hashing", "--encoder.dim", "16", "--no-progress", "--num-workers", "0"]
    common += ["--catalog", str(tmp_path / "audiocaps.csv"), "--media", str(tmp_path / "media")]
    for kind in ("pairs", "rows"):
        assert run([*common, "--kind", kind, "--out", str(tmp_path / kind)]) == 0
        assert verify_shards(tmp_path / kind) == []
    assert open_shards(tmp_path / "pairs").manifest.num_rows == {"audio": 60, "text": 60}
    assert open_shards(tmp_path / "rows").manifest.num_rows == {"audio": len(clips), "text": 60}

    data = ["--data", "diffgap_lightning.data.WebDatasetDataModule", "--data.train", str(tmp_path / "pairs")]
    data += ["--data.val", str(tmp_path / "rows"), "--data.predict", str(tmp_path / "rows"), "--data.batch_size", "20"]
    model = ["--model.pairs", "[[text, audio]]", "--model.width", "32", "--model.depth", "1", "--model.rank", "8"]
    where = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    assert trainer.fit([*data, *model, *where, *quiet, "--trainer.max_epochs", "1"]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    writer = ["--trainer.callbacks", "diffgap_lightning.embedding.RefinedEmbeddingWriter"]
    writer += ["--trainer.callbacks.path", str(tmp_path / "refined.npz"), "--ckpt_path", str(checkpoint)]
    assert trainer.predict([*data, *model, *where, *quiet, *writer]) == 0
    refined = EmbeddingTable.read(tmp_path / "refined.npz", require_pairs=False)
    rows = read_embedding_shards(tmp_path / "rows")
    assert refined.num_rows == {"text_to_audio": 60, "audio_to_text": len(clips)}
    assert sorted(refined.ids["text_to_audio"].tolist()) == sorted(rows.ids["text"].tolist())
    assert refined.encoder == rows.encoder
