"""What all bridges promise: the refiner's interface, dtypes, untouched inputs, saving, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from diffgap_lightning.bridges import (
    Bridge,
    CCABridge,
    CentreBridge,
    IdentityBridge,
    MixtureBridge,
    MLPBridge,
    ProcrustesBridge,
    RestoredRidgeBridge,
    RidgeBridge,
    default_bridges,
    load_bridge,
)
from diffgap_lightning.checkpoint import save_folder

unit = torch.nn.functional.normalize
MAKERS = {
    "raw": IdentityBridge,
    "centre": CentreBridge,
    "ridge": RidgeBridge,
    "restored": RestoredRidgeBridge,
    "transport": lambda: RestoredRidgeBridge(restore="transport"),
    "procrustes": ProcrustesBridge,
    "cca": lambda: CCABridge(rank=4, shrinkage=0.1),
    "mixture": lambda: MixtureBridge(max_components=4),
    "mlp": lambda: MLPBridge(width=8, max_steps=20, batch_size=16),
}
MAPS = [name for name in MAKERS if name not in ("raw", "centre")]


def world(n=60, dims=(8, 8), seed=0, noise=0.3, modalities=("text", "audio")):
    """Rows that share a latent, each modality around its own centroid; the last 5 rows of each have no partner."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 4, generator=g)
    embeddings, ids = {}, {}
    for k, (m, d) in enumerate(zip(modalities, dims, strict=True)):
        rows = latent @ torch.randn(4, d, generator=g) + noise * torch.randn(n, d, generator=g)
        embeddings[m] = unit(rows + 3 * torch.randn(d, generator=g), dim=1)
        ids[m] = torch.arange(n)
        ids[m][-5:] += 1000 * (k + 1)
    return embeddings, ids


@pytest.fixture(scope="module", params=list(MAKERS))
def fitted(request) -> tuple[Bridge, dict]:
    embeddings, ids = world()
    return MAKERS[request.param]().fit(embeddings, ids), embeddings


def test_default_bridges_are_in_the_tables_order_and_make_new_objects():
    made = {name: make() for name, make in default_bridges().items()}
    assert list(made) == ["raw", "centre", "ridge", "restored", "procrustes", "cca", "mlp"]
    assert all(make() is not made[name] for name, make in default_bridges().items())


def test_directions_are_all_ordered_pairs(fitted):
    assert set(fitted[0].directions) == {("text", "audio"), ("audio", "text")}


def test_refined_rows_have_unit_norm_and_the_input_is_untouched(fitted):
    bridge, rows = fitted
    before = rows["text"].clone()
    out = bridge.refine(rows["text"], source="text", target="audio")
    torch.testing.assert_close(out.norm(dim=1), torch.ones(60))
    assert torch.equal(rows["text"], before)
    assert not out.requires_grad
    assert out.data_ptr() != rows["text"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_comes_back_and_arithmetic_is_float32(fitted, dtype):
    bridge, rows = fitted
    low = rows["text"].to(dtype)
    out = bridge.refine(low, source="text", target="audio")
    assert out.dtype == dtype
    expected = bridge.refine(low.float(), source="text", target="audio")
    torch.testing.assert_close(out, expected.to(dtype), atol=1e-6 if dtype == torch.float64 else 0, rtol=0)


def test_score_is_float32_and_unchanged_under_autocast(fitted):
    bridge, rows = fitted
    plain = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
    refined = bridge.refine(rows["text"], source="text", target="audio")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
        assert torch.equal(bridge.refine(rows["text"], source="text", target="audio"), refined)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_score_is_the_inner_product_of_features(fitted):
    bridge, rows = fitted
    features = [bridge.score_features(rows[m], modality=m, source="text", target="audio") for m in ("text", "audio")]
    score = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
    torch.testing.assert_close(score, features[0] @ features[1].T)


def test_score_is_the_same_asked_the_other_way_round(fitted):
    bridge, rows = fitted
    forward = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
    backward = bridge.score(rows["audio"], rows["text"], source="audio", target="text")
    torch.testing.assert_close(forward, backward.T, atol=1e-5, rtol=1e-5)


def test_score_of_a_row_does_not_depend_on_the_other_rows(fitted):
    bridge, rows = fitted
    whole = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
    part = bridge.score(rows["text"][:3], rows["audio"][:7], source="text", target="audio")
    torch.testing.assert_close(whole[:3, :7], part)


def test_sampler_options_change_nothing_and_samples_repeat(fitted):
    bridge, rows = fitted
    once = bridge.refine(rows["text"], source="text", target="audio")
    options = {"num_steps": 3, "strength": 1.0, "guidance_scale": 4.0, "generator": torch.Generator()}
    many = bridge.refine(rows["text"], source="text", target="audio", num_samples=2, **options)
    assert torch.equal(many, torch.stack([once, once], dim=1))


def test_saving_and_loading_is_bit_equal(fitted, tmp_path):
    bridge, rows = fitted
    bridge.save_pretrained(tmp_path / "bridge")
    for loaded in (load_bridge(tmp_path / "bridge"), type(bridge).from_pretrained(tmp_path / "bridge")):
        assert type(loaded) is type(bridge)
        assert loaded.directions == bridge.directions
        for m, other in (("text", "audio"), ("audio", "text")):
            a, b = (x.refine(rows[m], source=m, target=other) for x in (bridge, loaded))
            assert torch.equal(a, b)
        scores = [x.score(rows["text"], rows["audio"], source="text", target="audio") for x in (bridge, loaded)]
        assert torch.equal(*scores)


def test_fitting_twice_gives_the_same_and_leaves_the_global_seed_alone(fitted):
    bridge, rows = fitted
    embeddings, ids = world()
    state = torch.get_rng_state()
    again = type(bridge)(**bridge.options).fit(embeddings, ids)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in bridge.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_fitting_again_forgets_the_first_fit(fitted):
    bridge, _ = fitted
    fresh = type(bridge)(**bridge.options)
    fresh.fit(*world(seed=1, dims=(7, 7), modalities=("video", "text"))).fit(*world(), directions=[("text", "audio")])
    assert fresh.directions == (("text", "audio"),)
    assert fresh.state_dict().keys() == bridge.state_dict().keys()
    for name, value in bridge.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["centre", *MAPS])
