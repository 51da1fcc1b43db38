"""What a refiner refuses: rows, options, configurations and training data, each in one line."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner.config import RefinerConfig

TA = {"source": "text", "target": "audio"}
AT = {"source": "audio", "target": "text"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), ValueError, "text: 1 of 4 rows .*row 2.*NaN"),
        (lambda x: x.index_fill(0, torch.tensor([1]), 0.0), ValueError, "text: 1 of 4 rows .*row 1.*zero vectors"),
        (lambda x: x[:, :7], ValueError, "text: got dimension 7, expected 16"),
        (lambda x: x[:0], ValueError, "text: got shape .0, 16.*empty"),
        (lambda x: x[0], ValueError, r"text: got shape \(16,\), expected \(B, D\)"),
        (lambda x: x.long(), TypeError, "text: got torch.int64 tensor, expected a floating"),
    ],
)
@pytest.mark.parametrize("use", ["refine", "score", "features", "energy"])
def test_unusable_rows_are_refused_in_one_line(rows, refiner, change, error, words, use) -> None:
    bad, audio = change(rows(n=4, seed=1)[0]["text"].clone()), rows(n=4)[0]["audio"]
    with pytest.raises(error, match=words) as found:
        {
            "refine": lambda: refiner.refine(bad, **TA),
            "score": lambda: refiner.score(audio, bad, **AT),
            "features": lambda: refiner.score_features(bad, modality="text", **TA),
            "energy": lambda: refiner.start_energy(bad, **TA),
        }[use]()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps: got 0, expected at least 1"),
        ({"num_steps": -2}, "num_steps: got -2"),
        ({"num_samples": 0}, "num_samples: got 0, expected at least 1"),
        ({"strength": 1.01}, "strength: got 1.01, expected a number from 0"),
        ({"strength": -0.1}, "strength: got -0.1"),
        ({"strength": float("nan")}, "strength: got nan"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
        ({"start": "noise"}, "start: got 'noise', expected one of posterior_mean, source"),
        ({"sampler": "euler"}, "sampler: got 'euler', expected one of dpmpp_2m, ddim, ddpm"),
        ({"source": "video"}, "source='video', target='audio': this refiner knows text->audio, audio->text"),
        ({"target": "text"}, "source='text', target='text': this refiner knows"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_in_one_line(rows, refiner, options, words) -> None:
    with pytest.raises(ValueError, match=words) as error:
        refiner.refine(rows(n=3)[0]["text"], **{**TA, **options})
    assert "\n" not in str(error.value)


def test_a_modality_outside_the_pair_is_refused(rows, refiner) -> None:
    x = rows(n=3)[0]["text"]
    with pytest.raises(ValueError, match="modality: got 'video', expected 'text' or 'audio'"):
        refiner.score_features(x, modality="video", **TA)
    with pytest.raises(ValueError, match="source='text', target='video'"):
        refiner.score(x, x, source="text", target="video")


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"strength": 3.0}, "strength: got 3.0, expected a number from 0 to 1"),
        ({"blend": -1.0}, "blend: got -1.0"),
        ({"dropout": float("nan")}, "dropout: got nan"),
        ({"num_steps": 0}, "num_steps: got 0, expected a whole number from 1"),
        ({"width": 0}, "width: got 0"),
        ({"depth": -1}, "depth: got -1"),
        ({"width": "64"}, "width: got '64'"),
        ({"start": "noise"}, "start: got 'noise', expected one of"),
        ({"sampler": "euler"}, "sampler: got 'euler', expected one of"),
        ({"restore": {"text->audio": float("nan")}}, "restore text->audio: got nan"),
        ({"fusion": {"text->audio": {"cca": -1.0}}}, "fusion text->audio cca: got -1.0"),
        ({"pairs": ()}, "pairs: got none, expected at least one"),
        (
            {"pairs": (("text", "video"),)},
            r"pairs: got \['text', 'video'\], expected two different ones of text, audio",
        ),
        ({"pairs": (("text", "text"),)}, "expected two different ones"),
        ({"pairs": (("text", "audio"), ("audio", "text"))}, "a pair brings its reverse, name it once"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(choices, words) -> None:
    values = {"pairs": (("text", "audio"),), "dims": {"text": 4, "audio": 4}, "ranks": {"text": 4, "audio": 4}}
    with pytest.raises(ValueError, match=words):
        RefinerConfig(**{**values, **choices})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"ids": {"text": torch.arange(99), "audio": torch.arange(160)}},
            r"ids of text: got \(99,\), expected \(160,\)",
        ),
        ({"ids": {"text": torch.arange(999), "audio": torch.arange(999)}}, r"ids of text: got \(999,\)"),
        ({"ids": {"audio": torch.arange(160)}}, "ids of text: got nothing"),
        (
            {"ids": {"text": torch.arange(160), "audio": torch.arange(160) + 999}},
            "0 positive pairs, expected at least 2",
        ),
        ({"pairs": [("text", "video")]}, "pairs: got video, but the data has only text, audio"),
        ({"embeddings": {}}, "pairs: got none"),
        ({"embeddings": {"text": torch.ones(160, 4), "audio": torch.ones(160, 4)}}, "L2 norm different from 1"),
    ],
    ids=["few ids", "many ids", "no ids", "no common id", "no such modality", "nothing", "not unit"],
)
def test_unusable_training_rows_are_refused(rows, change, words) -> None:
    embeddings, ids = rows()
    with pytest.raises(ValueError, match=words) as error:
        DiffGAPRefiner.measure(**{"embeddings": embeddings, "ids": ids, "width": 8, **change})
    assert "\n" not in str(error.value)
