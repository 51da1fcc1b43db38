from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.cli.encoder_arguments import build_encoder
from diffgap_lightning.data.audio import resample
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.generation.rendering import Renderer
from diffgap_lightning.generation.settings import GenerationSettings
from diffgap_lightning.generation.spectrogram import BANDS, mel_power, spectrogram_pngs
from diffgap_lightning.integrations.candidates import embed_waveforms
from diffgap_lightning.integrations.conditions import RefineOptions
from diffgap_lightning.integrations.generator import EmbeddingGenerator
from diffgap_lightning.refiner import DiffGAPRefiner

pytest.importorskip("av", reason="needs the extra media")
PROMPTS, KEYS = ["a dog barks", "rain"], ["k1", "k2"]


class Noise:
    """A generator whose sound is its initial noise plus a level that its condition decides."""

    name, sample_rate, dim, native_seconds = "noise", 16000, 32, 0.1

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return HashingEncoder(dim=32).embed_text(texts)

    def generate(self, embeddings: Tensor, *, seconds: float, seeds: Sequence[int], **_: Any) -> Tensor:
        self.sizes.append(len(seeds))
        size = round(seconds * self.sample_rate)
        noise = [0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise) + 0.1 * embeddings[:, :1]


def test_noise_is_a_generator() -> None:
    assert isinstance(Noise(), EmbeddingGenerator)


def test_versions_share_their_noise_and_differ_by_condition(sound_refiner: DiffGAPRefiner) -> None:
    found = Renderer(Noise(), sound_refiner).texts(PROMPTS, KEYS)
    for plain, refined in found:
        assert (plain.version, refined.version) == ("plain", "refined")
        difference = refined.waveforms[0] - plain.waveforms[0]
        level = 0.1 * (refined.conditions - plain.conditions)[0, 0]
        torch.testing.assert_close(difference, level.expand_as(difference), atol=1e-6, rtol=0)
        assert float(level.abs()) > 1e-3
    torch.testing.assert_close(found[0][0].conditions, Noise().embed_text(PROMPTS[:1]))


def test_neither_batch_nor_neighbours_change_an_item(sound_refiner: DiffGAPRefiner) -> None:
    together = Renderer(Noise(), sound_refiner, batch_size=3).texts(PROMPTS, KEYS)
    alone = Renderer(Noise(), sound_refiner, batch_size=1).texts(PROMPTS[1:], KEYS[1:])
    for a, b in zip(together[1], alone[0], strict=True):
        torch.testing.assert_close(a.waveforms[0], b.waveforms[0])
    other = Renderer(Noise(), sound_refiner, GenerationSettings(seed=1)).texts(PROMPTS[1:], KEYS[1:])
    assert not torch.allclose(other[0][0].waveforms[0], alone[0][0].waveforms[0])


@pytest.mark.parametrize("name", ["transformers-clap", pytest.param("laion-clap", marks=pytest.mark.slow)])
def test_real_clap_scorers(name: str, tiny_models: ModuleType, tmp_path: Path) -> None:
    """As `--scorer` builds them; each score is the cosine of one sound's own embedding and the prompt's."""
    package = {"laion-clap": "laion_clap", "transformers-clap": "transformers"}[name]
    if find_spec(package) is None:  # not importorskip: importing laion_clap downloads
        pytest.skip(f"needs {package}")
    if name == "laion-clap":
        checkpoint = tiny_models.laion_checkpoint(tmp_path / "clap.pt")
        tokenizer = tiny_models.roberta_tokenizer(tmp_path / "tokenizer")
        arguments = ["--encoder.checkpoint", str(checkpoint), "--encoder.tokenizer", str(tokenizer)]
    else:
        arguments = ["--encoder.model", str(tiny_models.transformers_clap(tmp_path / "clap"))]
    scorer, generator = build_encoder(name, arguments, "diffgap generate").eval(), Noise()
    generator.dim = scorer.dim
    settings = GenerationSettings(candidates=2, seconds=0.5)
    ((sound,),) = Renderer(generator, None, settings, scorer=scorer).texts(PROMPTS[:1], KEYS[:1])
    text = scorer.embed_text(PROMPTS[:1])
    resampled = [resample(w, generator.sample_rate, scorer.sample_rate) for w in sound.waveforms]
    expected = [float(scorer.embed_audio([w])[0] @ text[0]) for w in resampled]
    assert [scores["clap"] for scores in sound.scores] == pytest.approx(expected, abs=1e-5)
    assert expected[0] > expected[1]