def test_refining_brings_the_centroid_onto_the_targets(name):
    embeddings, ids = world(n=400, noise=0.1)
    bridge = MAKERS[name]().fit(embeddings, ids)
    mean = embeddings["audio"].mean(0)
    moved = bridge.refine(embeddings["text"], source="text", target="audio").mean(0)
    assert (moved - mean).norm() < 0.2 * (embeddings["text"].mean(0) - mean).norm()


@pytest.mark.parametrize("name", ["centre", *MAPS])
def test_every_bridge_beats_the_raw_embedding_on_new_rows(name):
    embeddings, ids = world(n=500, noise=0.3)
    fit = {m: x[:300] for m, x in embeddings.items()}
    new = {m: x[300:495] for m, x in embeddings.items()}
    bridge = MAKERS[name]().fit(fit, {m: i[:300] for m, i in ids.items()})

    def gain(a: torch.Tensor) -> float:
        return float((a * new["audio"]).sum(1).mean())

    assert gain(bridge.refine(new["text"], source="text", target="audio")) > gain(new["text"]) + 0.1


@pytest.mark.parametrize("name", MAPS)
def test_maps_work_between_unequal_dimensions(name, tmp_path):
    embeddings, ids = world(n=200, dims=(9, 6))
    bridge = MAKERS[name]().fit(embeddings, ids)
    out = bridge.refine(embeddings["text"], source="text", target="audio")
    assert out.shape == (200, 6)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(200))
    assert bridge.refine(embeddings["audio"], source="audio", target="text").shape == (200, 9)
    score = bridge.score(embeddings["text"], embeddings["audio"], source="text", target="audio")
    paired = score.diagonal()[:195].mean()
    assert paired > score.mean() + score.std()
    loaded = load_bridge(bridge.save_pretrained(tmp_path / "b"))
    assert torch.equal(loaded.score(embeddings["text"], embeddings["audio"], source="text", target="audio"), score)


@pytest.mark.parametrize("name", ["raw", "centre"])
def test_without_a_map_unequal_dimensions_are_refused(name):
    with pytest.raises(ValueError, match=r"audio has dimension 6 and text 9.*RidgeBridge"):
        MAKERS[name]().fit(*world(dims=(9, 6)))


@pytest.mark.parametrize("name", list(MAKERS))
def test_three_modalities(name):
    embeddings, ids = world(dims=(8, 8, 8), modalities=("video", "text", "audio"))
    bridge = MAKERS[name]().fit(embeddings, ids)
    assert len(bridge.directions) == 6
    for source, target in bridge.directions:
        assert bridge.refine(embeddings[source], source=source, target=target).shape == (60, 8)
        assert bridge.score(embeddings[source], embeddings[target], source=source, target=target).shape == (60, 60)


@pytest.mark.parametrize("name", list(MAKERS))
def test_many_to_many_ids(name):
    """Class prompts: few texts, many clips of each."""
    embeddings, _ = world(n=60)
    rows = {"text": embeddings["text"][:6], "audio": embeddings["audio"]}
    bridge = MAKERS[name]().fit(rows, {"text": torch.arange(6), "audio": torch.arange(60) % 6})
    assert bridge.score(rows["audio"], rows["text"], source="audio", target="text").isfinite().all()


