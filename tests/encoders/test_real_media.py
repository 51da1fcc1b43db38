"""Each encoder on real clips: the sound track, the captions and the frames of four videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgap_lightning.data.catalog import Clip
from diffgap_lightning.data.media import Media
from diffgap_lightning.embedding.decode import ClipDecoder, DecodedClip, EmbedSettings

pytest.importorskip("av", reason="needs the extra media")

Encoder = Callable[[str], Any]


@pytest.fixture
def clips(shared_data: Path) -> list[Clip]:
    paths = sorted((shared_data / "vggsound_sample").glob("*.mp4"))
    captions = ("a man shouts", "water runs in a sink", "an engine idles", "somebody plays the trumpet")
    return [
        Clip(p.stem, texts=(text,), audio=Media(p), video=Media(p)) for p, text in zip(paths, captions, strict=True)
    ]


def decode(encoder: Any, clips: list[Clip]) -> dict[str, list[Any]]:
    modalities = tuple(m for m in encoder.modalities if m != "image")
    decoder = ClipDecoder(EmbedSettings(modalities, 10.0, windows="first"), encoder)
    items: dict[str, list[Any]] = {m: [] for m in modalities}
    for clip in clips:
        decoded = decoder(clip)
        assert isinstance(decoded, DecodedClip), decoded
        for modality, values in decoded.items.items():
            items[modality] += values
    return items


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laion", "laion-fusion", "clap", "clap-fusion", "open-clip", "cavp"])
def test_real_clips(name: str, tiny_encoder: Encoder, clips: list[Clip]) -> None:
    encoder = tiny_encoder(name)
    items = decode(encoder, clips)
    if "image" in encoder.modalities:
        items["image"] = [clip[0] for clip in items["video"]]
    for modality, values in items.items():
        rows = encoder.embed(modality, values)
        assert rows.shape == (4, encoder.dim)
        assert rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-5)
        alone = torch.cat([encoder.embed(modality, [value]) for value in values])
        assert torch.allclose(rows, alone, atol=1e-5)
        cosines = (rows @ rows.T)[~torch.eye(4, dtype=torch.bool)]
        assert float(cosines.max()) < 0.9999, f"{modality}: two clips give one vector"
    for modality in encoder.sequence_modalities:
        frames = encoder.embed_sequence(modality, items[modality])
        assert frames.shape == (4, 40, encoder.dim)  # 10 s, 4 steps a second
        assert torch.allclose(frames.norm(dim=2), torch.ones(4, 40), atol=1e-5)
