"""A real CLAP, of random weights, as feature extractor: CLAP score, FD and KAD in its own space."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers", reason="a real CLAP")
pytest.importorskip("soundfile", reason="writes and reads the clips")
pytest.importorskip("torchaudio", reason="resamples the clips")

from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.evaluation.encoder_features import EncoderFeatures
from diffgap_lightning.evaluation.generation import evaluate_folders


@pytest.mark.slow
def test_the_clap_score_is_the_mean_cosine_of_the_encoders_own_embeddings(
    tiny_models: ModuleType, tmp_path: Path, make_audio
) -> None:
    from diffgap_lightning.data.audio import audio_windows
    from diffgap_lightning.data.media import Media
    from diffgap_lightning.encoders.transformers_clap import TransformersClapEncoder

    encoder = TransformersClapEncoder(str(tiny_models.transformers_clap(tmp_path / "clap")), check=False)
    for folder, shift in (("generated", 0), ("reference", 30)):
        for i in range(4):
            make_audio(tmp_path / folder / f"{i}.wav", seconds=1.5, hz=200 + 90 * i + shift)
    captions = {str(i): [f"a tone, number {i}"] for i in range(4)}
    extractor = EncoderFeatures(encoder)
    folders = tmp_path / "generated", tmp_path / "reference"
    report = evaluate_folders(*folders, [extractor], captions=captions)
    found = {record["metric"]: record for record in report.records}
    assert set(found) == {"fd", "kad", "clap"}
    assert found["clap"]["extractor"] == encoder.fingerprint
    cosines = []
    for i in range(4):
        (_, waveform), *_ = audio_windows(Media(folders[0] / f"{i}.wav"), encoder.sample_rate)
        transform = encoder.transform("audio")
        audio = encoder.embed_audio([waveform if transform is None else transform(waveform)])
        cosines.append(float(audio @ encoder.embed_text(captions[str(i)]).T))
    assert found["clap"]["value"] == pytest.approx(sum(cosines) / 4, abs=1e-5)


def test_an_encoder_without_audio_is_refused_and_one_without_text_gives_no_clap_score() -> None:
    class Pictures(ContrastiveEncoder):
        modalities = ("image",)

    with pytest.raises(ValueError, match="Pictures embeds image; the generation metrics need an encoder of audio"):
        EncoderFeatures(Pictures())
    encoder = HashingEncoder()
    assert EncoderFeatures(encoder).knows_text
    encoder.modalities = ("audio",)
    extractor = EncoderFeatures(encoder)
    assert not extractor.knows_text
    rows = extractor([torch.zeros(16000) + 0.1, torch.linspace(-1, 1, 8000)]).rows
    assert torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5)
