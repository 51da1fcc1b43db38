"""Ridge, restored ridge, Procrustes, raw and centre against the formulas they stand for."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import (
    CentreBridge,
    IdentityBridge,
    ProcrustesBridge,
    RestoredRidgeBridge,
    RidgeBridge,
)

unit = torch.nn.functional.normalize
D = 6


@pytest.fixture(scope="module")
def rows():
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(200, 4, generator=g)
    text = unit(latent @ torch.randn(4, D, generator=g) + 0.5 * torch.randn(200, D, generator=g) + 2)
    audio = unit(latent @ torch.randn(4, D, generator=g) + 0.5 * torch.randn(200, D, generator=g) - 2)
    return {"text": text, "audio": audio}


@pytest.fixture(scope="module")
def ids():
    return {"text": torch.arange(200), "audio": torch.arange(200)}


def centred(rows):
    return tuple(rows[m] - rows[m].mean(0) for m in ("text", "audio"))


def score(bridge, rows):
    return bridge.score(rows["text"], rows["audio"], source="text", target="audio")


def refine(bridge, rows):
    return bridge.refine(rows["text"], source="text", target="audio")


def solve(x, y, penalty):
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(D), x.T @ y)


def test_identity_returns_its_input_bit_for_bit_and_scores_by_cosine(rows, ids):
    bridge = IdentityBridge().fit(rows, ids)
    assert torch.equal(refine(bridge, rows), rows["text"])
    torch.testing.assert_close(score(bridge, rows), rows["text"] @ rows["audio"].T)
    half = rows["text"].half()
    assert torch.equal(bridge.refine(half, source="text", target="audio"), half)


def test_centre_moves_the_centroid(rows, ids):
    bridge = CentreBridge().fit(rows, ids)
    x, y = centred(rows)
    torch.testing.assert_close(refine(bridge, rows), unit(x + rows["audio"].mean(0)))
    torch.testing.assert_close(score(bridge, rows), unit(x) @ unit(y).T)


def test_ridge_refines_by_its_map_and_fuses_both_directions(rows, ids):
    bridge = RidgeBridge(penalty=3.0, centred_weight=0.7).fit(rows, ids)
    x, y = centred(rows)
    w, v = solve(x, y, 3.0), solve(y, x, 3.0)
    torch.testing.assert_close(refine(bridge, rows), unit(rows["audio"].mean(0) + x @ w))
    expected = unit(x @ w) @ unit(y).T + unit(x) @ unit(y @ v).T + 0.7 * unit(x) @ unit(y).T
    torch.testing.assert_close(score(bridge, rows), expected)


def test_pairs_count_once_each_so_that_captions_weigh_in(rows):
    """Clip 0 has its caption 30 times: the map must be that of the 229 pairs, around the mean of the 229 rows."""
    text = torch.cat([rows["text"], rows["text"][:1].expand(29, D)])
    ids = {"text": torch.cat([torch.arange(200), torch.zeros(29, dtype=torch.int64)]), "audio": torch.arange(200)}
    bridge = RidgeBridge(penalty=1.0).fit({"text": text, "audio": rows["audio"]}, ids)
    y = rows["audio"][ids["text"]] - rows["audio"].mean(0)
    torch.testing.assert_close(bridge._get("map:text->audio"), solve(text - text.mean(0), y, 1.0))


def test_scalar_restoring_gives_the_total_variance(rows, ids):
    bridge = RestoredRidgeBridge(blend=0.0, restore="scalar").fit(rows, ids)
    x, y = centred(rows)
    spread = (x @ bridge._get("map:text->audio")).square().sum()
    assert float(spread) == pytest.approx(float(y.square().sum()), rel=1e-4)


def test_transport_gives_the_whole_covariance(rows, ids):
    bridge = RestoredRidgeBridge(blend=0.0, restore="transport", shrinkage=0.0).fit(rows, ids)
    x, y = centred(rows)
    z = x @ bridge._get("map:text->audio")
    torch.testing.assert_close(z.T @ z / 200, y.T @ y / 200, atol=1e-5, rtol=1e-3)


def test_transport_under_full_shrinkage_is_the_scalar(rows, ids):
    scalar = RestoredRidgeBridge(restore="scalar").fit(rows, ids)
    shrunk = RestoredRidgeBridge(restore="transport", shrinkage=1.0).fit(rows, ids)
    torch.testing.assert_close(refine(scalar, rows), refine(shrunk, rows))


def test_blend_goes_from_restored_ridge_to_centre(rows, ids):
    x, _ = centred(rows)
    mean = rows["audio"].mean(0)
    parts = {b: RestoredRidgeBridge(blend=b).fit(rows, ids)._get("map:text->audio") for b in (0.0, 0.3, 1.0)}
    torch.testing.assert_close(parts[1.0], torch.eye(D))
    torch.testing.assert_close(parts[0.3], 0.3 * torch.eye(D) + 0.7 * parts[0.0])
    blended = RestoredRidgeBridge().fit(rows, ids)
    torch.testing.assert_close(refine(blended, rows), unit(mean + x @ parts[0.3]))


def test_procrustes_recovers_a_rotation_and_its_backward_map_is_the_transpose(rows, ids):
    q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))[0]
    turned = {"text": rows["text"], "audio": rows["text"] @ q}
    bridge = ProcrustesBridge().fit(turned, ids)
    torch.testing.assert_close(refine(bridge, turned), turned["audio"], atol=1e-5, rtol=0)
    forward, backward = bridge._get("map:text->audio"), bridge._get("map:audio->text")
    torch.testing.assert_close(forward @ backward, torch.eye(D), atol=1e-5, rtol=0)


def test_centred_cosine_is_left_out_between_unequal_dimensions(rows, ids):
    cut = {"text": rows["text"], "audio": unit(rows["audio"][:, :4])}
    scores = [score(RidgeBridge(penalty=1.0, centred_weight=w).fit(cut, ids), cut) for w in (0.0, 5.0)]
    assert torch.equal(*scores)
