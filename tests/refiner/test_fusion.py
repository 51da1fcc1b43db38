"""Fusion weights: what a weight means, who decides on few and on many rows, and that no rival does better."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.refiner.fusion import clearly_better, fit_weights, fit_weights_over, fuse, mean_recall

DIM = 12


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def world(n: int, noise: dict[str, float], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A gallery of n pairs; a component's features are the truth plus so much noise (infinite: nothing but noise)."""
    truth = normalize(randn(n, DIM, seed=seed), dim=1)
    source, target = {}, {}
    for k, (name, scale) in enumerate(noise.items()):
        for side, features in ((0, source), (1, target)):
            disturbance = randn(n, DIM, seed=1000 + 100 * seed + 2 * k + side) / DIM**0.5
            features[name] = normalize(disturbance if scale == np.inf else truth + scale * disturbance, dim=1)
    return source, target, torch.arange(n)


def fit(noise: dict[str, float], n: int, prior: dict[str, float], rivals=(), seed: int = 0, **options):
    source, target, ids = world(n, noise, seed)
    return fit_weights(source, target, ids, ids, prior=prior, rivals=rivals, **options)


def test_the_product_of_fused_features_is_the_weighted_sum_of_scores() -> None:
    source, target, _ = world(7, {"a": 0.5, "b": 1.0, "c": 2.0})
    weights = {"c": 2.0, "a": 0.25, "b": 0.0}
    fused = [fuse(side, weights) for side in (source, target)]
    assert fused[0].shape == (7, 2 * DIM)  # a weight of 0 costs nothing
    expected = 2.0 * source["c"] @ target["c"].T + 0.25 * source["a"] @ target["a"].T
    torch.testing.assert_close(fused[0] @ fused[1].T, expected)


def test_without_any_weight_there_is_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match="fusion: got no positive weight"):
        fuse({"a": randn(2, 3)}, {"a": 0.0})


def test_mean_recall_against_a_count_by_hand() -> None:
    source, target = randn(9, 4), randn(6, 4, seed=1)
    source_ids, target_ids = torch.tensor([0, 0, 1, 2, 2, 3, 8, 9, 1]), torch.tensor([0, 1, 1, 2, 3, 7])
    scores = (source @ target.T).numpy()
    found = []
    for s, q, g in ((scores, source_ids, target_ids), (scores.T, target_ids, source_ids)):
        hits = [i.item() in g[np.flatnonzero(row >= row.max())] for row, i in zip(s, q, strict=True) if i in g]
        found.append(np.mean(hits))
    assert mean_recall(source, target, source_ids, target_ids) == pytest.approx(np.mean(found))


def test_weights_are_a_distribution_over_all_components_and_may_be_zero() -> None:
    source, target, ids = world(200, {"good": 0.3, "harmful": 0.3, "fair": 1.0})
    target["harmful"] = -target["harmful"]
    weights = fit_weights(source, target, ids, ids, prior={"good": 1.0, "harmful": 0.1}, rivals=[])
    assert list(weights) == ["good", "harmful", "fair"]
    assert min(weights.values()) >= 0
    assert sum(weights.values()) == pytest.approx(1, abs=1e-6)
    assert weights["harmful"] == 0.0 < weights["fair"]


def test_on_few_rows_the_prior_decides_and_on_many_the_data() -> None:
    noise, prior = {"perfect": 0.0, "noise": np.inf}, {"perfect": 1.0, "noise": 3.0}
    few, some, many = (fit(noise, n, prior)["perfect"] for n in (5, 40, 400))
    assert few == pytest.approx(0.25, abs=0.08)
    assert few < some < many
    assert many > 0.8


def test_a_component_that_the_prior_does_not_know_can_be_found() -> None:
    noise = {"known": 2.0, "unknown": 0.3}
    assert fit(noise, n=5, prior={"known": 1.0})["unknown"] < 0.3
    assert fit(noise, n=400, prior={"known": 1.0})["unknown"] > 0.6


def test_only_the_ratios_of_the_prior_count() -> None:
    noise = {"a": 0.5, "b": 1.0}
    once, tenfold = (fit(noise, 30, {"a": k, "b": 2 * k}) for k in (1.0, 10.0))
    assert once == pytest.approx(tenfold, abs=1e-4)


def test_equally_good_components_share_evenly() -> None:
    source, target, ids = world(200, {"a": 1.0})
    source["b"], target["b"] = source["a"].clone(), target["a"].clone()
    weights = fit_weights(source, target, ids, ids, prior={"a": 1.0, "b": 1.0}, rivals=[])
    assert weights["a"] == pytest.approx(weights["b"], abs=1e-3)


def test_the_order_of_rows_and_the_names_of_ids_do_not_matter() -> None:
    source, target, ids = world(60, {"a": 0.5, "b": 1.5})
    prior = {"a": 1.0, "b": 1.0}
    one = fit_weights(source, target, ids, ids, prior=prior, rivals=["a"])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    mixed = {k: v[order] for k, v in source.items()}
    two = fit_weights(mixed, target, 5 * ids[order] + 3, 5 * ids + 3, prior=prior, rivals=["a"])
    assert one == pytest.approx(two, abs=1e-4)


