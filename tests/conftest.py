"""Tiny media files and generators, made on the spot; a browser and the folder of real data where they are at hand."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from diffgap_lightning.refiner import DiffGAPRefiner

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch's global generator, before fixtures too: networks draw their first weights from it.

    Without this a test's figures depend on the tests that the same process ran before it.
    """
    import torch

    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the checkout, or the one that DIFFGAP_SHARED names; skips where it is absent."""
    folder = Path(os.environ.get("DIFFGAP_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """The module `tiny_models.py` beside this file: small random models of the real packages."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runs() -> Iterator[Any]:
    """Runs `diffgap` in real processes, see `runs.py`; in another locale and time zone than the tests'."""
    spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("runs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    running = module.Runs({"LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Kiritimati"})
    yield running
    running.close()


def sine(seconds: float, sample_rate: int, hz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    """`(T,)` float32."""
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * sample_rate)) / sample_rate)).astype(
        np.float32
    )


@pytest.fixture
def make_audio() -> Callable[..., Path]:
    """`make_audio(path, seconds=1.0, sample_rate=16000, hz=440.0, channels=1)`; the suffix decides the format."""
    soundfile = pytest.importorskip("soundfile")

    def make(path: Path, seconds: float = 1.0, sample_rate: int = 16000, hz: float = 440.0, channels: int = 1) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        signal = np.stack([sine(seconds, sample_rate, hz)] * channels, axis=1)
        soundfile.write(path, signal, sample_rate)
        return path

    return make


def numbered_frame(index: int, size: int = 64) -> np.ndarray:
    """`(H, W, 3)` uint8: eight black or white columns, the bits of `index`, least significant first."""
    bits = np.array([(index >> b) & 1 for b in range(8)], dtype=np.uint8) * 255
    return np.broadcast_to(np.repeat(bits, size // 8)[None, :, None], (size, size, 3)).copy()


@pytest.fixture
def read_number() -> Callable[..., int]:
    """The index that `numbered_frame` wrote into a `(3, H, W)` frame."""

    def read(frame: object) -> int:
        columns = np.asarray(frame, dtype=np.float64).mean(axis=(0, 1)).reshape(8, -1).mean(axis=1)
        return int(sum(int(value > 127) << bit for bit, value in enumerate(columns)))

    return read


@pytest.fixture
def make_video() -> Callable[..., Path]:
    """`make_video(path, seconds=1.0, fps=10, sample_rate=16000, hz=440.0)`: numbered frames, a sine (0 Hz: mute)."""
    av = pytest.importorskip("av")

    def make(path: Path, seconds: float = 1.0, fps: int = 10, sample_rate: int = 16000, hz: float = 440.0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            video = container.add_stream("mpeg4", rate=fps)
            video.width = video.height = 64
            video.pix_fmt = "yuv420p"
            audio = container.add_stream("aac", rate=sample_rate) if hz else None
            if audio is not None:
                audio.layout = "mono"
            for index in range(round(seconds * fps)):
                frame = av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")
                container.mux(video.encode(frame))
            container.mux(video.encode())
            if audio is not None:
                frame = av.AudioFrame.from_ndarray(sine(seconds, sample_rate, hz)[None], format="fltp", layout="mono")
                frame.sample_rate = sample_rate
                container.mux(audio.encode(frame))
                container.mux(audio.encode())
        return path

    return make


@pytest.fixture(scope="session")
def tiny_generators() -> ModuleType:
    """The module `tiny_generators.py`: tiny random generators of the real classes; skips without diffusers."""
    pytest.importorskip("diffusers", reason="needs pip install 'diffgap-lightning[diffusers]'")
    spec = spec_from_file_location("tiny_generators", ROOT / "tests" / "tiny_generators.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def generator_folder(tiny_generators: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny `AudioLDMPipeline` whose noise can be heard: 0.64 s at 16 kHz, 32 dimensions."""
    import torch

    folder = tmp_path_factory.mktemp("generator")
    pipe = tiny_generators.audioldm(folder / "tokenizer-files", upsample=(16, 10), frames=32)
    sound = pipe("x", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").audios
    last = pipe.vocoder.conv_post
    for parameter in (last.weight, last.bias):
        parameter.data *= 0.1 / float(sound.std())
    pipe.save_pretrained(folder / "audioldm")
    return folder / "audioldm"


@pytest.fixture(scope="session")
def sound_refiner() -> DiffGAPRefiner:
    """From text (32 dimensions) and video (24) to audio (32), measured on rows with a gap."""
    import torch
    from torch.nn.functional import normalize

    from diffgap_lightning.refiner import DiffGAPRefiner

    g = torch.Generator().manual_seed(0)
    latent = torch.randn(200, 8, generator=g)
    rows = {
        name: normalize(latent @ torch.randn(8, dim, generator=g) + 2 * torch.randn(dim, generator=g), dim=1)
        for name, dim in (("text", 32), ("video", 24), ("audio", 32))
    }
    made = DiffGAPRefiner.measure(rows, dict.fromkeys(rows, torch.arange(200)), width=16, depth=1, rank=6)
    for parameter in made.cdm.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return made


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """`run_example(name, *arguments)`: what `python examples/name arguments` prints in `tmp_path`.

    Here and not in a process of its own, which would only import torch and Lightning once more.
    """

    def run(name: str, *arguments: object) -> str:
        path = ROOT / "examples" / name
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
            capsys.readouterr()
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, see `chromium.py`; skips without it."""
    spec = spec_from_file_location("chromium", ROOT / "tests" / "chromium.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.find() is None:
        pytest.skip("no Chromium here; pages are not opened")
    with module.Chromium() as running:
        yield running
