from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.evaluation.comparison import compare_methods

BOTH = (("text", "audio"), ("audio", "text"))


@dataclass
class Table:
    embeddings: dict[str, Tensor]
    ids: dict[str, Tensor]


class Noisy:
    """Scores by the rows plus noise of a given size; produces the rows times -1 or 1."""

    def __init__(self, noise: float, sign: float = 1.0, directions=BOTH) -> None:
        self.noise, self.sign, self.directions = noise, sign, directions

    def refine(self, embedding, *, source, target, generator=None):
        return normalize(self.sign * embedding + 1e-3 * torch.randn(embedding.shape, generator=generator), dim=1)

    def score_features(self, embedding, *, modality, source, target):
        g = torch.Generator().manual_seed(hash_of(modality))
        return normalize(embedding + self.noise * torch.randn(embedding.shape, generator=g), dim=1)


def hash_of(name: str) -> int:
    return sum(map(ord, name))


@pytest.fixture
def table() -> Table:
    """30 clips with one audio row and two captions each; a caption equals its clip's row up to a little noise."""
    g = torch.Generator().manual_seed(0)
    audio = normalize(torch.randn(30, 16, generator=g), dim=1)
    text = normalize(audio.repeat_interleave(2, 0) + 0.1 * torch.randn(60, 16, generator=g), dim=1)
    ids = torch.arange(100, 130)
    return Table({"text": text, "audio": audio}, {"text": ids.repeat_interleave(2), "audio": ids})


def by_name(records, direction="text_to_audio"):
    return {r["method"]: r for r in records if r["direction"] == direction}


def test_figures_agree_with_a_matrix_written_out(table: Table) -> None:
    records = by_name(compare_methods({"a": Noisy(0.2)}, table, bootstrap=20))
    model = Noisy(0.2)
    q, g = (model.score_features(table.embeddings[m], modality=m, source="text", target="audio") for m in table.ids)
    score, own = q @ g.T, table.ids["text"][:, None] == table.ids["audio"]
    rank = 1 + (score > score.masked_fill(~own, -9).amax(1, keepdim=True)).sum(1)
    assert records["a"]["r1"] == pytest.approx((rank == 1).double().mean().item())
    assert records["a"]["mean_rank"] == pytest.approx(rank.double().mean().item())
    assert 0.3 < records["a"]["r1"] < 1
    assert (records["a"]["n_query"], records["a"]["n_gallery"]) == (60, 30)
    true = (table.embeddings["text"] * table.embeddings["audio"].repeat_interleave(2, 0)).sum(1).mean()
    assert records["a"]["cosine"] == pytest.approx(true.item(), abs=5e-3)


def test_every_record_has_the_agreed_keys_and_is_json(table: Table) -> None:
    records = compare_methods({"a": Noisy(0.2), "b": Noisy(0.1)}, table, bootstrap=20, optimum=torch.randn(60, 30))
    figures = {"r1", "r5", "r10", "median_rank", "mean_rank", "map10", "cosine", "mmd2", "frechet"}
    for record in records:
        assert {"method", "direction", "r1_ci", "cosine_ci", "n_query", "n_gallery", "seed"} | figures <= set(record)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    names = ["a", "b", "optimum"]
    assert [(r["direction"], r["method"]) for r in records] == [
        (d, n) for d in ("text_to_audio", "audio_to_text") for n in names
    ]


def test_the_optimum_is_read_in_both_directions(table: Table) -> None:
    own = (table.ids["text"][:, None] == table.ids["audio"]).double()
    own[0] = 1 - own[0]  # one caption is wrong about every clip
    records = compare_methods({"a": Noisy(2.0)}, table, bootstrap=20, optimum=own)
    assert by_name(records)["optimum"]["r1"] == pytest.approx(59 / 60)
    assert by_name(records, "audio_to_text")["optimum"]["r1"] == 1.0
    assert by_name(records)["optimum"]["cosine"] is None


def test_the_same_method_twice_differs_by_nothing_and_a_worse_one_by_something(table: Table) -> None:
    models = {"good": Noisy(0.1), "twin": Noisy(0.1), "bad": Noisy(3.0), "new": Noisy(0.1)}
    records = by_name(compare_methods(models, table, bootstrap=100, bridges=["twin", "bad"]))
    assert {r["best_bridge"] for r in records.values()} == {"twin"}
    assert records["new"]["r1_minus_best_bridge"] == 0
    assert records["new"]["r1_minus_best_bridge_ci"] == [0, 0]  # paired draws: no noise at all
    low, high = records["bad"]["r1_minus_best_bridge_ci"]
    assert low <= records["bad"]["r1_minus_best_bridge"] <= high < 0


def test_intervals_hold_the_figure_and_depend_on_the_seed_alone(table: Table) -> None:
    first, again, other = (compare_methods({"a": Noisy(0.2)}, table, bootstrap=200, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first[0]["r1_ci"] != other[0]["r1_ci"]
    for r in first:
        assert r["r1_ci"][0] < r["r1"] < r["r1_ci"][1]
        assert r["cosine_ci"][0] < r["cosine"] < r["cosine_ci"][1]


def test_produced_rows_are_compared_with_true_rows(table: Table) -> None:
    records = by_name(compare_methods({"same": Noisy(0.1), "opposite": Noisy(0.1, sign=-1.0)}, table, bootstrap=10))
    assert records["opposite"]["cosine"] == pytest.approx(-records["same"]["cosine"], abs=1e-2)
    some = by_name(compare_methods({"same": Noisy(0.1)}, table, bootstrap=10, max_gap_rows=20))
    assert some["same"]["mmd2"] != records["same"]["mmd2"]
    assert some["same"]["cosine"] == records["same"]["cosine"]


def test_a_query_without_a_positive_stays_a_candidate_only(table: Table) -> None:
    table.ids["audio"] = table.ids["audio"].clone()
    table.ids["audio"][:3] = torch.tensor([1, 2, 3])
    records = compare_methods({"a": Noisy(0.1)}, table, bootstrap=10)
    assert (by_name(records)["a"]["n_query"], by_name(records)["a"]["n_gallery"]) == (54, 30)
    assert (by_name(records, "audio_to_text")["a"]["n_query"]) == 27


def test_text_as_the_source_comes_first(table: Table) -> None:
    records = compare_methods({"a": Noisy(0.1, directions=BOTH[::-1])}, table, bootstrap=2)
    assert [r["direction"] for r in records] == ["text_to_audio", "audio_to_text"]


def test_progress_sees_every_measurement(table: Table) -> None:
    seen: list[object] = []
    compare_methods({"a": Noisy(0.1), "b": Noisy(0.1)}, table, bootstrap=2, progress=lambda x: seen.extend(x) or x)
    assert len(seen) == 4


def test_what_cannot_be_compared_is_refused(table: Table) -> None:
    with pytest.raises(ValueError, match="no models"):
        compare_methods({}, table)
    with pytest.raises(ValueError, match="no direction that all of a, b know"):
        compare_methods({"a": Noisy(0, directions=BOTH[:1]), "b": Noisy(0, directions=BOTH[1:])}, table)
    table.ids["audio"] = table.ids["audio"] + 1000
    with pytest.raises(ValueError, match="no id in common"):
        compare_methods({"a": Noisy(0.1)}, table, bootstrap=2)
