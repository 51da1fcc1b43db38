from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from diffgap_lightning.integrations.audioldm_generator import AudioLDMGenerator, load_audioldm_generator
from diffgap_lightning.integrations.generator import EmbeddingGenerator

pytestmark = [
    pytest.mark.skipif(find_spec("audioldm") is None, reason="needs pip install 'diffgap-lightning[audioldm]'"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
]
PROMPTS = ["a dog barks", "rain on a tin roof"]


@pytest.fixture(scope="module")
def audioldm_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = spec_from_file_location("tiny_audioldm", Path(__file__).parents[1] / "tiny_audioldm.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("home")
    tiny.roberta_base(folder)
    model = tiny.latent_diffusion(folder)
    model.model_ema = type(model.model_ema)(model.model)  # generating uses the averaged weights
    return model


@pytest.fixture(scope="module")
def generator(audioldm_model: Any) -> AudioLDMGenerator:
    return AudioLDMGenerator(audioldm_model, "tiny")


def test_embeddings_are_the_packages(generator: AudioLDMGenerator, audioldm_model: Any) -> None:
    assert isinstance(generator, EmbeddingGenerator)
    state = torch.random.get_rng_state()
    rows = generator.embed_text(PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    own = normalize(audioldm_model.cond_stage_model.model.get_text_embedding(
        audioldm_model.cond_stage_model.tokenizer(PROMPTS)), dim=1)  # fmt: skip
    torch.testing.assert_close(rows, own)


def test_rows_differ_by_condition_and_seed_alone(generator: AudioLDMGenerator) -> None:
    rows = generator.embed_text(PROMPTS)
    options = {"seconds": 0.5, "num_steps": 2}
    first = generator.generate(rows, seeds=[1, 1], **options)
    assert first.shape == (2, 8000)
    torch.manual_seed(5)
    again = generator.generate(rows[1:], seeds=[1], **options)
    torch.testing.assert_close(again[0], first[1], rtol=1e-3, atol=1e-5)
    assert not torch.equal(first[0], first[1])
    assert not torch.allclose(generator.generate(rows[:1], seeds=[2], **options)[0], first[0], atol=1e-5)
    negative = generator.generate(rows[:1], seeds=[1], negative_prompt="noise", **options)
    assert not torch.equal(negative[0], first[0])


def test_the_checkpoints_name_says_which_model_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="audioldm-s-full"):
        load_audioldm_generator(str(tmp_path / "mine.ckpt"), torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="not found"):
        load_audioldm_generator(str(tmp_path / "audioldm-s-full.ckpt"), torch.device("cpu"))
    with pytest.raises(ValueError, match="got a Linear"):
        AudioLDMGenerator(torch.nn.Linear(1, 1))
