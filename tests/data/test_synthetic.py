from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.data.synthetic import SyntheticWorld


def tiny(**changes: float) -> SyntheticWorld:
    parameters = {"latent_dim": 3, "num_concepts": 5, "num_modes": 2, "dim": 16, "hidden_dim": 12}
    return SyntheticWorld(1, **(parameters | changes))  # type: ignore[arg-type]


def hits(scores: Tensor) -> tuple[float, float]:
    """R@1 of aligned pairs, text to audio and audio to text; ties count in the query's favour."""
    own = scores.diagonal()
    return tuple(((scores > own.unsqueeze(1 - axis)).sum(1 - axis) == 0).float().mean().item() for axis in (0, 1))  # type: ignore[return-value]


def brute_force(world: SyntheticWorld, audio: np.ndarray, text: np.ndarray) -> float:
    """Pointwise mutual information of one pair by a loop over the components and textbook densities."""
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    d, (num_concepts, num_modes, _) = world.latent_dim, world.modes.shape
    eye = np.eye(d)
    gain, shared = world.text_gain, world.shared_std**2
    cov_a, cov_t = (shared + world.audio_noise**2) * eye, (gain**2 * shared + world.text_noise**2) * eye
    cov = np.block([[cov_a, gain * shared * eye], [gain * shared * eye, cov_t]])
    joint, of_audio, of_text = [], [], []
    for k in range(num_concepts):
        of_text.append(multivariate_normal(world.concepts[k], cov_t).logpdf(text))
        for j in range(num_modes):
            mean = world.concepts[k] + world.modes[k, j]
            of_audio.append(multivariate_normal(mean, cov_a).logpdf(audio))
            both = multivariate_normal(np.concatenate([mean, world.concepts[k]]), cov)
            joint.append(both.logpdf(np.concatenate([audio, text])))
    sizes = math.log(num_concepts * num_modes), math.log(num_concepts)
    return (logsumexp(joint) - sizes[0]) - (logsumexp(of_audio) - sizes[0]) - (logsumexp(of_text) - sizes[1])


@pytest.mark.parametrize(
    "changes", [{}, {"audio_noise": 0.02, "text_noise": 0.03, "shared_std": 0.05}, {"text_gain": -0.5}]
)
def test_the_optimum_is_the_pointwise_mutual_information(changes: dict[str, float]) -> None:
    world = tiny(**changes)
    pairs = world.sample(8, seed=0)
    pmi = world.pointwise_mutual_information(pairs.audio_latent, pairs.text_latent[:6])
    assert pmi.shape == (6, 8)
    for t in range(6):
        for a in range(8):
            expected = brute_force(world, pairs.audio_latent[a].numpy(), pairs.text_latent[t].numpy())
            assert pmi[t, a].item() == pytest.approx(expected, abs=1e-6, rel=1e-9)


def test_the_mutual_information_is_positive_and_vanishes_with_what_is_shared() -> None:
    pairs = tiny().sample(4000, seed=0)
    assert (
        tiny().pointwise_mutual_information(pairs.audio_latent[:500], pairs.text_latent[:500]).diagonal().mean() > 0.1
    )
    alone = tiny(num_concepts=1, num_modes=1, text_gain=0.0)
    pairs = alone.sample(50, seed=0)
    assert alone.pointwise_mutual_information(pairs.audio_latent, pairs.text_latent).abs().max() < 1e-9


def test_densities_integrate_to_one() -> None:
    # E[exp(-pmi)] over joint draws is the integral of p(a) p(t) over the joint's support: 1.
    world = tiny(text_gain=0.1, mode_scale=0.3)
    pairs = world.sample(40_000, seed=0)
    pmi = torch.cat(
        [
            world.pointwise_mutual_information(a, t).diagonal()
            for a, t in zip(pairs.audio_latent.split(500), pairs.text_latent.split(500), strict=True)
        ]
    )
    assert (-pmi).exp().mean().item() == pytest.approx(1, abs=0.1)


