"""Each check passes on a sound encoder and fails on one that is broken in the way that it looks for."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.encoders.base import unit
from diffgap_lightning.encoders.checks import check_at_load, run_checks, sample_rate
from diffgap_lightning.encoders.file_rates import rate_cosines
from diffgap_lightning.encoders.hashing import HashingEncoder


def failures(encoder: HashingEncoder, *modalities: str) -> set[tuple[str, str]]:
    return {(c.modality, c.name) for c in run_checks(encoder, modalities or None) if not c.ok}


def test_a_sound_encoder_passes_all() -> None:
    checks = list(run_checks(HashingEncoder(window=2.0)))
    assert all(check.ok for check in checks)
    assert {c.name for c in checks} >= {"prompts", "collapse", "unit norm", "determinism", "batch", "bf16", "fp16"}
    assert ("audio", "sample rate") in {(c.modality, c.name) for c in checks}


class OneVector(HashingEncoder):
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return super().embed_text(["the same"] * len(texts))


class Collapsed(HashingEncoder):
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return unit(0.3 * super().embed_text(texts) + 1.0)


class Long(HashingEncoder):
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return 2 * super().embed_text(texts)


class NotANumber(HashingEncoder):
    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        return super().embed_video(clips) * torch.tensor(float("nan"))


class RandomCrop(HashingEncoder):
    """What laion_clap does to audio that is longer than its window."""

    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        size = round((self.window or 0) * (self.sample_rate or 0))
        starts = [int(torch.randint(0, max(1, len(w) - size), ())) for w in waveforms]
        return super().embed_audio([w[s : s + size] for w, s in zip(waveforms, starts, strict=True)])


class BatchNorm(HashingEncoder):
    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        rows = super().embed_video(clips)
        return unit(rows - rows.mean(0)) if len(rows) > 1 else rows


class BitsInsteadOfSound(HashingEncoder):
    """Depends on every bit of the samples, so that no resampling leaves a row where it was."""

    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        seeds = [zlib.crc32(w.numpy().tobytes()) for w in waveforms]
        return unit(torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(s)) for s in seeds]))


class Coarse(HashingEncoder):
    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        rows = super().embed_video(clips)
        return unit(torch.randn(rows.shape)) if torch.is_autocast_enabled("cpu") else rows


class FiveTokens(HashingEncoder):
    @property
    def vocabulary(self) -> tuple[int, int]:
        return 5, 50265


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (OneVector, {("text", "prompts"), ("text", "collapse")}),
        (Collapsed, {("text", "collapse")}),
        (Long, {("text", "unit norm")}),
        (RandomCrop, {("audio", "determinism"), ("audio", "batch")}),
        (BatchNorm, {("video", "batch")}),
        (Coarse, {("video", "bf16"), ("video", "fp16")}),
        (FiveTokens, {("text", "vocabulary")}),
    ],
)
def test_each_defect_is_found(broken: type[HashingEncoder], expected: set[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    encoder = broken(window=2.0)
    found = failures(encoder, next(iter(expected))[0])
    assert found == expected


def test_nan_fails() -> None:
    assert ("video", "unit norm") in failures(NotANumber(), "video")


def test_a_rate_that_is_not_handled_is_found() -> None:
    assert ("audio", "sample rate") in failures(BitsInsteadOfSound(), "audio")


@pytest.mark.parametrize("name", ["hashing", "clap", "clap-fusion"])
def test_samples_taken_at_the_wrong_rate_are_found(name: str, tiny_encoder: Callable[[str], Any]) -> None:
    decoded, misread = rate_cosines(HashingEncoder() if name == "hashing" else tiny_encoder(name))
    assert sample_rate(decoded, misread).ok
    assert not sample_rate(misread, misread).ok
    for i in range(len(decoded)):  # one rate alone
        assert not sample_rate(torch.where(torch.arange(len(decoded)) == i, misread, decoded), misread).ok


def test_at_load_a_failure_is_an_error_with_advice() -> None:
    check_at_load(HashingEncoder())
    with pytest.raises(ValueError, match=r"text vocabulary is 5 tokens, expected 50265 tokens; .*vocab\.json"):
        check_at_load(FiveTokens())
    with pytest.raises(ValueError, match="text prompts is cosine 1.00000, expected below 0.9999; different texts"):
        check_at_load(OneVector())
    with pytest.raises(ValueError, match="mean cosine 0.9.*use another checkpoint"):
        check_at_load(Collapsed())


def test_unknown_modalities_are_refused() -> None:
    with pytest.raises(ValueError, match="modality 'smell': the encoder has audio, text, video"):
        list(run_checks(HashingEncoder(), ["smell"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laion", "laion-fusion", "clap", "clap-fusion", "open-clip", "cavp"])
def test_the_encoders_that_ship_pass(name: str, tiny_encoder: Callable[[str], Any]) -> None:
    failed = [c for c in run_checks(tiny_encoder(name)) if not c.ok]
    assert not failed
