from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffgap_lightning.cli import main as cli
from diffgap_lightning.evaluation.panns import PannsCnn14
from diffgap_lightning.evaluation.vggish import VGGish

pytest.importorskip("soundfile", reason="reads the clips")
pytest.importorskip("torchaudio", reason="resamples the clips")


@pytest.fixture
def files(tmp_path: Path, make_audio) -> Path:
    """Two folders of 20 clips, captions and tiny weights in the public layout."""
    for k, folder in enumerate(("generated", "reference")):
        for i in range(20):
            make_audio(tmp_path / folder / f"{i:02d}.wav", seconds=1.2, hz=200 + 40 * i + 15 * k)
    torch.manual_seed(0)
    torch.save(VGGish((2, 2, 4, 4, 4, 4), hidden=16, dim=5).state_dict(), tmp_path / "vggish.pth")
    network = PannsCnn14(16000, (2, 2, 4, 4, 4, 6), classes=11)
    torch.save({"iteration": 1, "model": network.state_dict()}, tmp_path / "cnn14.pth")
    rows = "".join(f"{i:02d}.wav,a tone of {200 + 40 * i} Hz\n" for i in range(20))
    (tmp_path / "captions.csv").write_text("file,caption\n" + rows)
    return tmp_path


def test_the_table_and_the_records(files: Path, capsys) -> None:
    folders = [str(files / "generated"), str(files / "reference")]
    networks = ["--extractor", f"vggish={files / 'vggish.pth'}", f"panns={files / 'cnn14.pth'}", "--encoder", "hashing"]
    rest = ["--encoder.seed", "3", "--captions", str(files / "captions.csv"), "--json", str(files / "out.json")]
    cli.main(["evaluate", *folders, *networks, *rest])
    shown = capsys.readouterr()
    records = json.loads((files / "out.json").read_text())
    assert [r["metric"] for r in records] == ["fad", "fd", "fd", "kad", "kad", "kad", "kl", "is", "clap"]
    assert {len(r["sha256"]) for r in records} == {64}
    lines = shown.out.splitlines()
    assert lines[0].split() == ["metric", "value", "generated", "reference", "extractor"]
    for line, record in zip(lines[2:], records, strict=False):
        assert line.startswith(record["metric"].upper())
        assert f"{record['value']:.4f}" in line
        assert line.endswith(record["extractor"])
    assert "vggish (vggish.pth)" in shown.out
    assert "left out" not in shown.out
    assert cli.main(["evaluate", *folders, *networks[:2]]) is None
    assert "KL left out: needs a classifier such as PANNs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no network to measure with; give local files (--extractor vggish=FILE, vggish-10086976.pth of"),
        (["--extractor", "vgish=x"], "--extractor: unknown 'vgish'; did you mean 'vggish'?"),
        (["--extractor", "panns"], "expected panns=FILE, a local copy of Cnn14_mAP=0.431.pth"),
        (["--extractor", "panns=none.pth"], "none.pth: no such file"),
        (["--encoder.seed", "3"], "--encoder.seed: give --encoder NAME with it"),
        (["--encoder", "hashing", "--metrics", "kl"], "kl: needs a classifier such as PANNs"),
        (["--encoder", "hashing", "--device", "tpu9"], "--device: got 'tpu9'"),
        (["--encoder", "hashing", "--captions", "none.csv"], "none.csv: no such file of captions"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(files: Path, capsys, arguments, message) -> None:
    out = files / "out.json"
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(files / "generated"), str(files / "reference"), *arguments, "--json", str(out)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_help_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from diffgap_lightning.cli.main import main\n"
        "try: main(['evaluate', '--help'])\nexcept SystemExit as s: assert not s.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "GENERATED [REFERENCE]" in done.stdout
