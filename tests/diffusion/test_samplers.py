"""Samplers driven by oracles: denoisers that return the exact E[x0 | x_t] of a known distribution.

With an oracle a sampler has no model error left, so what comes out must be the known distribution, up to the error of
taking finitely many steps and of drawing finitely many samples.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from diffgap_lightning.diffusion.samplers import sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_named
from diffgap_lightning.diffusion.schedule import NoiseSchedule, sampling_times

SCHEDULES = {name: NoiseSchedule(name) for name in ("cosine", "linear")}
COSINE = SCHEDULES["cosine"]
MEAN = torch.tensor([1.5, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.2, 0.6], [0.6, 0.5]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samplers(seed: int = 0) -> dict:
    """Every sampler as a function of (denoise, x, schedule, times), the random ones with a generator of their own."""
    return {
        "ddpm": partial(sample_ddpm, generator=seeded(seed)),
        "ddim 0": partial(sample_ddim, eta=0.0),
        "ddim 0.5": partial(sample_ddim, eta=0.5, generator=seeded(seed)),
        "ddim 1": partial(sample_ddim, eta=1.0, generator=seeded(seed)),
        "dpmpp": sample_dpmpp_2m,
    }


NAMES = tuple(samplers())
DETERMINISTIC = ("ddim 0", "dpmpp")


def gaussian_oracle(schedule: NoiseSchedule, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE):
    """E[x0 | x_t] for x0 ~ N(mean, covariance): mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        gain = alpha * torch.linalg.solve(alpha**2 * covariance + sigma**2 * EYE, covariance)
        return mean + (x_t - alpha * mean) @ gain

    return denoise


def point_oracle(point: Tensor):
    return lambda x_t, t: point.expand_as(x_t)


def gaussian_marginal(n: int, t: float, schedule: NoiseSchedule, seed: int = 1) -> Tensor:
    """n exact draws of x_t for x0 ~ N(MEAN, COVARIANCE)."""
    noise = torch.randn(2, n, 2, generator=seeded(seed), dtype=torch.float64)
    x0 = MEAN + noise[0] @ torch.linalg.cholesky(COVARIANCE).T
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64))
    return alpha * x0 + sigma * noise[1]


def times(num_steps: int, start: float = 1.0) -> Tensor:
    return sampling_times(num_steps, start).double()


def affine_map(sample, denoise, schedule: NoiseSchedule, at: Tensor) -> tuple[Tensor, Tensor]:
    """(A, b) of a deterministic sampler with an affine oracle: it returns x A + b."""
    b = sample(denoise, torch.zeros(1, 2, dtype=torch.float64), schedule, at)
    return sample(denoise, EYE, schedule, at) - b, b[0]


