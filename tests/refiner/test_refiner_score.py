"""The fused score: a product of features, blind to other rows, not worse than a bridge where it is calibrated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffgap_lightning.functional.retrieval import retrieval_ranks

TA = {"source": "text", "target": "audio"}
AT = {"source": "audio", "target": "text"}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def test_the_score_is_the_product_of_the_features_and_the_weighted_sum_of_the_components(rows, refiner) -> None:
    x = rows(n=12, seed=1)[0]
    text, audio = x["text"][:5], x["audio"]
    score = refiner.score(text, audio, **TA)
    assert score.dtype == torch.float32
    features = [refiner.score_features(v, modality=m, **TA) for v, m in ((text, "text"), (audio, "audio"))]
    torch.testing.assert_close(score, features[0] @ features[1].T)
    pair, weights = ("text", "audio"), refiner.config.fusion["text->audio"]
    parts = [refiner.components(v, modality=m, pair=pair) for v, m in ((text, "text"), (audio, "audio"))]
    expected = sum(w * parts[0][k] @ parts[1][k].T for k, w in weights.items())
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_components_are_the_bridges_and_both_directions(rows, refiner) -> None:
    x = rows(n=12, seed=1)[0]
    found = {m: refiner.components(x[m], modality=m, pair=("text", "audio")) for m in x}
    assert list(found["text"]) == list(found["audio"]) == [
        "centre", "ridge", "restored", "procrustes", "cca", "hub", "forward", "backward"
    ]  # fmt: skip
    z = {m: refiner.space.encode(x[m], m) for m in x}
    with torch.no_grad():
        forward = cosine(refiner.cdm_of("text", "audio").posterior_mean(z["text"])[:, None], z["audio"][None])
        backward = cosine(z["text"][:, None], refiner.cdm_of("audio", "text").posterior_mean(z["audio"])[None])
    for name, expected in (("forward", forward), ("backward", backward)):
        torch.testing.assert_close(found["text"][name] @ found["audio"][name].T, expected, atol=1e-5, rtol=0)
    for name, bridge in refiner.bridges.items():
        expected = bridge.score(x["text"], x["audio"], **TA)
        torch.testing.assert_close(found["text"][name] @ found["audio"][name].T, expected, atol=1e-5, rtol=0)


def test_both_directions_of_a_pair_score_alike(rows, refiner) -> None:
    x = rows(n=12, seed=1)[0]
    forth, back = refiner.score(x["text"], x["audio"][:5], **TA), refiner.score(x["audio"][:5], x["text"], **AT)
    torch.testing.assert_close(forth, back.T)


def test_no_row_depends_on_the_others(rows, refiner) -> None:
    x = rows(n=12, seed=1)[0]
    whole = refiner.score(x["text"], x["audio"], **TA)
    some = torch.tensor([9, 2, 4])
    torch.testing.assert_close(refiner.score(x["text"], x["audio"][some], **TA), whole[:, some])
    torch.testing.assert_close(refiner.score(x["text"][some], x["audio"], **TA), whole[some])
    noise = refiner.refine(x["text"], **TA, start="posterior_mean", strength=0.0)
    torch.testing.assert_close(refiner.refine(x["text"][some], **TA, start="posterior_mean", strength=0.0), noise[some])


def test_scores_are_float32_under_autocast_and_from_half_precision(rows, refiner) -> None:
    x = rows(n=12, seed=1)[0]
    exact = refiner.score(x["text"], x["audio"], **TA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = refiner.score(x["text"], x["audio"], **TA)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, exact, atol=0.02, rtol=0)  # the networks alone run in bfloat16
    half = refiner.score(x["text"].half(), x["audio"].half(), **TA)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_calibrated_score_is_not_clearly_worse_there_than_a_bridge(rows, own, seed) -> None:
    n = (12, 30, 70, 120)[seed]
    x, ids = rows(n=n, seed=10 + seed)
    ids = {"text": ids["text"] // (1 + seed % 2), "audio": ids["audio"] // (1 + seed % 2)}  # pairs, or two by two
    own.calibrate(x, ids)
    weights = own.config.fusion["text->audio"]
    assert min(weights.values()) >= 0
    assert sum(weights.values()) == pytest.approx(1, abs=1e-6)

    def hits(model) -> Tensor:
        """Of every query in both directions, `(2, n)`."""
        found = []
        for way in (TA, AT):
            features = [model.score_features(x[m], modality=m, **TA) for m in way.values()]
            found.append(retrieval_ranks(*features, *(ids[m] for m in way.values())).best <= 1)
        return torch.stack(found).double()

    for bridge in own.bridges.values():
        gain = hits(bridge) - hits(own)
        assert gain.mean() <= 1.645 * (gain.std(dim=1) / n**0.5).mean() + 1e-9  # one-sided 5 %


def test_calibrating_changes_the_fusion_and_restore_alone_and_works_in_inference_mode(refiner, rows, own) -> None:
    before = {k: v.clone() for k, v in own.state_dict().items()}
    x, ids = rows(n=30, seed=3)
    with torch.inference_mode():
        own.calibrate(x, ids)
    first = own.config
    own.config = replace(first, fusion=refiner.config.fusion)
    own.calibrate(x, ids)
    assert own.config == first  # deterministic, whatever the weights were
    assert replace(first, fusion={}, restore={}) == replace(refiner.config, fusion={}, restore={})
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())
