"""The networks: where they begin, when they stop, and that they learn what no linear map can."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import CCABridge, MLPBridge, RidgeBridge
from diffgap_lightning.bridges.mlp import contrastive_loss, regression_loss

unit = torch.nn.functional.normalize


def linear_world(n=60, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 4, generator=g)
    sides = [unit(latent @ torch.randn(4, d, generator=g) + 0.5 * torch.randn(n, d, generator=g)) for _ in range(2)]
    return {"text": sides[0], "audio": sides[1]}, {"text": torch.arange(n), "audio": torch.arange(n)}


def quadratic_world(n=1000, seed=0):
    """Audio shows the products of the text's coordinates: uncorrelated with it, and determined by it."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 4, generator=g)
    i, j = torch.triu_indices(4, 4, offset=1)
    sides = {"text": z, "audio": z[:, i] * z[:, j]}
    embeddings = {m: unit(side + 0.05 * torch.randn(side.shape, generator=g)) for m, side in sides.items()}
    return embeddings, {m: torch.arange(n) for m in embeddings}


def r1(bridge, rows):
    scores = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
    return float((scores.argmax(1) == torch.arange(len(scores))).float().mean())


def test_without_steps_it_is_cca_and_ridge():
    embeddings, ids = linear_world()
    bridge = MLPBridge(max_steps=0, width=8).fit(embeddings, ids)
    score = {"source": "text", "target": "audio"}
    cca = CCABridge().fit(embeddings, ids).score(embeddings["text"], embeddings["audio"], **score)
    torch.testing.assert_close(bridge.score(embeddings["text"], embeddings["audio"], **score), cca)
    ridge = RidgeBridge().fit(embeddings, ids).refine(embeddings["text"], **score)
    torch.testing.assert_close(bridge.refine(embeddings["text"], **score), ridge)


def test_noise_that_only_looks_like_pairs_is_not_learned():
    g = torch.Generator().manual_seed(0)
    embeddings = {m: unit(torch.randn(80, 16, generator=g)) for m in ("text", "audio")}
    ids = {m: torch.arange(80) for m in embeddings}
    asked = []
    bridge = MLPBridge(
        width=32, max_steps=400, patience=40, progress=lambda steps: asked.append(iter(steps)) or asked[-1]
    )
    bridge.fit(embeddings, ids)
    contrast, regression = bridge.steps["audio", "text"]
    assert regression <= 40
    for best, steps in zip((contrast, regression), asked, strict=False):
        assert 400 - len(list(steps)) == best + 40  # training went on for `patience` steps


def test_it_learns_what_no_linear_map_can():
    embeddings, ids = quadratic_world()
    fit, new = ({m: x[part] for m, x in embeddings.items()} for part in (slice(0, 800), slice(800, 1000)))
    fit_ids = {m: i[:800] for m, i in ids.items()}
    bridge = MLPBridge(width=48, max_steps=160, dropout=0.0, learning_rate=3e-3, batch_size=256).fit(fit, fit_ids)
    ridge = RidgeBridge().fit(fit, fit_ids)
    assert min(bridge.steps["audio", "text"]) > 0
    assert r1(bridge, new) > r1(ridge, new) + 0.1
    direction = {"source": "text", "target": "audio"}
    cosine = [float((b.refine(new["text"], **direction) * new["audio"]).sum(1).mean()) for b in (bridge, ridge)]
    assert cosine[0] > cosine[1] + 0.1


def test_a_random_start_has_no_closed_form_in_it():
    embeddings, ids = linear_world(n=100)
    bridge = MLPBridge(start="random", width=32, max_steps=80, learning_rate=3e-3, dropout=0.0).fit(embeddings, ids)
    assert not bridge._get("tower_linear:text->audio").any()
    assert not bridge._get("regression_linear:text->audio").any()
    assert bridge._get("tower_out:text->audio").shape == (32, 8)
    assert bridge._get("centred_weight:audio->text") == 0
    assert r1(bridge, embeddings) > 0.1


def test_another_seed_gives_other_networks_and_the_same_seed_the_same():
    embeddings, ids = linear_world()
    a, b, c = (
        MLPBridge(start="random", width=8, max_steps=20, seed=s).fit(embeddings, ids).state_dict() for s in (0, 0, 1)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["tower_w1:text->audio"], c["tower_w1:text->audio"])


def test_progress_sees_the_steps():
    seen = []

    def watch(steps):
        for step in steps:
            seen.append(step)
            yield step

    MLPBridge(width=8, max_steps=3, held_out=0, progress=watch).fit(*linear_world())
    assert seen == [1, 2, 3] * 2


def test_contrastive_loss_is_the_hand_written_one_and_twins_are_no_negatives():
    g = torch.Generator().manual_seed(0)
    x, y, f, h = (torch.randn(4, 5, generator=g) for _ in range(4))
    ids = torch.tensor([1, 2, 2, 3])
    s = 7.0 * (unit(f) @ unit(h).T + 0.5 * unit(x) @ unit(y).T)
    total = 0.0
    for i in range(4):
        allowed = [j for j in range(4) if j == i or ids[j] != ids[i]]
        total -= float(s[i, i] - torch.logsumexp(s[i, allowed], 0)) / 4
        total -= float(s[i, i] - torch.logsumexp(s[allowed, i], 0)) / 4
    loss = contrastive_loss(0.5)(x, y, f, h, ids, torch.tensor(7.0).log())
    assert float(loss) == pytest.approx(total / 2, rel=1e-5)


def test_regression_loss_is_zero_at_the_truth():
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    ids, scale = torch.arange(4), torch.zeros(())
    assert float(regression_loss(x, y, 2 * y, x, ids, scale)) == pytest.approx(0, abs=1e-6)
    assert float(regression_loss(x, y, -y, x, ids, scale)) == pytest.approx(2, abs=1e-6)