def test_candidates_come_best_first_with_their_scores(sound_refiner: DiffGAPRefiner) -> None:
    scorer, noise = HashingEncoder(dim=32), Noise()
    for by in ("clap", "refiner"):
        settings = GenerationSettings(candidates=3, rank_by=by)  # type: ignore[arg-type]
        for sounds, text in zip(
            Renderer(noise, sound_refiner, settings, scorer=scorer, batch_size=4).texts(PROMPTS, KEYS),
            PROMPTS,
            strict=True,
        ):
            for sound in sounds:
                values = [score[by] for score in sound.scores]
                assert values == sorted(values, reverse=True)
                audio = embed_waveforms(scorer, sound.waveforms, 16000)
                clap = audio @ scorer.embed_text([text])[0]
                torch.testing.assert_close(torch.tensor([s["clap"] for s in sound.scores]), clap, atol=1e-5, rtol=0)
    assert max(noise.sizes) <= 4


def test_without_a_refiner_there_is_the_plain_version_only() -> None:
    assert [s.version for s in Renderer(Noise(), None).texts(PROMPTS[:1], KEYS[:1])[0]] == ["plain"]


def test_options_reach_the_refiner(sound_refiner: DiffGAPRefiner) -> None:
    settings = GenerationSettings(refine=RefineOptions(strength=0.0))
    _, refined = Renderer(Noise(), sound_refiner, settings).texts(PROMPTS[:1], KEYS[:1])[0]
    expected = sound_refiner.refine(
        Noise().embed_text(PROMPTS[:1]), source="text", target="audio", strength=0.0, start="posterior_mean"
    )
    torch.testing.assert_close(refined.conditions, expected)


def test_refusals(sound_refiner: DiffGAPRefiner) -> None:
    with pytest.raises(ValueError, match="give a scorer"):
        Renderer(Noise(), sound_refiner, GenerationSettings(candidates=2))
    with pytest.raises(ValueError, match="the scorer has 8 dimensions"):
        Renderer(Noise(), sound_refiner, scorer=HashingEncoder(dim=8))
    with pytest.raises(ValueError, match="no generator hears them"):
        Renderer(Noise(), None, video_encoder=HashingEncoder(dim=24))
    with pytest.raises(ValueError, match="batch_size: got 0"):
        Renderer(Noise(), sound_refiner, batch_size=0)
    for settings, message in (
        ({"candidates": 0}, "candidates"),
        ({"rank_by": "x"}, "expected one of clap, refiner"),
        ({"seconds": -1.0}, "seconds"),
        ({"num_steps": 0}, "num_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationSettings(**settings)  # type: ignore[arg-type]


def test_broken_numbers_are_refused(sound_refiner: DiffGAPRefiner) -> None:
    class Broken(Noise):
        def generate(self, embeddings: Tensor, **options: Any) -> Tensor:
            return super().generate(embeddings, **options) * float("nan")

    with pytest.raises(ValueError, match="NaN or infinite samples; use another dtype"):
        Renderer(Broken(), sound_refiner).texts(PROMPTS, KEYS)


@pytest.mark.parametrize("sample_rate", [16000, 48000])
def test_a_tone_is_where_it_belongs_in_the_spectrogram(sample_rate: int) -> None:
    t = torch.arange(sample_rate) / sample_rate
    power = mel_power(torch.sin(2 * torch.pi * 1000 * t), sample_rate)
    assert power.shape[0] == BANDS
    mel = 2595 * torch.log10(torch.tensor(1 + 1000 / 700))
    top = 2595 * torch.log10(torch.tensor(1 + sample_rate / 2 / 700))
    assert int(power.mean(1).argmax()) == pytest.approx(float(mel / top * (BANDS + 1)) - 1, abs=1.5)


def test_pictures_share_one_scale(tmp_path: Path) -> None:
    """A quieter copy is darker, and the same sound gives the same picture."""
    from matplotlib.image import imread

    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    paths = []
    for name, png in zip("abc", spectrogram_pngs([noise, 0.01 * noise, noise], 16000), strict=True):
        (tmp_path / f"{name}.png").write_bytes(png)
        paths.append(tmp_path / f"{name}.png")
    loud, quiet, same = (imread(path)[..., :3] for path in paths)
    middle = (slice(100, 150), slice(300, 500))
    assert quiet[middle].mean() < 0.7 * loud[middle].mean()
    assert (loud == same).all()
    assert spectrogram_pngs([torch.zeros(1000)], 16000)[0].startswith(b"\x89PNG")
