"""The mixture bridge on a world of concepts: its mean, score and restoration, each against what they should be."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import CCABridge, MixtureBridge, RidgeBridge
from diffgap_lightning.bridges.concepts import leading
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.functional.gap import mmd2
from diffgap_lightning.functional.retrieval import recall_at_k, retrieval_ranks

SIZES = {"latent_dim": 12, "num_concepts": 48, "num_modes": 2, "dim": 96, "hidden_dim": 64}
WORLD = SyntheticWorld(**SIZES, gap=3.0, shared_std=0.6, audio_noise=0.5, text_noise=0.5)


def rows(n: int, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    sample = WORLD.sample(n, seed=seed)
    ids = torch.arange(n)
    return {"text": sample.text, "audio": sample.audio}, {"text": ids, "audio": ids}


@pytest.fixture(scope="module")
def fitted() -> MixtureBridge:
    bridge = MixtureBridge(max_components=256).fit(*rows(6000, 0))
    assert isinstance(bridge, MixtureBridge)
    return bridge


def r1(bridge, n=500):
    new, ids = rows(n, 1)
    features = [
        bridge.score_features(new[m], modality=m, source="text", target="audio").double() for m in ("text", "audio")
    ]
    total = 0.0
    for q, g in (features, features[::-1]):
        total += float(recall_at_k(retrieval_ranks(q, g, ids["text"], ids["text"]).best, 1)) / 2
    return total


def test_concepts_are_found_and_help_where_one_gaussian_is_not_enough(fitted):
    assert fitted.num_components("text", "audio") >= 48
    cca = CCABridge(rank=96, shrinkage=0.001, power=1.0, centred_weight=0.0).fit(*rows(6000, 0))
    assert r1(fitted) > r1(cca) + 0.01


def test_the_mean_is_nearer_the_truth_than_a_ridge_map(fitted):
    ridge = RidgeBridge().fit(*rows(6000, 0))
    new, _ = rows(1000, 2)
    x = fitted.centre(new["text"], "text")
    y = fitted.centre(new["audio"], "audio")
    error = (fitted.conditional_mean("text", "audio")(x) - y).square().sum(1).mean()
    linear = (x @ ridge._get("map:text->audio") - y).square().sum(1).mean()
    assert error < 0.98 * linear


def test_one_component_is_a_linear_map_of_the_canonical_coordinates(fitted):
    bridge = MixtureBridge(max_components=1).fit(*rows(2000, 0))
    assert bridge.num_components("text", "audio") == 1
    x = torch.randn(5, 96)
    mean = bridge.conditional_mean("text", "audio")
    torch.testing.assert_close(mean(x), x @ mean.linear + mean.target)
    assert mean.target.norm() < 0.05 * mean(x).norm()


def test_the_score_is_a_log_likelihood_ratio(fitted):
    """Worked out from the density itself: differences over a gallery, where constants fall out."""
    new, _ = rows(40, 3)
    source, target = "text", "audio"
    x, y = (fitted.centre(new[m], m) for m in (source, target))
    features = fitted._likelihood(x, source, source, target) @ fitted._likelihood(y, target, source, target).T
    metric = fitted._get("metric:text->audio")
    conditional = -0.5 * torch.cdist(fitted.conditional_mean(source, target)(x) @ metric, y @ metric).square()
    parts = fitted.conditional_mean(target, source)
    component = -0.5 * torch.cdist(y @ parts.white, parts.centre).square()
    log_weight = parts.bias + 0.5 * parts.centre.square().sum(1)
    density = (component + log_weight).logsumexp(1)
    torch.testing.assert_close(features, conditional - density, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(log_weight.exp().sum(), torch.tensor(1.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("restore", ["scale", "transport"])
def test_refined_rows_have_the_spread_of_the_target(restore):
    bridge = MixtureBridge(max_components=256, restore=restore).fit(*rows(6000, 0))
    new, _ = rows(2000, 4)
    offset = bridge._offset(bridge.centre(new["text"], "text"), "text", "audio")
    target = bridge.centre(new["audio"], "audio")
    ratio = offset.square().sum(1).mean() / target.square().sum(1).mean()
    assert abs(float(ratio) - 1) < 0.05
    if restore == "transport":
        a, b = (torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[:8] for z in (offset, target))
        torch.testing.assert_close(a, b, rtol=0.2, atol=0.0)
    refined = bridge.refine(new["text"], source="text", target="audio")
    assert mmd2(refined, new["audio"]) < 0.005 < mmd2(new["text"], new["audio"])


def test_held_out_rows_choose_the_direction_that_is_told_more_surely():
    """Audio is a function of the caption's class and of much that the caption does not say."""
    g = torch.Generator().manual_seed(0)
    n, unit = 3000, torch.nn.functional.normalize
    latent = torch.randn(20, 6, generator=g)[torch.randint(20, (n,), generator=g)] * 2
    text = latent + 0.1 * torch.randn(n, 6, generator=g)
    modes = torch.randn(2, 6, generator=g)[torch.randint(2, (n,), generator=g)] * 4
    audio = torch.cat([latent + 0.1 * torch.randn(n, 6, generator=g) + modes, modes], 1)
    embeddings = {"text": unit(text + 9, dim=1), "audio": unit(audio + 9, dim=1)}
    bridge = MixtureBridge(max_components=64).fit(embeddings, {m: torch.arange(n) for m in embeddings})
    weights = dict(
        zip((("audio", "text"), ("text", "audio")), bridge._get("weights:audio->text").tolist(), strict=True)
    )
    assert weights["audio", "text"] >= weights["text", "audio"]


def test_leading_correlations_are_those_before_the_gap():
    c = torch.cat([torch.linspace(0.7, 0.5, 12), torch.linspace(0.2, 0.1, 40)])
    assert leading(c) == 12
    assert leading(c[:2]) == 2


@pytest.mark.parametrize("options", [{"max_components": 0}, {"restore": "none"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MixtureBridge(**options)