def test_latents_have_the_moments_of_the_definition() -> None:
    world = tiny(num_concepts=1, num_modes=1)
    pairs = world.sample(40_000, seed=0)
    a, t = pairs.audio_latent - world.concepts[0], pairs.text_latent - world.concepts[0]
    assert a.mean(0).abs().max() < 0.03
    np.testing.assert_allclose(a.var(0), 0.8**2 + 0.9**2, rtol=0.04)
    np.testing.assert_allclose(t.var(0), (0.8 * 0.8) ** 2 + 0.9**2, rtol=0.04)
    np.testing.assert_allclose((a * t).mean(0), 0.8 * 0.8**2, rtol=0.06)


def test_embeddings_are_unit_rows_and_pairs_are_alike() -> None:
    pairs = tiny().sample(200, seed=0)
    for rows in (pairs.audio, pairs.text):
        assert rows.dtype == torch.float32
        assert rows.shape == (200, 16)
        assert (rows.norm(dim=1) - 1).abs().max() < 1e-6
    audio, text = pairs.audio - pairs.audio.mean(0), pairs.text - pairs.text.mean(0)
    scores = text @ audio.T
    assert scores.diagonal().mean() > scores.mean() + 0.01


def test_draws_neither_read_nor_change_the_global_generators() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = tiny().sample(20, seed=(0, 3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    with torch.random.fork_rng():
        torch.manual_seed(2)
        second = tiny().sample(20, seed=(0, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.audio, tiny().sample(20, seed=(0, 4)).audio)


def test_rows_do_not_depend_on_how_many_are_embedded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny().sample(50, seed=0).audio
    monkeypatch.setattr("diffgap_lightning.data.synthetic.CHUNK", 7)
    torch.testing.assert_close(tiny().sample(50, seed=0).audio, whole)


def test_the_fingerprint_names_the_parameters() -> None:
    assert tiny().fingerprint == tiny().fingerprint
    assert len({world.fingerprint for world in (tiny(), tiny(gap=1.0), tiny(map_mix=0.0), tiny(dim=17))}) == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny(num_concepts=0), "num_concepts: got 0"),
        (lambda: tiny(audio_noise=0), "audio_noise: got 0"),
        (lambda: tiny().sample(0, 0), "n: got 0"),
    ],
)
def test_impossible_worlds_are_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.fixture(scope="module")
def default_world() -> tuple[SyntheticWorld, Tensor, Tensor, Tensor, Tensor]:
    world = SyntheticWorld()
    train, test = world.sample(10_000, seed=8), world.sample(1000, seed=7)
    unit = torch.nn.functional.normalize
    centred = unit(test.text - train.text.mean(0)) @ unit(test.audio - train.audio.mean(0)).T
    optimum = world.pointwise_mutual_information(test.audio_latent, test.text_latent)
    return world, test.text @ test.audio.T, centred, optimum, (train.audio.mean(0) - train.text.mean(0)).norm()


def test_the_default_world_has_its_reference_figures(default_world) -> None:
    _, raw, centred, optimum, gap = default_world
    assert hits(raw) == pytest.approx((0.639, 0.620), abs=0.02)
    assert hits(centred) == pytest.approx((0.656, 0.650), abs=0.02)
    assert hits(optimum) == pytest.approx((0.952, 0.952), abs=0.02)
    assert gap.item() == pytest.approx(0.557, abs=0.02)
    assert raw.diagonal().mean().item() == pytest.approx(0.412, abs=0.02)


def test_nothing_that_knows_less_than_the_latents_beats_the_optimum(default_world) -> None:
    world, raw, centred, optimum, _ = default_world
    test = world.sample(1000, seed=7)
    rivals = {
        "raw": raw,
        "centred": centred,
        "latents": -torch.cdist(test.text_latent, test.audio_latent),
        "blend": optimum + 3 * centred,
        "biased": optimum + 0.3 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)),
    }
    best = hits(optimum)
    for scores in rivals.values():
        # the same 1000 queries decide both, so a tie may fall either way by a few queries
        assert hits(scores)[0] <= best[0] + 0.005
        assert hits(scores)[1] <= best[1] + 0.005
