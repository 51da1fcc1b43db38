"""The refiner: where it starts, what it keeps of its input, how it scores, what it saves and what it refuses."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.bridges import CentreBridge, RidgeBridge
from diffgap_lightning.functional.retrieval import recall_at_k, retrieval_ranks
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner_config import RefinerConfig

TA = {"source": "text", "target": "audio"}
AT = {"source": "audio", "target": "text"}
SAMPLERS = ("dpmpp_2m", "ddim", "ddpm")
DIM = 16


def rows(
    n: int = 160, seed: int = 0, dims: dict[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unit rows of each modality, made of shared latents by a map of its own, and their ids."""
    dims = dims or {"text": DIM, "audio": DIM}
    world, g = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    latent, embeddings = torch.randn(n, 6, generator=g), {}
    common = torch.randn(6, DIM, generator=world)
    for modality, dim in dims.items():
        own, offset = torch.randn(6, dim, generator=world), 3 * torch.randn(dim, generator=world)
        shared = latent @ common if dim == DIM else 0
        noise = torch.randn(n, dim, generator=g)
        embeddings[modality] = normalize(shared + torch.tanh(latent @ own) + offset + noise, dim=1)
    return embeddings, dict.fromkeys(dims, torch.arange(n) + 7)


def excite(refiner: DiffGAPRefiner, seed: int = 0) -> DiffGAPRefiner:
    """Stand for training: give every network weights that are not zero."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in refiner.cdm.named_parameters():
        parameter.data.copy_((0.05 if ".output." in name else 0.3) * torch.randn(parameter.shape, generator=g))
    return refiner


@cache
def _measured(rank: int | str, trained: bool) -> DiffGAPRefiner:
    refiner = DiffGAPRefiner.measure(*rows(), rank=rank, width=16, depth=1, dropout=0.3)
    return excite(refiner) if trained else refiner


@pytest.fixture
def refiner() -> DiffGAPRefiner:
    """Shared, so tests must not change it; full rank, with networks that add something."""
    return _measured("full", True)


@pytest.fixture
def untrained() -> DiffGAPRefiner:
    return _measured("full", False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the bridge whose options take long to choose."""
    monkeypatch.setattr("diffgap_lightning.refiner._BRIDGES", {"centre": CentreBridge, "ridge": RidgeBridge})


@pytest.fixture
def own() -> DiffGAPRefiner:
    """A copy that a test may change."""
    shared = _measured("full", True)
    return DiffGAPRefiner.from_state(vars(shared.config), shared.state_dict())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


