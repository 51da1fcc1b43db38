"""What `refine` promises whatever it starts from: unit rows, an untouched input, noise from its generator alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

TA = {"source": "text", "target": "audio"}
SAMPLERS = ("dpmpp_2m", "ddim", "ddpm")
DIM = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"strength": 0.0}, {"strength": 1.0}, {"num_samples": 3}], ids=str)
def test_refine_returns_unit_rows_in_the_callers_dtype_and_leaves_the_input_alone(
    rows, refiner, dtype, options
) -> None:
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
def test_the_length_of_the_input_does_not_matter(rows, refiner, scale) -> None:
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
def test_a_generator_decides_everything_and_the_global_one_is_left_alone(rows, refiner, sampler) -> None:
    x = rows(n=4, seed=1)[0]["text"]
    before = torch.get_rng_state()
    results = [
        refiner.refine(x, **TA, strength=0.8, sampler=sampler, num_steps=3, generator=generator(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-3
    assert torch.equal(torch.get_rng_state(), before)


def test_strength_0_needs_no_noise(rows, refiner) -> None:
    before = torch.get_rng_state()
    refiner.refine(rows(n=4)[0]["text"], **TA, strength=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_belong_to_their_row_and_differ(rows, refiner) -> None:
    x = rows(n=6, seed=1)[0]["text"]
    still = refiner.refine(x, **TA, strength=0.0, num_samples=4)
    assert torch.equal(still, refiner.refine(x, **TA, strength=0.0)[:, None].expand(-1, 4, -1))
    samples = refiner.refine(x, **TA, strength=0.3, num_samples=40, generator=generator())
    assert (samples[:, 0] - samples[:, 1]).abs().max() > 1e-3
    start = refiner.refine(x, **TA, strength=0.0)
    nearest = torch.einsum("bsd,cd->bsc", samples, start).mean(1).argmax(1)  # rows b, c; samples s; dimensions d
    assert torch.equal(nearest, torch.arange(6))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_from_noise_is_the_posterior_mean(rows, own, sampler) -> None:
    own.config = replace(own.config, blend=0.0, restore=dict.fromkeys(own.config.restore, 1.0))
    x = rows(n=20, seed=1)[0]["text"]
    mean = own.refine(x, **TA, start="posterior_mean", strength=0.0)
    one = own.refine(x, **TA, strength=1.0, num_steps=1, sampler=sampler, generator=generator())
    # The input of that step is noise, of which the estimate at t = 1 knows nothing but through the network.
    assert cosine(one, mean).min() > 0.95
    many = own.refine(x, **TA, strength=1.0, num_steps=20, sampler=sampler, generator=generator())
    assert cosine(many, mean).mean() < cosine(one, mean).mean()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_network_samples_have_the_gaussian_posteriors_moments(rows, untrained, sampler) -> None:
    x = rows(n=1, seed=1)[0]["text"]
    closed = untrained.cdm_of("text", "audio").closed_form
    n, num_steps = 2000, 120 if sampler == "ddpm" else 40  # DDPM's variance is short by its step's length
    z = closed.mean(untrained.space.encode(x, "text"))
    y = untrained.refine(
        x, **TA, strength=1.0, num_samples=n, num_steps=num_steps, sampler=sampler, generator=generator()
    )[0]  # fmt: skip
    # The same posterior, drawn directly.
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


def test_guidance_1_is_the_default_and_0_ignores_the_condition(rows, refiner) -> None:
    x = rows(n=8, seed=1)[0]["text"]
    base = [refiner.refine(x, **TA, strength=1.0, guidance_scale=g, generator=generator()) for g in (None, 1.0, 3.0)]
    assert torch.equal(base[0], base[1])
    assert (base[0] - base[2]).abs().max() > 1e-2
    blind = [refiner.refine(x[k:], **TA, strength=1.0, guidance_scale=0.0, generator=generator()) for k in (0, 1)]
    # The same noise, other conditions: only the start's share of the signal at t = 1, under 1 %, can differ.
    torch.testing.assert_close(blind[0][:7], blind[1][:7], atol=0.05, rtol=0)
    seeing = [refiner.refine(x[k:], **TA, strength=1.0, generator=generator()) for k in (0, 1)]
    assert (seeing[0][:7] - seeing[1][:7]).abs().max() > 0.2


def test_dropout_is_off_in_a_refiner_that_was_measured_or_loaded(untrained, own) -> None:
    assert not own.training
    assert not untrained.training


def test_noise_may_be_given_instead_of_drawn(rows, own) -> None:
    x = rows(n=9, seed=1)[0]["text"]
    width = own.config.ranks["audio"]
    noise = torch.randn(9, width, generator=torch.Generator().manual_seed(5))
    options = {"source": "text", "target": "audio", "strength": 0.7}
    given = own.refine(x, **options, noise=noise)
    assert torch.equal(given, own.refine(x, **options, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(own.refine(x[4:], **options, noise=noise[4:]), given[4:])
    with pytest.raises(ValueError, match=rf"noise: got \(9, {width - 1}\), expected \(9, {width}\)"):
        own.refine(x, **options, noise=noise[:, 1:])
    with pytest.raises(ValueError, match="noise: got some beside several sources"):
        own.refine({"text": x}, target="audio", noise=noise)
