"""Where refining starts, what is left of the start, and what it needs of the modalities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.bridges import CentreBridge, RidgeBridge
from diffgap_lightning.refiner import DiffGAPRefiner

TA = {"source": "text", "target": "audio"}
AT = {"source": "audio", "target": "text"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@pytest.mark.parametrize(("way", "other"), [(TA, "text"), (AT, "audio")])
def test_strength_0_alone_is_the_centred_input(rows, refiner, way, other) -> None:
    bridge = CentreBridge().fit(*rows())
    x = rows(n=30, seed=1)[0][other]
    assert (refiner.refine(x, **way, strength=0.0) - bridge.refine(x, **way)).abs().max() <= 1e-6


@pytest.mark.parametrize(("way", "other"), [(TA, "text"), (AT, "audio")])
@pytest.mark.parametrize("measured", ["refiner", "low_rank"])
def test_the_posterior_mean_start_is_the_restored_blend(rows, way, other, measured, request) -> None:
    refiner = request.getfixturevalue(measured)
    x = rows(n=30, seed=1)[0][other].double()
    s, t = (
        {k: v.double() for k, v in (("mean", refiner.space.mean(m)), ("basis", refiner.space.basis(m)))}
        for m in way.values()
    )
    scale_s, scale_t = (float(refiner.space.scale(m)) for m in way.values())
    condition = (x - s["mean"]) @ s["basis"] / scale_s
    with torch.no_grad():
        mean = refiner.cdm_of(**way).posterior_mean(condition.float()).double()
    kernel = len(refiner.cdm_of(**way).closed_form.anchors) > 0
    assert refiner.config.blend is None  # the default: 0.3, and 0 where the mean is a kernel regression
    blend, restore = 0.0 if kernel else 0.3, refiner.config.restore["->".join(way.values())]
    offset = restore * ((1 - blend) * scale_t * mean @ t["basis"].T + blend * (x - s["mean"]))
    expected = normalize(t["mean"] + offset, dim=1)
    found = refiner.refine(x, **way, start="posterior_mean", strength=0.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    energy = (offset / restore @ t["basis"] / scale_t).square().mean(1)
    torch.testing.assert_close(refiner.start_energy(x, **way).double(), energy, rtol=1e-4, atol=0)


def test_the_start_is_restored_to_unit_mean_square_where_it_was_measured_or_calibrated(rows, own, quick) -> None:
    other, ids = rows(n=60, seed=2)
    own.calibrate(other, ids)
    measured = DiffGAPRefiner.measure(*rows(), rank="full", width=16, few_pairs=0)
    for refiner, x in ((measured, rows()[0]), (own, other)):
        for way in (TA, AT):
            factor = refiner.config.restore["->".join(way.values())]
            energy = refiner.start_energy(x[way["source"]], **way)
            assert energy.shape == (len(x["text"]),)
            torch.testing.assert_close(factor**2 * energy.mean(), torch.tensor(1.0))


def test_of_few_pairs_the_start_is_restored_for_new_rows(rows, quick) -> None:
    # Of 30 pairs a kernel regression predicts its own rows with more variance than it predicts any others.
    new, energies = rows(n=2000, seed=9)[0], []
    for seed in range(4):
        refiner = DiffGAPRefiner.measure(*rows(n=30, seed=seed), rank=5, width=8, depth=0)
        for way in (TA, AT):
            factor = refiner.config.restore["->".join(way.values())]
            energies.append(factor**2 * refiner.start_energy(new[way["source"]], **way).mean().item())
    assert sum(energies) / len(energies) == pytest.approx(1, abs=0.03)


def test_before_training_the_posterior_mean_is_ridge(rows, untrained) -> None:
    plain = DiffGAPRefiner.from_state(vars(untrained.config), untrained.state_dict())
    plain.config = replace(plain.config, blend=0.0, restore=dict.fromkeys(plain.config.restore, 1.0))
    bridge = RidgeBridge().fit(*rows())
    for way in (TA, AT):
        x = rows(n=30, seed=1)[0][way["source"]]
        found = plain.refine(x, **way, start="posterior_mean", strength=0.0)
        torch.testing.assert_close(found, bridge.refine(x, **way), atol=1e-4, rtol=0)


def test_from_pure_noise_the_start_no_longer_matters(rows, refiner) -> None:
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
def test_outside_the_basis_the_start_stays(low_rank, rows, start, strength) -> None:
    x, basis = rows(n=20, seed=1)[0]["text"], low_rank.space.basis("audio")
    begin, end = (low_rank.refine(x, **TA, start=start, strength=s, generator=generator()) for s in (0.0, strength))
    outside = [v - v @ basis @ basis.T for v in (begin, end)]
    assert cosine(*outside).min() > 1 - 1e-5  # up to the length that normalisation changes
    assert (begin @ basis - end @ basis).norm(dim=1).mean() > 0.1


def test_the_default_start_and_strength_are_the_configurations(rows, own) -> None:
    x = rows(n=6, seed=1)[0]["text"]
    own.config = replace(own.config, start="source", strength=0.4, num_steps=3, sampler="ddim")
    named = own.refine(x, **TA, start="source", strength=0.4, num_steps=3, sampler="ddim", generator=generator())
    assert torch.equal(own.refine(x, **TA, generator=generator()), named)
    own.config = replace(own.config, start="posterior_mean", strength=0.0)
    assert torch.equal(own.refine(x, **TA), own.refine(x, **TA, start="posterior_mean", strength=0.0))
    assert torch.equal(own.refine(x, **TA, strength=0.0), own.refine(x, **TA, start="source", strength=0.0))
