"""Every example runs as a user would run it, at a tiny size; one of them in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffgap_lightning.refiner import DiffGAPRefiner

pytestmark = pytest.mark.slow
Example = Callable[..., str]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_by_a_test() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*examples.py"))
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


def test_train_and_then_load(run_example: Example, tmp_path: Path) -> None:
    out = run_example("train_from_python.py", "--pairs", 600, "--epochs", 1, "--out", tmp_path / "run")
    assert "text_to_audio/r1" in out
    out = run("load_and_refine.py", str(tmp_path / "run" / "refiner"), "--rows", "50", folder=tmp_path)
    before, after = (float(line.split("audio")[-1].split()[0]) for line in out.splitlines()[:2])
    assert after > before


def test_compare_bridges(run_example: Example, tmp_path: Path) -> None:
    sizes = ["--pairs", "600", "--test", "60", "--methods", "raw", "centre", "ridge"]
    out = run_example("compare_bridges.py", *sizes, "--json", tmp_path / "r.json")
    assert "text to audio: 60 queries, 60 candidates" in out
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["method"] for r in found] == ["raw", "centre", "ridge", "optimum"] * 2


def test_video_to_audio(
    run_example: Example, tmp_path: Path, make_video: Callable[..., Path], generator_folder: Path,
    sound_refiner: DiffGAPRefiner,
) -> None:  # fmt: skip
    video = make_video(tmp_path / "clip.mp4", seconds=1.5, fps=10)
    sound_refiner.save_pretrained(tmp_path / "refiner")
    models = ["--refiner", str(tmp_path / "refiner"), "--model", str(generator_folder)]
    rest = ["--encoder", "hashing", "--dim", "24", "--steps", "2", "--out", "out.mp4"]
    out = run_example("video_to_audio.py", video, *models, *rest)
    assert "out.mp4: 1.50 s of sound in 4 windows" in out
    assert (tmp_path / "out.mp4").is_file()
