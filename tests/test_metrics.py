from __future__ import annotations

import pytest
import torch
from torchmetrics import MetricCollection

from diffgap_lightning.functional import gap
from diffgap_lightning.functional.frechet import frechet_distance
from diffgap_lightning.functional.generation import kernel_audio_distance
from diffgap_lightning.functional.retrieval import retrieval_ranks, retrieval_summary
from diffgap_lightning.metrics import GenerationDistance, ModalityGap, PairedRetrieval

AUDIO, TEXT = 12, 30
Rows = dict[str, torch.Tensor]


def rows(seed: int = 0) -> Rows:
    """Text (30) and audio (12) of 12 clips, two or three captions each, in mixed order, row numbers attached."""
    g = torch.Generator().manual_seed(seed)
    audio = torch.nn.functional.normalize(torch.randn(AUDIO, 16, generator=g), dim=1)
    ids = torch.arange(TEXT) % AUDIO
    text = torch.nn.functional.normalize(audio[ids] + 0.4 * torch.randn(TEXT, 16, generator=g), dim=1)
    return {
        **{"source_features": text, "source_ids": ids, "source_rows": torch.arange(TEXT)},
        **{"target_features": audio, "target_ids": torch.arange(AUDIO), "target_rows": torch.arange(AUDIO)},
    }


def take(data: Rows, source: object, target: object) -> Rows:
    index = {"source": torch.as_tensor(source, dtype=torch.int64), "target": torch.as_tensor(target, dtype=torch.int64)}
    return {name: value[index[name.split("_")[0]]] for name, value in data.items()}


def whole(metric: PairedRetrieval | ModalityGap, data: Rows) -> dict[str, torch.Tensor]:
    metric.update(**data)
    return metric.compute()


METRICS = pytest.mark.parametrize("kind", [PairedRetrieval, ModalityGap])


def test_retrieval_is_the_summary_of_the_ranks_in_both_directions() -> None:
    data = rows()
    x, y, i, j = (data[k] for k in ("source_features", "target_features", "source_ids", "target_ids"))
    expected = {f"text_to_audio/{k}": v for k, v in retrieval_summary(retrieval_ranks(x, y, i, j)).items()}
    expected |= {f"audio_to_text/{k}": v for k, v in retrieval_summary(retrieval_ranks(y, x, j, i)).items()}
    result = whole(PairedRetrieval("text", "audio"), data)
    assert {k: v.item() for k, v in result.items()} == pytest.approx(expected)
    assert 0 < result["text_to_audio/r1"] < 1
    assert result["text_to_audio/map10"] != result["audio_to_text/map10"]


def test_gap_is_what_the_functions_say() -> None:
    data = rows()
    x, y, *ids = (data[k] for k in ("source_features", "target_features", "source_ids", "target_ids"))
    result = whole(ModalityGap("text", "audio", bandwidth=[0.5, 1.0], shrinkage=0.1), data)
    expected = {
        "centroid_distance": gap.centroid_distance(x, y),
        "paired_cosine": gap.paired_cosine(x, y, *ids),
        "unpaired_cosine": gap.unpaired_cosine(x, y, *ids),
        "alignment": gap.alignment(x, y, *ids),
        "uniformity_text": gap.uniformity(x),
        "uniformity_audio": gap.uniformity(y),
        "mmd2": gap.mmd2(x, y, [0.5, 1.0]),
        "frechet": gap.frechet_distance(x, y, 0.1),
    }
    assert {k: v.item() for k, v in result.items()} == pytest.approx(
        {f"text_to_audio/{k}": v for k, v in expected.items()}
    )


@METRICS
def test_batches_their_order_and_repeated_rows_do_not_matter(kind) -> None:
    data = rows()
    expected = whole(kind("text", "audio"), data)
    metric = kind("text", "audio")
    shuffle = torch.randperm(TEXT, generator=torch.Generator().manual_seed(1))
    metric.update(**take(data, shuffle[:20], []))
    metric.update(**take(data, [], range(AUDIO)))
    metric.update(**take(data, shuffle[15:], [3, 3, 0]))
    assert metric.compute() == expected


@METRICS
def test_reset_forgets_and_compute_may_come_between_updates(kind) -> None:
    data = rows()
    expected = whole(kind("text", "audio"), data)
    metric = kind("text", "audio")
    metric.update(**rows(seed=5))
    metric.compute()
    metric.reset()
    metric.update(**take(data, range(9), range(4)))
    metric.compute()
    metric.update(**take(data, range(9, TEXT), range(4, AUDIO)))
    assert metric.compute() == expected