def test_gradients_reach_the_input_but_not_the_bridge(fitted):
    bridge, rows = fitted
    x = rows["text"].clone().requires_grad_()
    bridge.refine(x, source="text", target="audio").square().sum().backward()
    assert x.grad is not None
    assert not list(bridge.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, i: e["text"].__setitem__((3, 0), float("nan")), "text: 1 of 60 rows.*NaN"),
        (lambda e, i: e["audio"].__setitem__(2, 0.0), "audio: 1 of 60 rows.*zero"),
        (lambda e, i: e["text"].mul_(2), "text: 60 of 60 rows.*different from 1"),
        (lambda e, i: i.__setitem__("text", i["text"][:-1]), r"ids of text: got \(59,\), expected \(60,\)"),
        (lambda e, i: i.pop("audio"), "ids of audio: got nothing"),
        (lambda e, i: i["text"].add_(5000), "audio and text: 0 positive pairs"),
        (lambda e, i: e.pop("audio"), r"directions: got none \(modalities: text\)"),
    ],
)
def test_unusable_rows_are_refused(change, message):
    embeddings, ids = world()
    change(embeddings, ids)
    with pytest.raises(ValueError, match=message):
        RidgeBridge().fit(embeddings, ids)


@pytest.mark.parametrize("direction", [("text", "video"), ("text", "text"), ("text",)])
def test_unusable_directions_are_refused(direction):
    with pytest.raises(ValueError, match="directions: got"):
        RidgeBridge().fit(*world(), directions=[direction])


def test_what_was_not_fitted_is_refused():
    embeddings, ids = world()
    with pytest.raises(ValueError, match="not fitted yet"):
        RidgeBridge().refine(embeddings["text"], source="text", target="audio")
    with pytest.raises(ValueError, match="not fitted yet"):
        RidgeBridge().to_parts()
    bridge = RidgeBridge().fit(embeddings, ids, directions=[("text", "audio")])
    with pytest.raises(ValueError, match="knows text->audio"):
        bridge.refine(embeddings["audio"], source="audio", target="text")


def test_wrong_calls_are_refused(fitted):
    bridge, rows = fitted
    with pytest.raises(ValueError, match="dimension 3, expected 8"):
        bridge.refine(torch.ones(2, 3), source="text", target="audio")
    with pytest.raises(ValueError, match="num_samples"):
        bridge.refine(rows["text"], source="text", target="audio", num_samples=0)
    with pytest.raises(ValueError, match="modality: got 'video'"):
        bridge.score_features(rows["text"], modality="video", source="text", target="audio")
    with pytest.raises(TypeError, match="int64"):
        bridge.refine(torch.ones(2, 8, dtype=torch.int64), source="text", target="audio")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RestoredRidgeBridge(restore="both"), "restore"),
        (lambda: RestoredRidgeBridge(blend=1.5), "blend"),
        (lambda: RestoredRidgeBridge(shrinkage=-1), "shrinkage"),
        (lambda: MLPBridge(start="warm"), "start"),
        (lambda: MLPBridge(dropout=1.0), "dropout"),
        (lambda: RidgeBridge(penalty=-1.0).fit(*world()), "penalty"),
        (lambda: CCABridge(rank=0, shrinkage=0.1).fit(*world()), "rank"),
        (lambda: CCABridge(rank=2, shrinkage=2.0).fit(*world()), "shrinkage"),
        (lambda: CCABridge(rank=2, centred_weight=-1.0).fit(*world()), "centred_weight"),
        (lambda: RidgeBridge(centred_weight=-1.0), "centred_weight"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    save_folder(tmp_path / "x", "DiffGAPRefiner", {}, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds a DiffGAPRefiner"):
        load_bridge(tmp_path / "x")
    RidgeBridge().fit(*world()).save_pretrained(tmp_path / "ridge")
    with pytest.raises(ValueError, match="holds a RidgeBridge"):
        CCABridge.from_pretrained(tmp_path / "ridge")


def test_a_configuration_or_tensors_that_do_not_fit_are_refused(tmp_path):
    config, tensors = RidgeBridge().fit(*world()).to_parts()
    json.dumps(config)
    with pytest.raises(ValueError, match="map:text->audio"):
        RidgeBridge.from_parts(config, {k: v for k, v in tensors.items() if k != "map:text->audio"})
    with pytest.raises(ValueError, match="mean:text.*expected.*9"):
        RidgeBridge.from_parts(config | {"dims": {"text": 9, "audio": 8}}, tensors)
    with pytest.raises(ValueError, match="configuration does not fit"):
        RidgeBridge.from_parts(config | {"options": {"penalti": 1}}, tensors)
    with pytest.raises(ValueError, match="configuration does not fit"):
        RidgeBridge.from_parts({"options": {}}, tensors)
