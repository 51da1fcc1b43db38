"""`attach` where a pipeline's parts are compiled, offloaded, or where the generator is a LightningModule."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffgap_lightning.integrations import attach


def generate(pipe: Any, **options: Any) -> np.ndarray:
    torch.manual_seed(3)
    return pipe("a dog", num_inference_steps=2, audio_length_in_s=0.02, **options).audios


@pytest.mark.parametrize("kind", ["audioldm", "audioldm2"])
def test_parts_that_accelerate_moves_around(tiny_generators: ModuleType, tmp_path: Path, kind: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    pipe = getattr(tiny_generators, kind)(tmp_path)
    refiner = tiny_generators.refiner()
    plain = generate(pipe)
    with attach(refiner, pipe, strength=0.5):
        expected = generate(pipe)
    assert not np.array_equal(expected, plain)
    parts = [pipe.text_encoder, pipe.unet, pipe.vae, pipe.vocoder]
    if kind == "audioldm2":  # as its enable_model_cpu_offload does, on a machine with an accelerator
        encoder = pipe.text_encoder
        more = [pipe.text_encoder_2, pipe.projection_model, pipe.language_model]
        parts = [encoder.text_model, encoder.text_projection, *more, *parts[1:], encoder]
    hook = None
    for part in parts:
        _, hook = accelerate.cpu_offload_with_hook(part, "cpu", prev_module_hook=hook)
    with attach(refiner, pipe, strength=0.5):
        np.testing.assert_array_equal(generate(pipe), expected)
    np.testing.assert_array_equal(generate(pipe), plain)


@pytest.mark.slow
def test_compiled_parts(tiny_generators: ModuleType, tmp_path: Path) -> None:
    pipe, refiner = tiny_generators.audioldm(tmp_path), tiny_generators.refiner()
    with attach(refiner, pipe, strength=0.5):
        expected = generate(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    plain = generate(pipe)
    with attach(refiner, pipe, strength=0.5):
        found = generate(pipe)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, plain, atol=1e-5)
    np.testing.assert_array_equal(generate(pipe), plain)


def test_a_saved_and_loaded_pipeline(tiny_generators: ModuleType, tmp_path: Path) -> None:
    from diffusers import AudioLDMPipeline

    refiner = tiny_generators.refiner()
    pipe = tiny_generators.audioldm(tmp_path / "tokenizer")
    with attach(refiner, pipe):
        expected = generate(pipe)
        pipe.save_pretrained(tmp_path / "model")  # attached, and still the plain pipeline's files
    loaded = AudioLDMPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(generate(loaded), generate(pipe))
    with attach(refiner, loaded):
        np.testing.assert_array_equal(generate(loaded), expected)


def test_a_subclass_of_a_pipeline(tiny_generators: ModuleType, tmp_path: Path) -> None:
    from diffusers import AudioLDMPipeline

    class Mine(AudioLDMPipeline):
        pass

    pipe = tiny_generators.audioldm(tmp_path)
    mine = Mine(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    with attach(tiny_generators.refiner(), pipe):
        expected = generate(pipe)
    with attach(tiny_generators.refiner(), mine):
        np.testing.assert_array_equal(generate(mine), expected)


def test_a_lightning_module_by_its_conditioning_method(tiny_generators: ModuleType, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule

    class Generator(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, tiny_generators.DIM)

        def condition(self, x: Tensor) -> Tensor:
            return normalize(self.embed(x), dim=1)

    module, refiner = Generator(), tiny_generators.refiner()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = module.condition(x)
        with attach(refiner, module, method="condition", strength=0):
            refined = module.condition(x)
        assert torch.equal(refined, refiner.refine(plain, source="text", target="audio", strength=0))
        assert torch.equal(module.condition(x), plain)
    assert not any("refiner" in name for name in module.state_dict())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])  # fmt: skip
def test_offloading_on_an_accelerator(tiny_generators: ModuleType, tmp_path: Path, device: str) -> None:
    for kind in ("audioldm", "audioldm2"):
        pipe, refiner = getattr(tiny_generators, kind)(tmp_path), tiny_generators.refiner()
        pipe.enable_model_cpu_offload(device=device) if kind == "audioldm2" else pipe.enable_model_cpu_offload()
        plain = generate(pipe)
        with attach(refiner, pipe, strength=0.5):
            found = generate(pipe)
        assert not np.allclose(found, plain)
        np.testing.assert_array_equal(generate(pipe), plain)