def test_rows_without_a_partner_and_several_partners_are_no_obstacle() -> None:
    source, target, ids = world(80, {"good": 0.3, "noise": np.inf})
    source_ids = torch.cat([ids[:60] // 2, ids[60:] + 1000])
    target_ids = torch.cat([ids[:60] // 2, ids[60:] + 2000])
    weights = fit_weights(source, target, source_ids, target_ids, prior={"noise": 1.0}, rivals=["good"])
    recall = [mean_recall(fuse(source, w), fuse(target, w), source_ids, target_ids) for w in (weights, {"good": 1.0})]
    assert recall[0] >= recall[1]
    with pytest.raises(ValueError, match="fusion: got no id that both modalities share"):
        fit_weights(source, target, ids, ids + 1000, prior={"good": 1.0}, rivals=[])


def test_a_subset_of_a_large_gallery_is_always_the_same_and_keeps_the_promise() -> None:
    noise, prior = {"a": 1.0, "b": 1.2, "noise": np.inf}, {"noise": 1.0}
    source, target, ids = world(300, noise)
    global_state = torch.get_rng_state()
    weights = [fit_weights(source, target, ids, ids, prior=prior, rivals=["a", "b"], max_rows=k) for k in (40, 40, 300)]
    assert torch.equal(torch.get_rng_state(), global_state)
    assert weights[0] == weights[1] != weights[2]
    best = max(mean_recall(source[k], target[k], ids, ids) for k in ("a", "b"))
    assert mean_recall(fuse(source, weights[0]), fuse(target, weights[0]), ids, ids) >= best


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 60),
    levels=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, np.inf]), min_size=3, max_size=3),
    prior=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=3, max_size=3).filter(any),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_no_rival_is_better_on_the_rows_that_the_weights_were_fitted_on(n, levels, prior, groups, seed) -> None:
    names = ["a", "b", "c"]
    source, target, ids = world(n, dict(zip(names, levels, strict=True)), seed)
    ids = ids // groups
    weights = fit_weights(source, target, ids, ids, prior=dict(zip(names, prior, strict=True)), rivals=names)
    assert min(weights.values()) >= 0
    assert sum(weights.values()) == pytest.approx(1, abs=1e-6)
    fused = mean_recall(fuse(source, weights), fuse(target, weights), ids, ids)
    assert fused >= max(mean_recall(source[k], target[k], ids, ids) for k in names)


def test_a_rival_pulls_only_as_far_as_it_must() -> None:
    """A prior for noise alone, few rows: without a rival its weight stays, with one the fused score is as good."""
    noise, prior = {"good": 0.3, "noise": np.inf}, {"noise": 1.0}
    free, bound = fit(noise, 8, prior), fit(noise, 8, prior, rivals=["good"])
    source, target, ids = world(8, noise)
    recall = [mean_recall(fuse(source, w), fuse(target, w), ids, ids) for w in (free, bound, {"good": 1.0})]
    assert recall[0] < recall[2] <= recall[1]
    assert free["good"] < bound["good"]
    assert fit(noise, 300, {"good": 1.0}, rivals=["good"]) == fit(noise, 300, {"good": 1.0})


def test_a_lead_within_the_tolerance_is_no_reason_to_follow_a_rival() -> None:
    ahead = torch.tensor([1.0] * 52 + [0.0] * 48), torch.tensor([1.0] * 50 + [0.0] * 50)
    behind = ahead[0].roll(40), ahead[1].roll(40)  # as good, on other queries
    behind[0][45] = 0.0
    assert clearly_better(ahead, behind, 0.0)
    assert not clearly_better(ahead, behind, 1.645)
    assert clearly_better((torch.ones(100), torch.ones(100)), behind, 1.645)
    assert not clearly_better((torch.ones(1), torch.ones(1)), (torch.zeros(1), torch.zeros(1)), 1.645)  # one is none


def test_following_a_rival_is_logged(caplog) -> None:
    source, target, ids = world(100, {"good": 0.2, "noise": np.inf})
    fit_weights(source, target, ids, ids, {"noise": 1.0}, ["good"], pseudo_queries=1e6, tolerance=1.645)
    assert "good alone ranks the held-out rows better" in caplog.text
    caplog.clear()
    fit_weights(source, target, ids, ids, {"good": 1.0}, ["good"], tolerance=1.645)
    assert not caplog.text


def test_the_folds_of_one_gallery_are_ranked_each_by_itself() -> None:
    # Between the folds every candidate is a perfect distractor: only ranks within folds can tell good from noise.
    folds = [world(60, {"good": 0.5, "noise": np.inf}, seed) for seed in (0, 0)]
    galleries = [(s, t, i, i) for s, t, i in folds]
    weights = fit_weights_over(galleries, {"noise": 1.0, "good": 1.0}, ["good"])
    once = fit_weights(*galleries[0], {"noise": 1.0, "good": 1.0}, ["good"], pseudo_queries=50.0)
    assert weights == pytest.approx(once, abs=0.02)  # twice the queries count as half the prior
