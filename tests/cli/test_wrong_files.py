"""Files of another kind than a command expects: one sentence that names the file, status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffgap_lightning.cli.main import main
from diffgap_lightning.data.table import EmbeddingTable

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("folder", "empty", "picture.npz", "cut.safetensors", "list.yaml", "absent")
DATA = "data: {class_path: diffgap_lightning.data.EmbeddingDataModule, init_args: {path: t.npz, val_fraction: 0.2}}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").write_bytes(b"")
    Path("picture.npz").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    Path("cut.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0" + b'{"a":{"dtype":')
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("ok.yaml").write_text(DATA)
    rows = torch.nn.functional.normalize(torch.randn(20, 4), dim=1)
    EmbeddingTable(dict.fromkeys(("text", "audio"), rows), dict.fromkeys(("text", "audio"), torch.arange(20))).write(
        "t.npz"
    )
    for name in ("clips/0.wav", "clips/1.wav"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"RIFF")


# Command -> words of which one is in the message, whatever the file's kind; {} is the file.
COMMANDS = {
    "compare --config ok.yaml --data.path {} --out out": ("embedding table", "empty", "not a readable", "suffix"),
    "compare --config {} --out out": ("YAML", "expected sections"),
    "compare --config ok.yaml --refiner {} --out out": ("config.json",),
    "fit --config ok.yaml --data.path {} --trainer.default_root_dir out --model.pairs [[text,audio]]":
        ("embedding table", "empty", "not a readable", "suffix", "not found"),
    "predict --config {}": ("YAML", "expected sections", "does not exist", "not accept", "Unexpected", "unrecognized"),
    "predict --config ok.yaml --ckpt_path {}": ("not a checkpoint", "sharded checkpoint", "not found"),
    "evaluate clips --extractor vggish={}": ("expected a file", "not a readable", "no such file"),
    "evaluate {} --encoder hashing": ("holds 0 clips", "no such folder"),
    "evaluate clips {} --encoder hashing": ("holds 0 clips", "no such folder"),
    "evaluate clips --encoder hashing --captions {}": ("captions", "JSON"),
    "encoders check --encoder cavp --encoder.checkpoint {}": ("expected a file", "not a readable", "no such file"),
    "embed --encoder hashing --catalog {} --out out": ("no such catalog", "format", "not UTF-8"),
    "embed --encoder hashing --shards {} --out out": ("no file matches", "damaged tar", "no such tar"),
    "generate {} --model folder --out out": ("no videos", "got a file of kind", "lacks model_index"),
    "generate rain --model folder --refiner {} --out out": ("config.json",),
    "shards verify {}": ("manifest.json: not found",),
    "shards info {}": ("manifest.json: not found",),
    "shards unpack {} u.npz": ("manifest.json: not found",),
    "shards index {}": ("no shard has a readable sample",),
    "shards pack {} out": ("a folder", "empty", "not a readable", "not found"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_file_is_one_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        arguments = command.format(kind).split()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2, kind
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"diffgap {arguments[0]}: error: "), (kind, line)
        assert any(word in line for word in COMMANDS[command]), (kind, line)
        assert kind in line or "lacks model_index" in line, (kind, line)  # a word without a file is a prompt
    assert {path.name for path in Path("out").glob("*")} <= {".lock", "config.yaml", "lightning_logs"}, (
        "a result was written"
    )


def test_what_is_no_pytorch_file_is_not_said_to_hold_code(capsys: pytest.CaptureFixture[str]) -> None:
    """A picture's owner is not to be told how to load it as code."""
    for kind in ("empty", "picture.npz", "list.yaml"):
        with pytest.raises(SystemExit):
            main(["evaluate", "clips", "--extractor", f"panns={kind}"])
        error = capsys.readouterr().err
        assert f"{kind}: not a readable PyTorch file (it is " in error
        assert "weights_only" not in error