# ---- refine: the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"strength": 0.0}, {"strength": 1.0}, {"num_samples": 3}], ids=str)
def test_refine_returns_unit_rows_in_the_callers_dtype_and_leaves_the_input_alone(refiner, dtype, options) -> None:
    x = rows(n=5, seed=1)[0]["text"].to(dtype)
    before = x.clone()
    y = refiner.refine(x, **TA, **options, generator=generator())
    assert y.shape == ((5, 3, DIM) if "num_samples" in options else (5, DIM))
    assert (y.dtype, y.device) == (x.dtype, x.device)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(y.double().norm(dim=-1), torch.ones(y.shape[:-1]).double(), atol=tolerance, rtol=0)
    assert torch.equal(x, before)
    assert not y.requires_grad


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_the_length_of_the_input_does_not_matter(refiner, scale) -> None:
    x = rows(n=5, seed=1)[0]
    for options in ({"strength": 0.0}, {"strength": 0.5}, {}):
        same = [refiner.refine(k * x["text"], **TA, **options, generator=generator()) for k in (1.0, scale)]
        torch.testing.assert_close(*same, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        refiner.score(x["text"], scale * x["audio"], **TA), refiner.score(x["text"], x["audio"], **TA),
        atol=1e-5, rtol=0,
    )  # fmt: skip
    torch.testing.assert_close(refiner.start_energy(scale * x["text"], **TA), refiner.start_energy(x["text"], **TA))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_generator_decides_everything_and_the_global_one_is_left_alone(refiner, sampler) -> None:
    x = rows(n=4, seed=1)[0]["text"]
    before = torch.get_rng_state()
    results = [
        refiner.refine(x, **TA, strength=0.8, sampler=sampler, num_steps=3, generator=generator(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-3
    assert torch.equal(torch.get_rng_state(), before)


def test_strength_0_needs_no_noise(refiner) -> None:
    before = torch.get_rng_state()
    refiner.refine(rows(n=4)[0]["text"], **TA, strength=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_belong_to_their_row_and_differ(refiner) -> None:
    x = rows(n=6, seed=1)[0]["text"]
    still = refiner.refine(x, **TA, strength=0.0, num_samples=4)
    assert torch.equal(still, refiner.refine(x, **TA, strength=0.0)[:, None].expand(-1, 4, -1))
    samples = refiner.refine(x, **TA, strength=0.3, num_samples=40, generator=generator())
    assert (samples[:, 0] - samples[:, 1]).abs().max() > 1e-3
    start = refiner.refine(x, **TA, strength=0.0)
    nearest = torch.einsum("bsd,cd->bsc", samples, start).mean(1).argmax(1)  # rows b, c; samples s; dimensions d
    assert torch.equal(nearest, torch.arange(6))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_from_noise_is_the_posterior_mean(own, sampler) -> None:
    own.config = replace(own.config, blend=0.0, restore=dict.fromkeys(own.config.restore, 1.0))
    x = rows(n=20, seed=1)[0]["text"]
    mean = own.refine(x, **TA, start="posterior_mean", strength=0.0)
    one = own.refine(x, **TA, strength=1.0, num_steps=1, sampler=sampler, generator=generator())
    # The input of that step is noise, of which the estimate at t = 1 knows nothing but through the network.
    assert cosine(one, mean).min() > 0.95
    many = own.refine(x, **TA, strength=1.0, num_steps=20, sampler=sampler, generator=generator())
    assert cosine(many, mean).mean() < cosine(one, mean).mean()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_network_samples_have_the_gaussian_posteriors_moments(untrained, sampler) -> None:
    x = rows(n=1, seed=1)[0]["text"]
    closed = untrained.cdm_of("text", "audio").closed_form
    n, num_steps = 2000, 120 if sampler == "ddpm" else 40  # DDPM's variance is short by its step's length
    z = closed.mean(untrained.space.encode(x, "text"))
    y = untrained.refine(
        x, **TA, strength=1.0, num_samples=n, num_steps=num_steps, sampler=sampler, generator=generator()
    )[0]  # fmt: skip
    # Undo the final normalisation: the offset is known up to its row's length, fixed by the coordinates' mean norm.
    drawn = normalize(
        untrained.space.mean("audio")
        + untrained.space.offset(z + torch.randn(n, DIM, generator=generator(5)) @ _root(closed), "audio"),
        dim=1,
    )
    torch.testing.assert_close(y.mean(0), drawn.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(y.var(0).sum(), drawn.var(0).sum(), rtol=0.1, atol=0)


def _root(closed) -> Tensor:
    """A square root of the conditional covariance, `(R, R)`."""
    return closed.variance[0].sqrt()[:, None] * closed.basis[0].T


def test_guidance_1_is_the_default_and_0_ignores_the_condition(refiner) -> None:
    x = rows(n=8, seed=1)[0]["text"]
    base = [refiner.refine(x, **TA, strength=1.0, guidance_scale=g, generator=generator()) for g in (None, 1.0, 3.0)]
    assert torch.equal(base[0], base[1])
    assert (base[0] - base[2]).abs().max() > 1e-2
    blind = [refiner.refine(x[k:], **TA, strength=1.0, guidance_scale=0.0, generator=generator()) for k in (0, 1)]
    # The same noise, other conditions: only the start's share of the signal at t = 1, under 1 %, can differ.
    torch.testing.assert_close(blind[0][:7], blind[1][:7], atol=0.05, rtol=0)
    seeing = [refiner.refine(x[k:], **TA, strength=1.0, generator=generator()) for k in (0, 1)]
    assert (seeing[0][:7] - seeing[1][:7]).abs().max() > 0.2


def test_dropout_is_off_in_a_refiner_that_was_measured_or_loaded(own) -> None:
    assert not own.training
    assert not _measured("full", False).training


# ---- refine: where it starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "other"), [(TA, "text"), (AT, "audio")])
def test_strength_0_alone_is_the_centred_input(refiner, way, other) -> None:
    bridge = CentreBridge().fit(*rows())
    x = rows(n=30, seed=1)[0][other]
    assert (refiner.refine(x, **way, strength=0.0) - bridge.refine(x, **way)).abs().max() <= 1e-6


@pytest.mark.parametrize(("way", "other"), [(TA, "text"), (AT, "audio")])
@pytest.mark.parametrize("rank", ["full", 5])
def test_the_posterior_mean_start_is_the_restored_blend(way, other, rank) -> None:
    refiner = _measured(rank, True)
    x = rows(n=30, seed=1)[0][other].double()
    s, t = (
        {k: v.double() for k, v in (("mean", refiner.space.mean(m)), ("basis", refiner.space.basis(m)))}
        for m in way.values()
    )
    scale_s, scale_t = (float(refiner.space.scale(m)) for m in way.values())
    condition = (x - s["mean"]) @ s["basis"] / scale_s
    with torch.no_grad():
        mean = refiner.cdm_of(**way).posterior_mean(condition.float()).double()
    blend, restore = refiner.config.blend, refiner.config.restore["->".join(way.values())]
    offset = restore * ((1 - blend) * scale_t * mean @ t["basis"].T + blend * (x - s["mean"]))
    expected = normalize(t["mean"] + offset, dim=1)
    found = refiner.refine(x, **way, start="posterior_mean", strength=0.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_start_is_restored_to_unit_mean_square_where_it_was_measured_and_where_it_is_calibrated(own) -> None:
    untrained, (x, ids) = _measured("full", False), rows()
    for way in (TA, AT):
        factor = untrained.config.restore[f"{way['source']}->{way['target']}"]
        energy = untrained.start_energy(x[way["source"]], **way)
        assert energy.shape == (160,)
        torch.testing.assert_close(factor**2 * energy.mean(), torch.tensor(1.0))
    x, ids = rows(n=60, seed=2)
    own.calibrate(x, ids)
    for way in (TA, AT):
        factor = own.config.restore[f"{way['source']}->{way['target']}"]
        offset = factor * own._blend(normalize(x[way["source"]]), **way)
        torch.testing.assert_close(
            own.space.coordinates(offset, way["target"]).square().mean(), torch.tensor(1.0), rtol=1e-4, atol=0
        )


def test_before_training_the_posterior_mean_is_ridge(untrained) -> None:
    plain = DiffGAPRefiner.from_state(vars(untrained.config), untrained.state_dict())
    plain.config = replace(plain.config, blend=0.0, restore=dict.fromkeys(plain.config.restore, 1.0))
    bridge = RidgeBridge().fit(*rows())
    for way in (TA, AT):
        x = rows(n=30, seed=1)[0][way["source"]]
        found = plain.refine(x, **way, start="posterior_mean", strength=0.0)
        torch.testing.assert_close(found, bridge.refine(x, **way), atol=1e-4, rtol=0)


def test_from_pure_noise_the_start_no_longer_matters(refiner) -> None:
    x = rows(n=20, seed=1)[0]["text"]

    def apart(strength: float) -> Tensor:
        ends = [
            refiner.refine(x, **TA, strength=strength, start=start, num_steps=20, generator=generator())
            for start in ("source", "posterior_mean")
        ]
        return (ends[0] - ends[1]).norm(dim=1)

    assert apart(0.0).mean() > 0.1
    assert apart(1.0).max() < 0.02
    assert apart(0.0).mean() > apart(0.5).mean() > apart(1.0).mean()


@pytest.mark.parametrize("start", ["source", "posterior_mean"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_outside_the_basis_the_start_stays(start, strength) -> None:
    refiner = _measured(5, True)
    x, basis = rows(n=20, seed=1)[0]["text"], refiner.space.basis("audio")
    begin, end = (refiner.refine(x, **TA, start=start, strength=s, generator=generator()) for s in (0.0, strength))
    outside = [v - v @ basis @ basis.T for v in (begin, end)]
    assert cosine(*outside).min() > 1 - 1e-5  # up to the length that normalisation changes
    assert (begin @ basis - end @ basis).norm(dim=1).mean() > 0.1


def test_the_default_start_and_strength_are_the_configurations(own) -> None:
    x = rows(n=6, seed=1)[0]["text"]
    own.config = replace(own.config, start="source", strength=0.4, num_steps=3, sampler="ddim")
    named = own.refine(x, **TA, start="source", strength=0.4, num_steps=3, sampler="ddim", generator=generator())
    assert torch.equal(own.refine(x, **TA, generator=generator()), named)
    own.config = replace(own.config, start="posterior_mean", strength=0.0)
    assert torch.equal(own.refine(x, **TA), own.refine(x, **TA, start="posterior_mean", strength=0.0))
    assert torch.equal(own.refine(x, **TA, strength=0.0), own.refine(x, **TA, start="source", strength=0.0))


# ---- other shapes of data --------------------------------------------------------------------------------------------


def test_modalities_of_different_dimension() -> None:
    x, ids = rows(dims={"text": 10, "audio": DIM})
    refiner = excite(DiffGAPRefiner.measure(x, ids, rank="full", width=16, depth=1))
    assert {"ridge", "cca"} <= set(refiner.bridges) <= {"ridge", "cca", "procrustes"}
    assert refiner.refine(x["text"][:4], **TA, generator=generator()).shape == (4, DIM)
    assert refiner.refine(x["audio"][:4], **AT, num_samples=2, generator=generator()).shape == (4, 2, 10)
    assert refiner.score(x["text"][:4], x["audio"][:7], **TA).shape == (4, 7)
    refiner.calibrate(x, ids)
    torch.testing.assert_close(
        refiner.config.restore["text->audio"] ** 2 * refiner.start_energy(x["text"], **TA).mean(), torch.tensor(1.0)
    )
    for options in ({"start": "source"}, {"strength": 0.4}, {"strength": 0.0}):
        with pytest.raises(ValueError, match=r"text \(10-d\) onto audio \(16-d\).*start='posterior_mean'") as error:
            refiner.refine(x["text"][:4], **TA, **options)
        assert "\n" not in str(error.value)


def test_three_modalities_and_several_pairs() -> None:
    x, ids = rows(n=90, dims={"text": DIM, "audio": DIM, "video": 12})
    ids["audio"] = ids["audio"].repeat_interleave(2)  # two clips for every text
    x["audio"] = normalize(x["audio"].repeat_interleave(2, 0) + 0.05 * torch.randn(180, DIM, generator=generator()))
    pairs = [("text", "audio"), ("video", "audio")]
    refiner = excite(DiffGAPRefiner.measure(x, ids, pairs, width=16, depth=1))
    assert refiner.directions == (("text", "audio"), ("audio", "text"), ("video", "audio"), ("audio", "video"))
    for source, target in refiner.directions:
        y = refiner.refine(x[source][:3], source=source, target=target, generator=generator())
        assert y.shape == (3, refiner.config.dims[target])
    before = refiner.config.fusion
    refiner.calibrate(x, ids)
    assert set(refiner.config.fusion) == set(before) == {"text->audio", "video->audio"}
    assert set(refiner.config.restore) == {"->".join(d) for d in refiner.directions}
    with pytest.raises(ValueError, match="source='text', target='video': this refiner knows text->audio, audio->text"):
        refiner.refine(x["text"], source="text", target="video")


def test_what_no_pair_names_is_not_measured(quick) -> None:
    x, ids = rows(n=40, dims=dict.fromkeys(("text", "audio", "video"), DIM))
    assert set(DiffGAPRefiner.measure(x, ids, [("text", "audio")], width=8).config.dims) == {"text", "audio"}


@pytest.mark.parametrize(
    ("modalities", "pairs"),
    [
        (("audio", "text"), (("text", "audio"),)),
        (("audio", "video", "text"), (("text", "audio"), ("video", "audio"))),
        (("video", "text"), (("text", "video"),)),
    ],
)
def test_the_default_pairs_end_in_audio(quick, modalities, pairs) -> None:
    x, ids = rows(n=40, dims=dict.fromkeys(modalities, DIM))
    assert DiffGAPRefiner.measure(x, ids, width=8, depth=0).config.pairs == pairs


def test_a_bounded_number_of_pairs_is_always_the_same(quick) -> None:
    closed = [
        DiffGAPRefiner.measure(*rows(), width=8, depth=0, max_pairs=k).cdm_of("text", "audio").closed_form.weight
        for k in (60, 60, 1000)
    ]
    assert torch.equal(closed[0], closed[1])
    assert not torch.equal(closed[0], closed[2])


# ---- what is refused -------------------------------------------------------------------------------------------------


def broken(change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(rows(n=4, seed=1)[0]["text"].clone())


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
def test_unusable_rows_are_refused_in_one_line(refiner, change, error, words, use) -> None:
    bad, audio = broken(change), rows(n=4)[0]["audio"]
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
def test_options_out_of_range_are_refused_in_one_line(refiner, options, words) -> None:
    with pytest.raises(ValueError, match=words) as error:
        refiner.refine(rows(n=3)[0]["text"], **{**TA, **options})
    assert "\n" not in str(error.value)


def test_a_modality_outside_the_pair_is_refused(refiner) -> None:
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
        ({"embeddings": {k: 2 * v for k, v in rows()[0].items()}}, "L2 norm different from 1"),
    ],
    ids=["few ids", "many ids", "no ids", "no common id", "no such modality", "nothing", "not unit"],
)
def test_unusable_training_rows_are_refused(change, words) -> None:
    embeddings, ids = rows()
    with pytest.raises(ValueError, match=words) as error:
        DiffGAPRefiner.measure(**{"embeddings": embeddings, "ids": ids, "width": 8, **change})
    assert "\n" not in str(error.value)


# ---- score -----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_product_of_the_features_and_the_weighted_sum_of_the_components(refiner) -> None:
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


def test_components_are_the_bridges_and_both_directions(refiner) -> None:
    x = rows(n=12, seed=1)[0]
    found = {m: refiner.components(x[m], modality=m, pair=("text", "audio")) for m in x}
    assert list(found["text"]) == list(found["audio"]) == [
        "centre", "ridge", "procrustes", "cca", "forward", "backward"
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


def test_both_directions_of_a_pair_score_alike(refiner) -> None:
    x = rows(n=12, seed=1)[0]
    forth, back = refiner.score(x["text"], x["audio"][:5], **TA), refiner.score(x["audio"][:5], x["text"], **AT)
    torch.testing.assert_close(forth, back.T)


def test_no_row_depends_on_the_others(refiner) -> None:
    x = rows(n=12, seed=1)[0]
    whole = refiner.score(x["text"], x["audio"], **TA)
    some = torch.tensor([9, 2, 4])
    torch.testing.assert_close(refiner.score(x["text"], x["audio"][some], **TA), whole[:, some])
    torch.testing.assert_close(refiner.score(x["text"][some], x["audio"], **TA), whole[some])
    noise = refiner.refine(x["text"], **TA, start="posterior_mean", strength=0.0)
    torch.testing.assert_close(refiner.refine(x["text"][some], **TA, start="posterior_mean", strength=0.0), noise[some])


def test_scores_are_float32_under_autocast_and_from_half_precision(refiner) -> None:
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
def test_the_calibrated_score_is_never_worse_there_than_a_bridge(own, seed) -> None:
    n = (12, 30, 70, 120)[seed]
    x, ids = rows(n=n, seed=10 + seed)
    ids = {"text": ids["text"] // (1 + seed % 2), "audio": ids["audio"] // (1 + seed % 2)}  # pairs, or two by two
    own.calibrate(x, ids)
    weights = own.config.fusion["text->audio"]
    assert min(weights.values()) >= 0
    assert sum(weights.values()) == pytest.approx(1, abs=1e-6)

    def r1(model) -> float:
        found = 0.0
        for way in (TA, AT):
            features = [model.score_features(x[m], modality=m, **TA) for m in way.values()]
            ranks = retrieval_ranks(*features, *(ids[m] for m in way.values()))
            found += recall_at_k(ranks.best, 1) / 2
        return found

    assert r1(own) >= max(r1(bridge) for bridge in own.bridges.values())


def test_calibrating_changes_the_fusion_and_restore_alone_and_works_in_inference_mode(own) -> None:
    before = {k: v.clone() for k, v in own.state_dict().items()}
    x, ids = rows(n=30, seed=3)
    with torch.inference_mode():
        own.calibrate(x, ids)
    first = own.config
    own.config = replace(first, fusion=_measured("full", True).config.fusion)
    own.calibrate(x, ids)
    assert own.config == first  # deterministic, whatever the weights were
    assert replace(first, fusion={}, restore={}) == replace(_measured("full", True).config, fusion={}, restore={})
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())


# ---- the checkpoint folder -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(own, tmp_path: Path) -> Path:
    own.calibrate(*rows(n=40, seed=2))  # weights that no decimal writes exactly
    own.config = replace(own.config, encoder="encoder-1")
    return own.save_pretrained(tmp_path / "refiner")


def rewrite(folder: Path, **changes: object) -> None:
    """Change the record, or, under "config", the configuration, and keep the record's digest true."""
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["config"].update(changes.pop("config", {}))
    record["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps(record | changes))


def test_a_refiner_comes_back_bit_equal(own, folder: Path) -> None:
    before = torch.get_rng_state()
    loaded = DiffGAPRefiner.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == own.config
    assert not loaded.training
    state = loaded.state_dict()
    assert set(state) == set(own.state_dict())
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in own.state_dict().items())
    x = rows(n=9, seed=1)[0]
    for options in ({}, {"strength": 0.7, "num_samples": 2, "guidance_scale": 1.5, "sampler": "ddpm"}):
        pair = [r.refine(x["text"], **TA, **options, generator=generator()) for r in (own, loaded)]
        assert torch.equal(*pair)
    assert torch.equal(own.score(x["text"], x["audio"], **TA), loaded.score(x["text"], x["audio"], **TA))


def test_other_tensors_may_be_saved_in_place_of_the_present_ones(own, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in own.state_dict().items()}
    excite(own, seed=9)
    loaded = DiffGAPRefiner.from_pretrained(own.save_pretrained(tmp_path / "averaged", state))
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


def test_another_encoder_is_refused(folder: Path) -> None:
    assert DiffGAPRefiner.from_pretrained(folder, encoder="encoder-1").config.encoder == "encoder-1"
    with pytest.raises(ValueError, match="in the space of encoder 'encoder-1', got 'encoder-2'; use that encoder"):
        DiffGAPRefiner.from_pretrained(folder, encoder="encoder-2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema_version 2, this version reads 1 to 1; upgrade"),
        ({"kind": "RidgeBridge"}, "holds a RidgeBridge, expected a DiffGAPRefiner"),
        ({"config": {"width": 24}}, "the tensors do not fit the configuration .size mismatch"),
        ({"config": {"depth": 2}}, "the tensors do not fit the configuration .Missing key"),
        ({"config": {"width": "__import__('os').system('false')"}}, 'width: got "__import__'),
        ({"config": {"start": "posterior"}}, "start: got 'posterior'"),
        ({"config": {"prediction": "x1"}}, "prediction: got 'x1'"),
        ({"config": {"pairs": [["text", "video"]]}}, "pairs: got"),
        ({"config": {"bridges": {}}}, "the tensors do not fit the configuration .Unexpected key"),
        ({"config": {"bridges": {"os.system": {}}}}, "do not know os.system"),
        ({"config": {"restore": {"audio->text": 1.0}}}, "restore, fusion or bridges lack or do not know text->audio"),
        ({"config": {"fusion": {}}}, "restore, fusion or bridges lack or do not know text->audio"),
        ({"config": {"later": 1}}, "the configuration does not fit this version .*'later'"),
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_refused_in_one_line(folder: Path, changes, words) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=words) as error:
        DiffGAPRefiner.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_missing_field_is_refused(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    del record["config"]["dims"]
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not fit this version .*'dims'"):
        DiffGAPRefiner.from_pretrained(folder)


def test_altered_and_truncated_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="the file was altered or truncated"):
            DiffGAPRefiner.from_pretrained(folder)
    tensors = load_file(_restored(path, whole))
    tensors.pop("space.text_mean")
    save_file(tensors, path)
    rewrite(folder)
    with pytest.raises(ValueError, match="the tensors do not fit the configuration .*space.text_mean"):
        DiffGAPRefiner.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="expected a folder written by save_pretrained"):
        DiffGAPRefiner.from_pretrained(folder)


def _restored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Canary:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_loading_executes_nothing(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    rewrite(folder, config={"encoder": f"__import__('pathlib').Path({str(canary)!r}).touch()"})
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        DiffGAPRefiner.from_pretrained(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it would have shown
