from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.integrations.attach import attach
from diffgap_lightning.integrations.conditions import RefineOptions, refine_rows
from diffgap_lightning.integrations.generator import DiffusersGenerator, as_generator, derive_seed, fit_length
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


def test_rows_are_refined_with_noise_of_their_own(sound_refiner: DiffGAPRefiner) -> None:
    rows = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    together = refine_rows(sound_refiner, rows, [5, 6, 5], "text", "audio", RefineOptions(strength=0.5))
    expected = sound_refiner.refine(
        rows[1:2], source="text", target="audio", strength=0.5, start="posterior_mean",
        generator=torch.Generator().manual_seed(6),
    )  # fmt: skip
    torch.testing.assert_close(together[1:2], expected)
    again = refine_rows(sound_refiner, rows[[2]], [5], "text", "audio", RefineOptions(strength=0.5))
    torch.testing.assert_close(again, together[2:])


def test_seeds_differ_by_every_part() -> None:
    seeds = {derive_seed(s, key, k) for s in (0, 1) for key in ("a", "b", "ab") for k in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab")
    assert fit_length(torch.ones(1, 3), 5).tolist() == [[1, 1, 1, 0, 0]]
