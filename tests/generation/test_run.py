from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.data.mux import read_wav
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.generation.folder import RunFolder, files_of
from diffgap_lightning.generation.items import Item, text_item, video_item
from diffgap_lightning.generation.rendering import Renderer
from diffgap_lightning.generation.run import GenerationRun
from diffgap_lightning.generation.settings import GenerationSettings
from diffgap_lightning.refiner import DiffGAPRefiner

av = pytest.importorskip("av", reason="needs the extra media")
Make = Callable[..., Path]


class Noise:
    """Its sound is its noise; it stops as by Ctrl-C at call number `stop`."""

    name, sample_rate, dim, native_seconds = "noise", 8000, 32, 0.2

    def __init__(self, stop: int = -1) -> None:
        self.made: list[int] = []
        self.calls, self.stop = 0, stop

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return HashingEncoder(dim=32).embed_text(texts)

    def generate(self, embeddings: Tensor, *, seconds: float, seeds: Sequence[int], **_: Any) -> Tensor:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        self.made += seeds
        size = round(seconds * self.sample_rate)
        return torch.stack([0.1 * torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds])


def start(
    folder: Path, generator: Noise, refiner: DiffGAPRefiner, settings: GenerationSettings | None = None, **options: Any
) -> GenerationRun:
    renderer = Renderer(
        generator, refiner, settings, video_encoder=HashingEncoder(dim=24), scorer=HashingEncoder(dim=32), **options
    )
    out = RunFolder(folder, renderer.settings.to_json())
    out.prepare()
    return GenerationRun(renderer, out, "title", {"seed": 0})


TEXTS = [text_item(f"prompt {i}") for i in range(5)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_lies_in_the_folder(tmp_path: Path, sound_refiner: DiffGAPRefiner, make_video: Make) -> None:
    video = video_item(make_video(tmp_path / "v.mp4", seconds=0.5, fps=10))
    run = start(tmp_path / "out", Noise(), sound_refiner, GenerationSettings(candidates=2, crossfade=0.05))
    records = run.run([TEXTS[0], video])
    assert [record["key"] for record in records] == [TEXTS[0].key, video.key]
    assert [v["name"] for v in records[0]["versions"]] == ["plain", "refined"]
    assert [v["name"] for v in records[1]["versions"]] == ["original", "regression", "refined"]
    listed = {name for record in records for name in files_of(record)}
    found = set(contents(tmp_path / "out")) - {"run.json", "index.html"}
    assert listed == {name for name in found if not name.startswith("records/")}
    waveform, rate = read_wav(tmp_path / "out" / "refined" / f"{TEXTS[0].key}.wav")
    assert (len(waveform), rate) == (1600, 8000)
    with av.open(str(tmp_path / "out" / "refined" / f"{video.key}.mp4")) as container:
        assert sorted(s.type for s in container.streams) == ["audio", "video"]


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path, sound_refiner: DiffGAPRefiner) -> None:
    stopped = Noise(stop=5)  # two calls an item: the third item's second version
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "a", stopped, sound_refiner, batch_size=1).run(TEXTS)
    assert len(list((tmp_path / "a" / "records").iterdir())) == 2
    assert (tmp_path / "a" / "index.html").read_text().count("<article") == 2
    assert not list((tmp_path / "a").rglob(".*"))

    again = Noise()
    start(tmp_path / "a", again, sound_refiner, batch_size=1).run(TEXTS)
    assert again.calls == 6  # three items, two versions
    assert not set(again.made) & set(stopped.made[:4])

    start(tmp_path / "b", Noise(), sound_refiner, batch_size=1).run(TEXTS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    untouched = Noise()
    start(tmp_path / "b", untouched, sound_refiner, batch_size=1).run(TEXTS)
    assert untouched.calls == 0


def test_more_prompts_may_come_and_lost_files_are_made_again(tmp_path: Path, sound_refiner: DiffGAPRefiner) -> None:
    start(tmp_path, Noise(), sound_refiner).run(TEXTS[:3])
    (tmp_path / "plain" / f"{TEXTS[1].key}.wav").unlink()
    generator = Noise()
    records = start(tmp_path, generator, sound_refiner).run(TEXTS[:4])
    assert generator.calls == 2  # one batch of the lost item and the new one, two versions
    assert len(set(generator.made)) == 2
    assert [record["key"] for record in records] == [item.key for item in TEXTS[:4]]


def test_another_run_or_another_folder_is_refused(tmp_path: Path, sound_refiner: DiffGAPRefiner) -> None:
    start(tmp_path / "out", Noise(), sound_refiner).run(TEXTS[:1])
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="seed.*there.*use another --out, or --overwrite"):
        start(tmp_path / "out", Noise(), sound_refiner, GenerationSettings(seed=1))
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"not empty and holds no run\.json"):
            RunFolder(tmp_path / "mine", {}).prepare(overwrite)
    with pytest.raises(ValueError, match="not a folder"):
        RunFolder(tmp_path / "mine" / "thesis.txt", {}).prepare()
    RunFolder(tmp_path / "out", {"other": 1}).prepare(overwrite=True)
    assert set(contents(tmp_path / "out")) == {"run.json", "index.html"}
    RunFolder(tmp_path / "out", {"other": 2}).prepare()  # the other one finished nothing, e.g. its only video was bad
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {"other": 2}


def test_bad_videos_are_left_out_and_named(
    tmp_path: Path, sound_refiner: DiffGAPRefiner, make_video: Make, make_audio: Make
) -> None:
    good = video_item(make_video(tmp_path / "good.mp4", seconds=0.3, fps=10, hz=0))
    sound = make_audio(tmp_path / "sound.wav").rename(tmp_path / "sound.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    items: list[Item] = [video_item(sound), good, video_item(tmp_path / "broken.mp4")]
    run = start(tmp_path / "out", Noise(), sound_refiner, GenerationSettings(crossfade=0.05))
    records = run.run(items)
    assert [record["text"] for record in records] == ["good.mp4"]
    assert [v["name"] for v in records[0]["versions"]] == ["regression", "refined"]  # a mute video has no original
    assert sorted(message.split(":")[0] for message in run.failed.values()) == ["broken.mp4", "sound.mp4"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "no video stream" in page
    assert set(contents(tmp_path / "out" / "refined")) == {f"{good.key}.mp4", f"{good.key}.wav"}


def test_damaged_records_count_as_unfinished(tmp_path: Path, sound_refiner: DiffGAPRefiner) -> None:
    run = start(tmp_path, Noise(), sound_refiner)
    run.run(TEXTS[:1])
    path = tmp_path / "records" / f"{TEXTS[0].key}.json"
    for text in ("", "{", "[]", '{"versions": 3}'):
        path.write_text(text)
        assert run.folder.record(TEXTS[0].key) is None