@METRICS
def test_autocast_and_half_precision_modules_keep_float32(kind) -> None:
    data = rows()
    expected = whole(kind("text", "audio"), data)
    metric = kind("text", "audio").to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        metric.update(**data)
        result = metric.compute()
    assert result == expected
    assert {v.dtype for v in result.values()} == {torch.float32}


def test_half_precision_batches_are_kept_in_float32_beside_others() -> None:
    data, metric = rows(), PairedRetrieval("text", "audio")
    metric.update(**(data | {"source_features": data["source_features"].bfloat16()}))
    assert metric.collected("source")[0].dtype == torch.float32
    assert {part.dtype for part in metric.source_features} == {torch.float32}  # what ranks exchange


def test_a_collection_shares_one_update() -> None:
    data = rows()
    collection = MetricCollection([PairedRetrieval("text", "audio"), ModalityGap("text", "audio")])
    for _ in range(2):  # the second epoch runs with merged compute groups
        collection.update(**take(data, range(9), range(AUDIO)))
        collection.update(**take(data, range(9, TEXT), []))
        result = collection.compute()
        for kind in (PairedRetrieval, ModalityGap):
            expected = whole(kind("text", "audio"), data)
            assert {k: result[k] for k in expected} == expected
        collection.reset()


def test_rows_without_a_partner_ask_nothing_and_stay_candidates() -> None:
    eye = torch.eye(3)
    metric = PairedRetrieval("text", "audio")
    metric.update(
        **{"source_features": eye[:2], "source_ids": torch.tensor([0, 7]), "source_rows": torch.arange(2)},
        **{"target_features": eye[[1, 0]] + 0.5, "target_ids": torch.tensor([0, 9]), "target_rows": torch.arange(2)},
    )
    result = metric.compute()
    assert result["text_to_audio/mean_rank"] == 2  # audio 9 is a candidate of text 0, and wins
    assert result["audio_to_text/mean_rank"] == 2  # only audio 0 asks


@METRICS
def test_no_data_and_one_sided_data_are_named(kind) -> None:
    metric = kind("text", "audio")
    with pytest.warns(UserWarning, match="before the"), pytest.raises(ValueError, match="no rows of 'text'"):
        metric.compute()
    metric.update(**take(rows(), [0, 1], []))
    with pytest.raises(ValueError, match=f"{kind.__name__}: no rows of 'audio'; call update"):
        metric.compute()
    metric.update(**take(rows(), [], [5, 6]))
    with pytest.raises(ValueError, match="no id in common"):
        metric.compute()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"source_features": torch.ones(TEXT, 16).long()}, TypeError, "text features: got torch.int64"),
        ({"target_features": torch.ones(AUDIO)}, ValueError, r"audio features: got shape \(12,\)"),
        ({"source_ids": torch.ones(TEXT)}, TypeError, "text ids: got torch.float32, expected int64"),
        ({"target_rows": torch.arange(3)}, ValueError, r"audio rows: got shape \(3,\), expected \(12,\)"),
    ],
)
def test_malformed_updates_are_refused(change, error, words) -> None:
    with pytest.raises(error, match=words):
        PairedRetrieval("text", "audio").update(**(rows() | change))


@METRICS
def test_nan_features_are_refused_by_modality(kind) -> None:
    data = rows()
    data["target_features"][2] = torch.nan
    metric = kind("text", "audio")
    metric.update(**data)
    with pytest.raises(ValueError, match=r"audio features: 1 of 12 rows \(first: row 2\) have NaN"):
        metric.compute()


def test_one_modality_is_no_pair() -> None:
    with pytest.raises(ValueError, match="'audio' twice"):
        ModalityGap("audio", "audio")


def test_generation_distance_is_that_of_the_functions_whatever_the_batches() -> None:
    data = rows()
    metric = GenerationDistance()
    metric.update(**take(data, range(0, 20), range(5)))
    metric.update(**take(data, range(15, TEXT), range(3, AUDIO)))  # some rows come twice
    x, y = (data[f"{side}_features"].double() for side in ("source", "target"))
    found = metric.compute()
    assert found["frechet"].item() == pytest.approx(frechet_distance(x, y), rel=1e-5)
    assert found["kad"].item() == pytest.approx(kernel_audio_distance(x, y), rel=1e-4)
    one = GenerationDistance()
    one.update(**take(data, [0], range(AUDIO)))
    with pytest.raises(ValueError, match="got 1 row"):
        one.compute()
