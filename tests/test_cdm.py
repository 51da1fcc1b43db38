"""The module of one direction: the closed form before training, consistent between x0, eps and v, guided, batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.prediction import from_x0
from diffgap_lightning.diffusion.samplers import sample_dpmpp_2m
from diffgap_lightning.diffusion.schedule import NoiseSchedule, sampling_times
from diffgap_lightning.gaussian import GaussianDenoiser

KINDS = ("x0", "eps", "v")
C, T = 4, 3


def pairs(n: int = 80) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    condition = torch.randn(n, C, generator=g)
    return condition, condition @ torch.randn(C, T, generator=g) + torch.randn(n, T, generator=g)


def module(kind: str = "x0", trained: bool = False, schedule: str = "cosine") -> ContrastiveDiffusion:
    """A module in inference; `trained` stands for any network that does not return zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPDenoiser(T, C, width=16, depth=1)
        if trained:
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return ContrastiveDiffusion(GaussianDenoiser.fit(*pairs()), network, NoiseSchedule(schedule), kind).eval()


def noisy(n: int = 8, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and condition; the times span the range."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, T, generator=g), torch.linspace(0.01, 1, n), torch.randn(n, C, generator=g)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [None, torch.arange(8) % 3 > 0])
def test_before_training_it_is_the_gaussian_denoiser(kind, schedule, keep) -> None:
    cdm, (x_t, t, condition) = module(kind, schedule=schedule), noisy()
    alpha, sigma = (w[:, None] for w in cdm.schedule.alpha_sigma(t))
    mean = cdm.closed_form.mean(condition, keep)
    expected = mean + cdm.closed_form.residual(x_t, mean, alpha, sigma, keep)
    torch.testing.assert_close(cdm(x_t, t, condition, keep), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_added_to_the_closed_form_in_the_quantity_that_it_predicts(kind) -> None:
    cdm, (x_t, t, condition) = module(kind, trained=True), noisy()
    alpha, sigma = (w[:, None] for w in cdm.schedule.alpha_sigma(t))
    mean = cdm.closed_form.mean(condition)
    residual = cdm.closed_form.residual(x_t, mean, alpha, sigma)
    correction = cdm.network(residual, mean, cdm.schedule.log_snr(t), condition, None)
    assert correction.abs().max() > 0.1
    outputs = [from_x0(x0, kind, x_t, alpha, sigma) for x0 in (cdm(x_t, t, condition), mean + residual)]
    torch.testing.assert_close(outputs[0] - outputs[1], correction, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_mean_is_the_ridge_map_before_training(kind) -> None:
    cdm, condition = module(kind), noisy()[2]
    torch.testing.assert_close(cdm.posterior_mean(condition), condition @ cdm.closed_form.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_mean_is_the_one_step_estimate_from_no_signal(kind) -> None:
    cdm, condition = module(kind, trained=True), noisy()[2]
    expected = cdm(torch.zeros(8, T), torch.ones(8), condition)
    assert torch.equal(cdm.posterior_mean(condition), expected)
    blind = cdm.closed_form.mean(condition)
    assert (cdm.posterior_mean(condition) - blind).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_extrapolates_from_the_dropped_condition_to_the_kept_one(scale) -> None:
    cdm, (x_t, _, condition) = module(trained=True), noisy()
    t = torch.tensor(0.6)
    kept = cdm(x_t, t.expand(8), condition)
    dropped = cdm(x_t, t.expand(8), condition, torch.zeros(8, dtype=torch.bool))
    expected = dropped + scale * (kept - dropped)
    torch.testing.assert_close(cdm.denoiser(condition, scale)(x_t, t), expected, rtol=1e-5, atol=1e-5)
    assert (kept - dropped).abs().max() > 0.1


def test_guidance_zero_does_not_see_the_condition() -> None:
    cdm, (x_t, _, condition) = module(trained=True), noisy()
    t = torch.tensor(0.6)
    assert torch.equal(cdm.denoiser(condition, 0.0)(x_t, t), cdm.denoiser(condition.flip(0), 0.0)(x_t, t))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_a_row_of_a_batch_of_many(kind) -> None:
    cdm, (x_t, t, condition) = module(kind, trained=True), noisy()
    keep = torch.arange(8) % 2 == 0
    alone = [cdm(x_t[i : i + 1], t[i : i + 1], condition[i : i + 1], keep[i : i + 1]) for i in range(8)]
    # At t = 1 the network's rounding is divided by alpha (1 / 150) where it predicts eps.
    torch.testing.assert_close(cdm(x_t, t, condition, keep), torch.cat(alone), rtol=1e-4, atol=1e-3)
    means = [cdm.posterior_mean(condition[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(cdm.posterior_mean(condition), torch.cat(means), rtol=1e-4, atol=1e-3)


def test_sampling_an_untrained_module_draws_from_the_gaussian_posterior() -> None:
    cdm, n = module(), 4000
    condition = noisy()[2][:1].expand(n, -1)
    x = torch.randn(n, T, generator=torch.Generator().manual_seed(2))
    out = sample_dpmpp_2m(cdm.denoiser(condition), x, cdm.schedule, sampling_times(60))
    basis, variance = cdm.closed_form.basis[0], cdm.closed_form.variance[0]
    covariance = (basis * variance) @ basis.T
    spread = covariance.diagonal()
    # The start is N(0, I) for alpha mean + ..., and alpha is 1 / 150: a bias of less than 2 % of the mean.
    mean = condition[0] @ cdm.closed_form.weight
    assert ((out.mean(0) - mean).abs() < 4 * (spread / n).sqrt() + 0.02 * mean.abs().max()).all()
    error = ((spread[:, None] * spread + covariance**2) / n).sqrt()
    assert ((out.T.cov() - covariance).abs() < 4 * error + 0.02 * spread.max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_under_autocast_keeps_the_input_at_low_noise_to_single_precision(kind) -> None:
    cdm, (x_t, _, condition) = module(kind), noisy()
    t = torch.full((8,), 0.01)
    expected = cdm(x_t, t, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cdm(x_t, t, condition), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_network_but_not_the_closed_form(kind) -> None:
    cdm, (x_t, t, condition) = module(kind, trained=True), noisy()
    cdm(x_t, t, condition, torch.arange(8) % 2 == 0).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in cdm.network.parameters())
    assert not list(cdm.closed_form.parameters())


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction: got 'score'"):
        module("score")