def flow_error(sample, at: Tensor, schedule: NoiseSchedule) -> float:
    """Distance from the exact solution of the probability flow for Gaussian data, from the first time to the last.

    The flow takes alpha mean + V^1/2 z to alpha_s mean + V_s^1/2 z, where V = alpha^2 C + sigma^2 I.
    """
    values, vectors = torch.linalg.eigh(COVARIANCE)
    (alpha, alpha_s), (sigma, sigma_s) = schedule.alpha_sigma(at[[0, -1]])
    growth = (alpha_s**2 * values + sigma_s**2) / (alpha**2 * values + sigma**2)
    exact = (vectors * growth.sqrt()) @ vectors.T
    a, b = affine_map(sample, gaussian_oracle(schedule), schedule, at)
    return ((a - exact).norm() + (b - (alpha_s * MEAN - alpha * MEAN @ exact)).norm()).item()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_a_known_point_is_reached_exactly(name, num_steps, schedule) -> None:
    point = torch.tensor([3.0, -1.0])
    x = torch.randn(5, 2, generator=seeded(9))
    out = samplers()[name](point_oracle(point), x, schedule, sampling_times(num_steps))
    torch.testing.assert_close(out, point.expand(5, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_steps", "start"), [(400, 1.0), (1000, 1.0), (20, 1e-3), (50, 0.01)])
def test_tiny_steps_stay_finite_and_accurate_in_single_precision(name, num_steps, start, schedule) -> None:
    # Times closer together than the clip of log_snr near t = 1, and so close to 0 that 1 - alpha_bar rounds to 0.
    point = torch.tensor([3.0, -1.0])
    x = torch.randn(5, 2, generator=seeded(9)) if start == 1 else point.expand(5, 2)
    out = samplers()[name](point_oracle(point), x, schedule, sampling_times(num_steps, start))
    torch.testing.assert_close(out, point.expand(5, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_gaussian_data_come_out_with_their_mean_and_covariance(name, schedule) -> None:
    n = 20_000
    x = gaussian_marginal(n, 1.0, schedule)
    out = samplers()[name](gaussian_oracle(schedule), x, schedule, times(100))
    # Four standard errors of a mean and of an entry of a covariance, and 1 % of bias from 100 steps.
    spread = COVARIANCE.diagonal()
    assert ((out.mean(0) - MEAN).abs() < 4 * (spread / n).sqrt() + 0.01).all()
    error = ((spread[:, None] * spread + COVARIANCE**2) / n).sqrt()
    assert ((out.T.cov() - COVARIANCE).abs() < 4 * error + 0.02 * spread.max()).all()


@pytest.mark.parametrize("start", [0.2, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_a_partial_start_continues_from_that_noise_level(name, start) -> None:
    n = 20_000
    out = samplers()[name](gaussian_oracle(COSINE), gaussian_marginal(n, start, COSINE), COSINE, times(40, start))
    spread = COVARIANCE.diagonal()
    assert ((out.mean(0) - MEAN).abs() < 4 * (spread / n).sqrt() + 0.01).all()
    error = ((spread[:, None] * spread + COVARIANCE**2) / n).sqrt()
    assert ((out.T.cov() - COVARIANCE).abs() < 4 * error + 0.02 * spread.max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_start_at_almost_no_noise_stays_where_it_is(name) -> None:
    x = torch.randn(20, 2, generator=seeded(2), dtype=torch.float64)
    out = samplers()[name](gaussian_oracle(COSINE), x, COSINE, times(4, 1e-4))
    torch.testing.assert_close(out, x, rtol=0, atol=2e-3)


MIXTURE_WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MIXTURE_MEANS = torch.tensor([[-3.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
MIXTURE_COVARIANCES = torch.stack([torch.diag(torch.tensor([0.3, 0.1], dtype=torch.float64)), 0.5 * COVARIANCE])


def mixture_oracle(x_t: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] for the two-component mixture: each component's answer, weighted by its posterior probability."""
    alpha, sigma = COSINE.alpha_sigma(t)
    logits, answers = [], []
    for weight, mean, covariance in zip(MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_COVARIANCES, strict=True):
        component = torch.distributions.MultivariateNormal(alpha * mean, alpha**2 * covariance + sigma**2 * EYE)
        logits.append(weight.log() + component.log_prob(x_t))
        answers.append(gaussian_oracle(COSINE, mean, covariance)(x_t, t))
    share = torch.stack(logits).softmax(0)
    return (share[..., None] * torch.stack(answers)).sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_comes_out_with_its_weights_and_its_components_moments(name) -> None:
    n = 6000
    alpha, sigma = COSINE.alpha_sigma(torch.ones((), dtype=torch.float64))
    g = seeded(3)
    component = (torch.rand(n, generator=g, dtype=torch.float64) < MIXTURE_WEIGHTS[1]).long()
    noise = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
    roots = torch.linalg.cholesky(MIXTURE_COVARIANCES)[component]
    x0 = MIXTURE_MEANS[component] + (roots @ noise[0][:, :, None])[:, :, 0]
    out = samplers()[name](mixture_oracle, alpha * x0 + sigma * noise[1], COSINE, times(100))
    side = (out[:, 0] > 0).long()  # the components are more than three standard deviations off the border
    weight = MIXTURE_WEIGHTS[1].item()
    error = math.sqrt(weight * (1 - weight) / n)
    assert side.double().mean().item() == pytest.approx(weight, abs=4 * error + 0.01)
    for k in range(2):
        rows, covariance = out[side == k], MIXTURE_COVARIANCES[k]
        spread = covariance.diagonal()
        assert ((rows.mean(0) - MIXTURE_MEANS[k]).abs() < 4 * (spread / len(rows)).sqrt() + 0.02).all()
        error = ((spread[:, None] * spread + covariance**2) / len(rows)).sqrt()
        assert ((rows.T.cov() - covariance).abs() < 4 * error + 0.03 * spread.max()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.8), (0.7, 0.3), (0.2, 0.1)])
def test_a_step_keeps_the_forward_process_of_a_known_point(name, t, s) -> None:
    # If x_t ~ q(x_t | x0) and x0 is known, then x_s ~ q(x_s | x0): mean alpha_s x0, variance sigma_s^2.
    n, point = 40_000, torch.tensor([3.0, -1.0], dtype=torch.float64)
    at = torch.tensor([t, s], dtype=torch.float64)
    (alpha, alpha_s), (sigma, sigma_s) = COSINE.alpha_sigma(at)
    x = alpha * point + sigma * torch.randn(n, 2, generator=seeded(4), dtype=torch.float64)
    out = samplers()[name](point_oracle(point), x, COSINE, at)
    assert ((out.mean(0) - alpha_s * point).abs() < 4 * sigma_s / math.sqrt(n)).all()
    assert ((out.std(0) - sigma_s).abs() < 4 * sigma_s / math.sqrt(2 * n)).all()


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.8), (0.7, 0.3), (0.2, 0.1), (0.4, 0.0)])
def test_a_ddpm_step_is_the_textbook_posterior(t, s) -> None:
    # Ho et al. 2020, equations 6 and 7, with beta = 1 - alpha_bar_t / alpha_bar_s.
    bar_t, bar_s = COSINE.alpha_bar(torch.tensor([t, s], dtype=torch.float64))
    beta = 1 - bar_t / bar_s
    x, x0 = torch.randn(2, 4, 2, generator=seeded(5), dtype=torch.float64)
    mean = (bar_s.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - bar_s) * x) / (1 - bar_t)
    variance = beta * (1 - bar_s) / (1 - bar_t)
    z = torch.randn(4, 2, generator=seeded(6), dtype=torch.float64)
    at = torch.tensor([t, s], dtype=torch.float64)
    out = sample_ddpm(lambda x_t, time: x0, x, COSINE, at, generator=seeded(6))
    torch.testing.assert_close(out, mean + variance.sqrt() * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_ddim_step_replaces_the_share_eta_of_the_implied_noise_by_fresh_noise(eta) -> None:
    # Song et al. 2021, equations 12 and 16.
    at = torch.tensor([0.7, 0.3], dtype=torch.float64)
    bar_t, bar_s = COSINE.alpha_bar(at)
    std = eta * ((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)).sqrt()
    x, x0 = torch.randn(2, 4, 2, generator=seeded(5), dtype=torch.float64)
    z = torch.randn(4, 2, generator=seeded(6), dtype=torch.float64)
    eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()
    expected = bar_s.sqrt() * x0 + (1 - bar_s - std**2).sqrt() * eps + std * z
    out = sample_ddim(lambda x_t, time: x0, x, COSINE, at, eta=eta, generator=seeded(6))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_with_all_of_the_noise_is_ddpm_path_by_path(schedule) -> None:
    x = torch.randn(50, 2, generator=seeded(7), dtype=torch.float64)
    oracle = gaussian_oracle(schedule)
    paths = [samplers(11)[name](oracle, x, schedule, times(20)) for name in ("ddpm", "ddim 1")]
    torch.testing.assert_close(*paths, rtol=1e-8, atol=1e-8)


def test_a_first_dpmpp_step_is_a_ddim_step_and_the_second_is_not() -> None:
    x = torch.randn(50, 2, generator=seeded(7), dtype=torch.float64)
    oracle = gaussian_oracle(COSINE)
    for at in ([0.9, 0.5], [1.0, 0.0]):
        at = torch.tensor(at, dtype=torch.float64)
        torch.testing.assert_close(
            sample_dpmpp_2m(oracle, x, COSINE, at), sample_ddim(oracle, x, COSINE, at), rtol=1e-10, atol=1e-10
        )
    at = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    assert (sample_dpmpp_2m(oracle, x, COSINE, at) - sample_ddim(oracle, x, COSINE, at)).abs().max() > 0.01


def test_a_second_dpmpp_step_integrates_an_estimate_that_is_linear_in_lambda() -> None:
    # With x0 = c + k lambda along the path the exact solution is x_s = (sigma_s / sigma_t) x_t + sigma_s * the integral
    # of e^lambda (c + k lambda); 2M replaces its last part by an extrapolation that is exact to second order.
    def solve(h: float) -> float:
        lam = torch.tensor([-0.5, -0.5 + h, -0.5 + 2 * h], dtype=torch.float64)
        at = torch.atan(torch.exp(-lam)) * 2 / math.pi  # cosine: lambda = -log tan(pi t / 2)
        sigma = torch.sin(at * math.pi / 2)

        def linear(x_t: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x_t, 1.0 - 2 * math.log(math.tan(math.pi * t.item() / 2)))

        start = torch.zeros(1, 1, dtype=torch.float64)
        middle = sample_dpmpp_2m(linear, start, COSINE, at[:2])
        antiderivative = lam.exp() * (1 + 2 * (lam - 1))
        exact = sigma[2] / sigma[1] * middle + sigma[2] * (antiderivative[2] - antiderivative[1])
        return (sample_dpmpp_2m(linear, start, COSINE, at) - exact).abs().item()

    assert solve(0.1) < 1e-3
    assert solve(0.1) / solve(0.05) > 6  # third order in a step


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_converges_linearly_and_dpmpp_quadratically_to_the_probability_flow(schedule) -> None:
    # Away from t = 0 and 1, where lambda is infinite, the orders show without the ends' own errors.
    steps = [torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64) for n in (40, 80, 160)]
    ddim, dpmpp = ([flow_error(sample, at, schedule) for at in steps] for sample in (sample_ddim, sample_dpmpp_2m))
    for i in range(2):
        assert 1.8 < ddim[i] / ddim[i + 1] < 2.2
        assert 3.4 < dpmpp[i] / dpmpp[i + 1] < 4.6


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_both_reach_the_end_of_the_flow_and_dpmpp_needs_fewer_steps(schedule) -> None:
    assert flow_error(sample_ddim, times(300), schedule) < 0.02
    assert flow_error(sample_dpmpp_2m, times(300), schedule) < 1e-3
    for n in (10, 20, 40):
        assert flow_error(sample_dpmpp_2m, times(n), schedule) < 0.5 * flow_error(sample_ddim, times(n), schedule)


@pytest.mark.parametrize("name", NAMES)
def test_the_callback_sees_every_step(name) -> None:
    seen = []
    x, oracle = torch.randn(3, 2, generator=seeded(8), dtype=torch.float64), gaussian_oracle(COSINE)
    out = samplers()[name](oracle, x, COSINE, times(4), callback=lambda *step: seen.append(step))
    assert [i for i, _, _, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close(torch.stack([t for _, t, _, _ in seen]), times(4)[:-1])
    assert torch.equal(seen[0][2], x)
    for _, t, x_t, x0 in seen:
        assert torch.equal(oracle(x_t, t), x0)
    torch.testing.assert_close(out, seen[-1][3])
    # Watching changes nothing.
    assert torch.equal(samplers()[name](oracle, x, COSINE, times(4)), out)


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_reproduces_and_leaves_the_global_one_and_the_start_alone(name) -> None:
    state = torch.get_rng_state()
    x = torch.randn(3, 2, generator=seeded(8), dtype=torch.float64)
    before = x.clone()
    first, again, other = (samplers(seed)[name](gaussian_oracle(COSINE), x, COSINE, times(5)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name in DETERMINISTIC)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_denoiser_calls_is_the_number_of_steps_and_the_dtype_is_kept(name) -> None:
    calls = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return torch.zeros_like(x_t)

    out = samplers()[name](denoise, torch.ones(2, 3), COSINE, sampling_times(6))
    assert len(calls) == 6
    assert out.dtype == torch.float32
    assert out.shape == (2, 3)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_outside_zero_to_one_is_refused(eta) -> None:
    with pytest.raises(ValueError, match="eta: got"):
        sample_ddim(point_oracle(MEAN), torch.zeros(1, 2), COSINE, sampling_times(2), eta=eta)


@pytest.mark.parametrize(("name", "sampler"), [("ddpm", "ddpm"), ("ddim", "ddim 0"), ("dpmpp_2m", "dpmpp")])
def test_a_sampler_s_name_is_that_of_its_function(name: str, sampler: str) -> None:
    x, times = torch.randn(5, 2, generator=seeded(3)), sampling_times(4)
    found = sample_named(name, lambda x, t: 0.5 * x, x, COSINE, times, generator=seeded())
    assert torch.equal(found, samplers()[sampler](lambda x, t: 0.5 * x, x, COSINE, times))


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler: got 'euler', expected one of dpmpp_2m, ddim, ddpm"):
        sample_named("euler", lambda x, t: x, torch.zeros(1, 2), COSINE, sampling_times(2))
