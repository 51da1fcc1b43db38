from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.integrations.attach import attach
from diffgap_lightning.integrations.conditions import refine_rows
from diffgap_lightning.integrations.diffusers_generator import DiffusersGenerator, as_generator
from diffgap_lightning.refiner import DiffGAPRefiner

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROMPTS = ["a dog barks", "rain on a tin roof"]
SECONDS = 0.2


@pytest.fixture(scope="module")
def pipe(generator_folder: Path) -> Any:
    import diffusers

    found = diffusers.AudioLDMPipeline.from_pretrained(str(generator_folder), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def generator(pipe: Any) -> DiffusersGenerator:
    return DiffusersGenerator(pipe, name="tiny")


def plain(pipe: Any, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, audio_length_in_s=SECONDS, generator=noise, output_type="pt", **options).audios


@pytest.mark.parametrize("guidance", [1.0, 2.5, None])
def test_text_embeddings_make_the_pipelines_own_sound(
    pipe: Any, generator: DiffusersGenerator, guidance: float
) -> None:
    rows = generator.embed_text(PROMPTS)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    found = generator.generate(rows, seconds=SECONDS, seeds=[3, 4], num_steps=3, guidance_scale=guidance)
    options = {} if guidance is None else {"guidance_scale": guidance}
    torch.testing.assert_close(found, plain(pipe, PROMPTS, [3, 4], num_inference_steps=3, **options), rtol=0, atol=0)


def test_a_negative_prompt_is_the_pipelines(pipe: Any, generator: DiffusersGenerator) -> None:
    rows = generator.embed_text(PROMPTS)
    found = generator.generate(rows, seconds=SECONDS, seeds=[3, 4], num_steps=3, negative_prompt="noise")
    expected = plain(pipe, PROMPTS, [3, 4], num_inference_steps=3, negative_prompt=["noise", "noise"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, generator.generate(rows, seconds=SECONDS, seeds=[3, 4], num_steps=3), atol=1e-4)


def test_refined_rows_make_the_sound_of_the_attached_refiner(
    pipe: Any, generator: DiffusersGenerator, sound_refiner: DiffGAPRefiner
) -> None:
    rows = refine_rows(sound_refiner, generator.embed_text(PROMPTS[:1]), [9], "text", "audio", None)
    found = generator.generate(rows, seconds=SECONDS, seeds=[3], num_steps=3)
    with attach(sound_refiner, pipe, seed=9):
        expected = plain(pipe, PROMPTS[:1], [3], num_inference_steps=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain(pipe, PROMPTS[:1], [3], num_inference_steps=3), atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(generator: DiffusersGenerator) -> None:
    rows = generator.embed_text(PROMPTS)
    together = generator.generate(rows, seconds=SECONDS, seeds=[3, 4], num_steps=3)
    for b, seed in enumerate((3, 4)):
        alone = generator.generate(rows[b : b + 1], seconds=SECONDS, seeds=[seed], num_steps=3)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seconds", [0.0001, 0.02, 0.12345, 0.64])
def test_length_to_a_sample(generator: DiffusersGenerator, seconds: float) -> None:
    rows = generator.embed_text(PROMPTS[:1])
    assert generator.native_seconds == pytest.approx(0.64)
    assert generator.generate(rows, seconds=seconds, seeds=[0], num_steps=1).shape == (1, round(16000 * seconds))


def test_musicldm_hears_embeddings_too(tiny_generators: ModuleType, tmp_path: Path) -> None:
    generator = as_generator(tiny_generators.musicldm(tmp_path))
    rows = generator.embed_text(PROMPTS)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    found = generator.generate(rows, seconds=0.01, seeds=[1, 1], num_steps=2)
    assert found.shape == (2, 160)
    assert not torch.equal(found[0], found[1])


@pytest.fixture(scope="module")
def language_pipe(tiny_generators: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """AudioLDM2, whose prompt is heard by CLAP and by T5."""
    return tiny_generators.audioldm2(tmp_path_factory.mktemp("tokenizer"))


LANGUAGE = {"audio_length_in_s": 0.02, "num_inference_steps": 2, "output_type": "pt"}


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "hiss"}])
def test_audioldm2_makes_the_pipelines_own_sound(language_pipe: Any, options: dict[str, Any]) -> None:
    generator = as_generator(language_pipe)
    rows = generator.embed_text(PROMPTS)
    found = generator.generate(rows, seconds=0.02, seeds=[3, 4], num_steps=2, texts=PROMPTS, **options)
    for made, text, seed in zip(found, PROMPTS, (3, 4), strict=True):  # texts of two lengths, padded in one batch
        noise = torch.Generator().manual_seed(seed)
        expected = language_pipe(text, generator=noise, **LANGUAGE, **options).audios[0]
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-5)
    bare = generator.generate(rows, seconds=0.02, seeds=[3, 4], num_steps=2, texts=["", ""], **options)
    assert not torch.allclose(bare, found, atol=1e-4)


def test_audioldm2_hears_the_refined_row_as_if_the_refiner_was_attached(
    language_pipe: Any, tiny_generators: ModuleType
) -> None:
    generator, refiner = as_generator(language_pipe), tiny_generators.refiner()
    rows = refine_rows(refiner, generator.embed_text(PROMPTS[:1]), [9], "text", "audio", None)
    found = generator.generate(rows, seconds=0.02, seeds=[3], num_steps=2, texts=PROMPTS[:1])
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    plain = language_pipe(PROMPTS[0], generator=noise[0], **LANGUAGE).audios
    with attach(refiner, language_pipe, seed=9):
        expected = language_pipe(PROMPTS[0], generator=noise[1], **LANGUAGE).audios
        with pytest.raises(ValueError, match="attached already; detach it"):
            generator.generate(rows, seconds=0.02, seeds=[3], num_steps=1, texts=PROMPTS[:1])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)


def test_an_audioldm2_that_speaks_is_refused(language_pipe: Any) -> None:
    from diffusers import AudioLDM2Pipeline
    from transformers import VitsConfig

    class Spoken(torch.nn.Module):
        config = VitsConfig()

    speaking = AudioLDM2Pipeline.__new__(AudioLDM2Pipeline)
    speaking.__dict__ |= vars(language_pipe) | {"text_encoder_2": Spoken()}
    with pytest.raises(ValueError, match="speaks a transcription"):
        as_generator(speaking)


def test_refusals(generator: DiffusersGenerator) -> None:
    rows = generator.embed_text(PROMPTS)
    for embeddings, seconds, seeds, message in (
        (rows[:, :5], 1.0, [0, 0], r"got \(2, 5\), expected \(B, 32\) for tiny"),
        (rows, 1.0, [0], "1 for 2 rows"),
        (rows, 0.0, [0, 0], "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.generate(embeddings, seconds=seconds, seeds=seeds)
    with pytest.raises(ValueError, match="got a Linear"):
        as_generator(torch.nn.Linear(2, 2))
