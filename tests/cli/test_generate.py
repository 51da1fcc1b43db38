from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffgap_lightning.cli import generate
from diffgap_lightning.cli.main import main
from diffgap_lightning.data.mux import read_wav
from diffgap_lightning.refiner import DiffGAPRefiner

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
Make = Callable[..., Path]
Command = Callable[..., list[str]]
LIMIT = 180  # s; a process that hangs is killed


@pytest.fixture
def command(tmp_path: Path, generator_folder: Path, sound_refiner: DiffGAPRefiner) -> Command:
    """`command(input, ..., flags)`: arguments with the tiny generator, refiner and encoders, writing to `out`."""
    sound_refiner.save_pretrained(tmp_path / "refiner")
    fixed = ["--model", str(generator_folder), "--refiner", str(tmp_path / "refiner"), "--out", str(tmp_path / "out")]
    fixed += ["--encoder", "hashing", "--encoder.dim", "24", "--scorer", "hashing", "--scorer.dim=32", "--steps", "2"]
    return lambda *arguments: [*map(str, arguments), *fixed, "--device", "cpu", "--no-progress"]


def test_a_text_and_a_video(
    command: Command, tmp_path: Path, make_video: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    video = make_video(tmp_path / "v.mp4", seconds=1.0, fps=10)
    assert generate.run(command("a dog barks", video, "--candidates", 2, "--crossfade", 0.1, "--seconds", 0.3)) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'out' / 'index.html'}\n"
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "out" / "records").iterdir())]
    by_kind = {record["kind"]: record for record in records}
    assert set(by_kind["text"]["versions"][0]["scores"]) == {"clap", "refiner"}
    assert by_kind["text"]["seconds"] == pytest.approx(0.3)
    assert by_kind["video"]["seconds"] == pytest.approx(1.0)
    sounds = {
        name: read_wav(tmp_path / "out" / name / f"{by_kind['text']['key']}.wav")[0] for name in ("plain", "refined")
    }
    assert len(sounds["plain"]) == len(sounds["refined"]) == 4800
    assert float((sounds["plain"] - sounds["refined"]).abs().max()) > 1e-3
    assert generate.run(command("a dog barks", video, "--candidates", 2, "--crossfade", 0.1, "--seconds", 0.3)) == 0
    assert "going on: 2 of 2 are finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["x"], "the following arguments are required: --model"),
        (["--model", "{model}"], "the following arguments are required: INPUT"),
        (["x", "--model", "{folder}/none"], "no such folder"),
        (["x", "--model", "owner/name", "--download"], "a download needs a revision"),
        (["x", "--model", "owner/name"], "not in the hub cache"),
        (["x", "--model", "{folder}"], "lacks model_index.json"),
        (["x", "--model", "{model}", "--backend", "tango"], "backend: got 'tango', expected one of diffusers"),
        (["x", "--model", "{model}", "--dtype", "int8"], "dtype: got 'int8'"),
        (["x", "--model", "{model}", "--device", "abacus"], "device: got 'abacus'"),
        (["x", "--model", "{model}", "--candidates", "2"], "give a scorer"),
        (
            ["x", "--model", "{model}", "--rank-by", "loudness"],
            "--rank-by: got 'loudness', expected one of clap, refiner",
        ),
        (["x", "--model", "{model}", "--strength", "2"], "--strength: got 2.0, expected 0 (the start itself) to 1"),
        (["x", "--model", "{model}", "--refine-steps", "0"], "--refine-steps: got 0, expected at least 1"),
        (["x", "--model", "{model}", "--refine-guidance", "nan"], "--refine-guidance: got nan, expected a finite"),
        (["x", "--model", "{model}", "--start", "here"], "--start: got 'here', expected one of posterior_mean, source"),
        (["x", "--model", "{model}", "--steps", "0"], "--steps: got 0, expected at least 1"),
        (["x", "--model", "{model}", "--guidance", "nan"], "--guidance: got nan, expected a finite number"),
        (["x", "--model", "{model}", "--window", "-1"], "--window: got -1.0 s, expected more than 0"),
        (["x", "--model", "{model}", "--crossfade", "-1"], "--crossfade: got -1.0 s, expected at least 0"),
        (["x", "--model", "{model}", "--max-seconds", "0"], "--max-seconds: got 0.0, expected more than 0"),
        (["x", "--model", "{model}", "--refiner", "{folder}/none"], "none"),
        (["x", "--model", "{model}", "--strenght", "1"], "did you mean --strength?"),
        (["x", "--model", "{model}", "--seconds", "soon"], "invalid float value: 'soon'"),
        (["x.txt", "--model", "{model}"], "no such file"),
        (["{video}", "--model", "{model}"], "videos need --encoder NAME"),
        (["x", "--model", "{model}", "--scorer", "nothing"], "encoder 'nothing'"),
        (["x", "--model", "{other}"], "holds a StableAudioPipeline, expected AudioLDMPipeline"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, generator_folder: Path, make_video: Make,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableAudioPipeline"}')
    places = {"folder": tmp_path, "model": generator_folder, "other": other}
    if "{video}" in arguments:
        places["video"] = make_video(tmp_path / "v.mp4", seconds=0.2, fps=5)
    with pytest.raises(SystemExit) as stop:
        main(["generate", *(a.format(**places) for a in arguments)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "generated").exists()


def test_only_bad_videos_is_a_mistake(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.mp4").write_bytes(b"\0" * 64)
    with pytest.raises(SystemExit) as stop:
        main(["generate", *command(tmp_path / "v.mp4")])
    assert stop.value.code == 2
    assert "left out: v.mp4: cannot open container" in capsys.readouterr().err


def test_help_explains_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for flag in ("--refiner", "--scorer", "--strength", "--candidates", "--revision", "--overwrite", "--crossfade"):
        assert flag in text


@pytest.mark.slow
def test_ctrl_c_loses_nothing(command: Command, tmp_path: Path) -> None:
    """A real process, interrupted as soon as its first item is finished, then started again."""
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(16)))
    arguments = [sys.executable, "-m", "diffgap_lightning.cli.main", "generate"]
    arguments += command(tmp_path / "prompts.txt", "--batch-size", 1)
    records = tmp_path / "out" / "records"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not (records.is_dir() and any(records.glob("*.json"))):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, error
    assert "the same command goes on" in error
    finished = {p.name: p.stat().st_mtime_ns for p in records.glob("*.json")}
    assert 0 < len(finished) < 16
    assert (tmp_path / "out" / "index.html").read_text().count("<article") == len(finished)
    again = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert f"going on: {len(finished)} of 16 are finished" in again.stderr
    assert len(list(records.glob("*.json"))) == 16
    assert {name: (records / name).stat().st_mtime_ns for name in finished} == finished


LOADED = """
Promise.all([...document.querySelectorAll("audio, video")].map(m => new Promise(done => {
  const say = () => done({tag: m.tagName, ready: m.readyState, duration: m.duration, width: m.videoWidth || 0});
  m.preload = "auto";
  if (m.readyState >= 2) return say();
  m.addEventListener("loadeddata", say);
  m.addEventListener("error", () => done({tag: m.tagName, ready: -1, error: m.error.message, src: m.src}));
  m.load();
})))
"""
WIDTHS = """
Promise.all([...document.images].map(i => { i.loading = "eager"; return i.decode().then(() => i.naturalWidth); }))
"""
SWITCH = """
(async () => {
  const article = document.querySelector("article");
  const [first, second] = article.querySelectorAll("section > audio");
  await first.play();
  first.currentTime = 0.2;
  const playing = new Promise(done => second.addEventListener("playing", done));
  article.querySelector("button").click();
  await playing;
  return [first.paused, second.paused, second.currentTime >= 0.2];
})()
"""


@pytest.mark.slow
def test_the_page_of_real_videos_plays_in_a_browser(
    command: Command, shared_data: Path, tmp_path: Path, browser: Any
) -> None:
    videos = sorted((shared_data / "vggsound_sample").glob("*.mp4"))[:2]  # all four: test_video_to_audio.py
    arguments = command('a <b>dog</b> & "cat"', "rain", *videos, "--candidates", 2, "--window", 4)
    assert generate.run(arguments) == 0
    for width, phone in ((1280, False), (390, True)):
        page = browser.open((tmp_path / "out" / "index.html").as_uri(), width=width, phone=phone)
        media = page.evaluate(LOADED)
        assert sum(m["tag"] == "AUDIO" for m in media) == 2 * 4 + 2 * 2
        assert sum(m["tag"] == "VIDEO" for m in media) == 2 * 3
        assert all(m["ready"] >= 2 and m["duration"] > 0.5 for m in media), media
        for m in media:
            if m["tag"] == "VIDEO":
                assert m["width"] > 0
                assert m["duration"] == pytest.approx(10.0, abs=0.05)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.errors() == []
        assert not [url for url in page.requests() if not url.startswith(("file:", "data:", "blob:"))]
    assert all(width > 300 for width in page.evaluate(WIDTHS))
    assert page.evaluate("document.querySelector('h2').textContent") == '1a <b>dog</b> & "cat"'
    assert page.evaluate(SWITCH) == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x"], "--refiner DIR is needed"),
        (["--refiner", "x"], "required: --model"),
        (["--model", "x", "--refiner", "x", "--port", "99999"], "from 1 to 65535"),
        (["--model", "x", "--refiner", "x", "--max-megabytes", "nan"], "--max-megabytes: got nan, expected more"),
        (["--model", "x", "--refiner", "x", "--max-seconds", "-1"], "--max-seconds: got -1.0, expected more than 0"),
        (["--model", "x", "--refiner", "x", "--share"], "unrecognized arguments: --share"),
    ],
)
def test_mistakes_of_the_demo_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_demo_says_where_it_is_and_ends_with_ctrl_c(
    generator_folder: Path, sound_refiner: DiffGAPRefiner, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="needs the extra demo")
    sound_refiner.save_pretrained(tmp_path / "refiner")
    arguments = [sys.executable, "-m", "diffgap_lightning.cli.main", "demo", "--model", str(generator_folder)]
    arguments += ["--refiner", str(tmp_path / "refiner"), "--device", "cpu"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=LIMIT)
    assert line.startswith("demo: http://127.0.0.1:"), error
    assert process.returncode == 0
    assert "Traceback" not in error
