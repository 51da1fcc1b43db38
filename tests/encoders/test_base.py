from __future__ import annotations

import math
import sys

import pytest
import torch

from diffgap_lightning.encoders import SHORT_NAMES, ContrastiveEncoder, encoder_class
from diffgap_lightning.encoders.hashing import HashingEncoder


def tone(hz: float, seconds: float = 1.0, rate: int = 16000, amplitude: float = 0.5) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * rate)) / rate)


def noise_clip(seed: int, frames: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, 16, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


INPUTS = {
    "audio": [tone(200), tone(3000, 2.5), torch.zeros(100)],
    "text": ["a dog barks", "Rain on a roof", "x"],
    "video": [noise_clip(0), noise_clip(1, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
}


@pytest.mark.parametrize("modality", ["audio", "text", "video"])
def test_hashing_gives_unit_rows_and_batches_equal_single_items(modality: str) -> None:
    encoder = HashingEncoder(dim=32)
    items = INPUTS[modality]
    rows = encoder.embed(modality, items)
    assert rows.shape == (3, 32)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    single = torch.cat([encoder.embed(modality, [item]) for item in items])
    assert torch.allclose(rows, single, atol=1e-6)
    assert torch.equal(rows, HashingEncoder(dim=32).embed(modality, items))  # the same in another instance


@pytest.mark.parametrize("modality", ["audio", "text", "video"])
def test_hashing_keeps_near_signals_near(modality: str) -> None:
    pairs = {
        "audio": (tone(440), tone(441), tone(4000)),
        "text": ("a dog barks loudly", "A dog barks loud", "water runs in a sink"),
        "video": (noise_clip(0), noise_clip(0).clamp(max=250), torch.zeros(8, 3, 16, 24, dtype=torch.uint8)),
    }[modality]
    a, near, far = HashingEncoder(dim=256).embed(modality, list(pairs))
    assert float(a @ near) > 0.9 * float(a @ a)
    assert float(a @ far) < float(a @ near) - 0.1


def test_fingerprint_tells_what_changes_the_output() -> None:
    prints = {HashingEncoder(**options).fingerprint for options in ({}, {"dim": 8}, {"seed": 1}, {"sample_rate": 8000})}
    assert len(prints) == 4
    assert HashingEncoder().fingerprint == HashingEncoder(window=3.0).fingerprint


def test_refusals() -> None:
    with pytest.raises(ValueError, match="empty text"):
        HashingEncoder().embed_text(["  "])
    with pytest.raises(ValueError, match="dim is 0"):
        HashingEncoder(dim=0)
    with pytest.raises(ValueError, match="embeds audio, text, video, got image"):
        HashingEncoder().embed("image", [])
    with pytest.raises(ValueError, match="embeds nothing, got audio"):
        ContrastiveEncoder().embed_audio([])
    with pytest.raises(ValueError, match="embeds nothing, got transform"):
        ContrastiveEncoder().embed("transform", [])


def test_names() -> None:
    assert encoder_class("hashing") is HashingEncoder
    assert encoder_class("laion_clap") is encoder_class("laion-clap")
    assert encoder_class("diffgap_lightning.encoders.hashing.HashingEncoder") is HashingEncoder
    with pytest.raises(ValueError, match="not a short name"):
        encoder_class("hasing")
    with pytest.raises(ValueError, match="no module 'no_such_package'"):
        encoder_class("no_such_package.Encoder")
    with pytest.raises(ValueError, match="has no class 'Nothing'"):
        encoder_class("diffgap_lightning.encoders.hashing.Nothing")


def test_every_short_name_is_a_class_path() -> None:
    for path in SHORT_NAMES.values():
        assert path.startswith("diffgap_lightning.encoders.")


def test_a_missing_dependency_of_an_encoder_is_not_hidden(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    with open(f"{folder}/needs_more.py", "w") as file:
        file.write("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "needs_more", raising=False)
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_there"):
        encoder_class("needs_more.Encoder")
