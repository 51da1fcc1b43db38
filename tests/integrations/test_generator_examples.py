"""The examples that attach a refiner, run as a user runs them, on tiny generators of the real classes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(folder: Path, seconds: float) -> None:
    import soundfile

    sounds = [soundfile.read(folder / name) for name in ("plain.wav", "refined.wav")]
    assert all(rate == 16000 and len(x) == pytest.approx(16000 * seconds, abs=80) for x, rate in sounds)
    assert all(np.std(x) > 1e-4 for x, _ in sounds)
    assert not np.array_equal(sounds[0][0], sounds[1][0])


def test_add_refiner_to_audioldm(run_example: Callable[..., str], tiny_generators: ModuleType, tmp_path: Path) -> None:
    tiny_generators.audioldm(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    tiny_generators.refiner().save_pretrained(tmp_path / "refiner")
    sizes = ["--model", tmp_path / "model", "--steps", 2, "--seconds", 0.05]
    out = run_example("add_refiner_to_audioldm.py", tmp_path / "refiner", "a dog barks", *sizes)
    assert out == "plain.wav: 0.05 s\nrefined.wav: 0.05 s\n"
    check(tmp_path, 0.05)


@pytest.mark.skipif(find_spec("audioldm") is None, reason="needs pip install 'diffgap-lightning[audioldm]'")
def test_audioldm_package(tmp_path: Path) -> None:
    import torch
    import yaml
    from torch.nn.functional import normalize

    from diffgap_lightning.refiner import DiffGAPRefiner

    spec = spec_from_file_location("tiny_audioldm", ROOT / "tests" / "tiny_audioldm.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.roberta_base(tmp_path)
    torch.save({"state_dict": tiny.latent_diffusion(tmp_path).state_dict()}, tmp_path / "model.ckpt")
    config = tiny.small_config()
    config["model"]["params"]["device"] = "cpu"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    g = torch.Generator().manual_seed(0)
    rows = {m: normalize(torch.randn(60, 512, generator=g) + torch.randn(512, generator=g)) for m in ("text", "audio")}
    refiner = DiffGAPRefiner.measure(rows, dict.fromkeys(rows, torch.arange(60)), width=8, depth=0)
    refiner.save_pretrained(tmp_path / "refiner")
    arguments = ["refiner", "model.ckpt", "a dog barks", "--config", "config.yaml", "--steps", 2, "--seconds", 0.3125]
    out = run("audioldm_package.py", *arguments, folder=tmp_path)
    assert "refined.wav: 0.32 s" in out
    check(tmp_path, 0.32)
