"""A generator from a folder is the pipeline that wrote it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffgap_lightning.generation.loading import load_generator
from diffgap_lightning.integrations.diffusers_generator import as_generator

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("kind", ["audioldm", "audioldm2"])
def test_a_folder_makes_the_pipelines_own_sound(kind: str, tiny_generators: ModuleType, tmp_path: Path) -> None:
    pipe = getattr(tiny_generators, kind)(tmp_path / "tokenizer")
    pipe.save_pretrained(tmp_path / "model")
    generator, expected = load_generator(str(tmp_path / "model"), device="cpu"), as_generator(pipe)
    assert generator.name == "model"
    assert generator.native_seconds == expected.native_seconds
    texts = ["a dog barks"]
    rows = generator.embed_text(texts)
    torch.testing.assert_close(rows, expected.embed_text(texts))
    sounds = [g.generate(rows, seconds=0.02, seeds=[1], num_steps=1, texts=texts) for g in (generator, expected)]
    torch.testing.assert_close(*sounds, rtol=1e-3, atol=1e-5)
