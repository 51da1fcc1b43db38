"""The closed-form denoiser against the conditional expectation of a joint Gaussian, worked out in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning import gaussian
from diffgap_lightning.functional.linear import ridge_penalty_gcv
from diffgap_lightning.gaussian import GaussianDenoiser

LOG_SNRS = (-10.0, -3.0, 0.0, 4.0, 10.0)


def pairs(n: int = 60, d_c: int = 4, d_t: int = 3, noise: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    condition = torch.randn(n, d_c, generator=g) * torch.linspace(1.5, 0.4, d_c)
    mix = torch.randn(d_t, d_t, generator=g)
    target = condition @ torch.randn(d_c, d_t, generator=g) * 0.5 + noise * torch.randn(n, d_t, generator=g) @ mix
    return condition - condition.mean(0), target - target.mean(0)


def weights(log_snr: float, n: int) -> tuple[Tensor, Tensor]:
    """alpha, sigma `(n, 1)` at a log signal-to-noise ratio."""
    level = torch.full((n, 1), log_snr, dtype=torch.float64)
    return level.sigmoid().sqrt().float(), (-level).sigmoid().sqrt().float()


def ridge_numpy(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


def leave_one_out(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Residual of each row under the map refitted without it."""
    rows = range(len(x))
    return np.stack([y[i] - x[i] @ ridge_numpy(np.delete(x, i, 0), np.delete(y, i, 0), penalty) for i in rows])


def shrunk(rows: np.ndarray) -> np.ndarray:
    """Second moment of n rows, mixed with R prior rows of the same total variance spread evenly."""
    n, dim = rows.shape
    moment = rows.T @ rows
    return (moment + dim * np.trace(moment) / n / dim * np.eye(dim)) / (n + dim)


def reference(condition: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ridge map, the residual covariance and the target covariance, by brute force."""
    x, y = condition.double().numpy(), target.double().numpy()
    penalty = ridge_penalty_gcv(condition, target)
    return ridge_numpy(x, y, penalty), shrunk(leave_one_out(x, y, penalty)), shrunk(y)


def expectation(x_t: Tensor, mean: np.ndarray, covariance: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x0 | x_t] from the joint Gaussian of (x0, x_t), blocks `cov(x0, x_t) = alpha C`, `var(x_t) = a^2 C + s^2 I`."""
    variance = alpha**2 * covariance + sigma**2 * np.eye(len(covariance))
    return mean + (x_t.double().numpy() - alpha * mean) @ np.linalg.solve(variance, alpha * covariance)


def matrix(denoiser: GaussianDenoiser, index: int) -> np.ndarray:
    basis, variance = denoiser.basis[index].double().numpy(), denoiser.variance[index].double().numpy()
    return (basis * variance) @ basis.T


@pytest.mark.parametrize("log_snr", LOG_SNRS)
@pytest.mark.parametrize("sizes", [(60, 4, 3), (60, 3, 5), (12, 6, 7)])
def test_estimates_are_the_conditional_expectation_of_the_joint_gaussian(sizes, log_snr) -> None:
    condition, target = pairs(*sizes)
    n, d_c, d_t = sizes
    w, residual_covariance, _ = reference(condition, target)
    denoiser = GaussianDenoiser.fit(condition, target)
    g = torch.Generator().manual_seed(1)
    c, x_t = torch.randn(5, d_c, generator=g), torch.randn(5, d_t, generator=g)
    alpha, sigma = weights(log_snr, 5)
    mean = denoiser.mean(c)
    np.testing.assert_allclose(mean.numpy(), c.double().numpy() @ w, atol=1e-5)
    estimate = mean + denoiser.residual(x_t, mean, alpha, sigma)
    expected = expectation(x_t, c.double().numpy() @ w, residual_covariance, alpha[0].item(), sigma[0].item())
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("log_snr", LOG_SNRS)
def test_without_a_condition_it_is_the_expectation_under_the_targets_own_covariance(log_snr) -> None:
    condition, target = pairs()
    _, _, covariance = reference(condition, target)
    denoiser = GaussianDenoiser.fit(condition, target)
    x_t, keep = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(5, dtype=torch.bool)
    alpha, sigma = weights(log_snr, 5)
    mean = denoiser.mean(condition[:5], keep)
    assert (mean == 0).all()
    estimate = denoiser.residual(x_t, mean, alpha, sigma, keep)
    expected = expectation(x_t, np.zeros(3), covariance, alpha[0].item(), sigma[0].item())
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_residual_covariance_is_that_of_explicit_leave_one_out_refits() -> None:
    condition, target = pairs(25, 5, 3)
    _, residual_covariance, target_covariance = reference(condition, target)
    denoiser = GaussianDenoiser.fit(condition, target)
    np.testing.assert_allclose(matrix(denoiser, 0), residual_covariance, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(matrix(denoiser, 1), target_covariance, rtol=1e-4, atol=1e-5)


def test_leave_one_out_predicts_the_error_on_new_pairs_where_training_residuals_do_not() -> None:
    # 40 rows and 20 dimensions: the training residuals of a least squares map show half of the variance.
    predicted, training, new = 0.0, 0.0, 0.0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        condition = torch.randn(1040, 20, generator=g)
        target = condition @ torch.randn(20, 3, generator=g) + torch.randn(1040, 3, generator=g)
        denoiser = GaussianDenoiser.fit(condition[:40], target[:40])
        error = (target - denoiser.mean(condition)).square().sum(1)
        predicted += np.trace(matrix(denoiser, 0))
        training, new = training + error[:40].mean().item(), new + error[40:].mean().item()
    assert training < 0.6 * new
    assert predicted == pytest.approx(new, rel=0.2)


def test_without_noise_the_input_comes_back_and_without_signal_the_prediction() -> None:
    condition, target = pairs()
    denoiser = GaussianDenoiser.fit(condition, target)
    x_t, mean = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), denoiser.mean(condition[:5])
    for keep in (None, torch.tensor([True, False, True, False, True])):
        mean = denoiser.mean(condition[:5], keep)
        clean = mean + denoiser.residual(x_t, mean, torch.ones(5, 1), torch.zeros(5, 1), keep)
        torch.testing.assert_close(clean, x_t, rtol=0, atol=1e-5)
        blind = denoiser.residual(x_t, mean, torch.zeros(5, 1), torch.ones(5, 1), keep)
        assert torch.equal(blind, torch.zeros(5, 3))


def test_rows_with_and_without_condition_and_of_different_levels_may_share_a_batch() -> None:
    condition, target = pairs()
    denoiser = GaussianDenoiser.fit(condition, target)
    x_t = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([True, False, True, True, False, False])
    alpha = torch.linspace(0.1, 0.9, 6)[:, None]
    sigma = (1 - alpha**2).sqrt()

    def run(rows: slice, keep: Tensor | None) -> Tensor:
        mean = denoiser.mean(condition[:6][rows], keep)
        return mean + denoiser.residual(x_t[rows], mean, alpha[rows], sigma[rows], keep)

    together = run(slice(0, 6), keep)
    for i in range(6):
        alone = run(slice(i, i + 1), None if keep[i] else keep[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_on_gaussian_pairs_its_error_is_the_posterior_variance() -> None:
    # 20 000 pairs of a known joint Gaussian: the mean squared error is trace (C^-1 + snr I)^-1, the least possible.
    n = 20_000
    condition, target = pairs(2 * n, noise=0.5)
    denoiser = GaussianDenoiser.fit(condition[:n], target[:n])
    covariance = matrix(denoiser, 0)
    for log_snr in (-3.0, 0.0, 3.0):
        alpha, sigma = weights(log_snr, n)
        x0 = target[n:]
        x_t = alpha * x0 + sigma * torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
        mean = denoiser.mean(condition[n:])
        error = (mean + denoiser.residual(x_t, mean, alpha, sigma) - x0).square().sum(1)
        least = np.trace(np.linalg.inv(np.linalg.inv(covariance) + math.exp(log_snr) * np.eye(3)))
        assert error.mean().item() == pytest.approx(least, rel=0.03)


def test_it_stays_in_single_precision_under_autocast() -> None:
    condition, target = pairs()
    denoiser = GaussianDenoiser.fit(condition, target)
    alpha, sigma = weights(8.0, 60)
    mean = denoiser.mean(condition)
    expected = denoiser.residual(target, mean, alpha, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(denoiser.mean(condition), mean)
        torch.testing.assert_close(denoiser.residual(target, mean, alpha, sigma), expected)


def test_leverages_over_chunks_of_rows_are_those_of_all(monkeypatch) -> None:
    condition, target = pairs(60)
    whole = GaussianDenoiser.fit(condition, target)
    monkeypatch.setattr(gaussian, "_CHUNK", 7)
    torch.testing.assert_close(GaussianDenoiser.fit(condition, target).variance, whole.variance)


def test_fewer_pairs_than_dimensions_still_give_a_positive_covariance() -> None:
    denoiser = GaussianDenoiser.fit(*pairs(5, 10, 8))
    assert torch.isfinite(denoiser.weight).all()
    assert (denoiser.variance > 1e-3).all()


def test_a_target_that_its_condition_determines_leaves_a_small_but_positive_variance() -> None:
    condition, _ = pairs()
    target = condition @ torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    denoiser = GaussianDenoiser.fit(condition, target)
    torch.testing.assert_close(denoiser.mean(condition), target, rtol=1e-3, atol=1e-3)
    assert (denoiser.variance[0] > 0).all()
    assert (denoiser.variance[0] < 1e-4).all()


def test_an_unfitted_one_knows_nothing_of_the_condition_and_takes_the_target_for_white() -> None:
    denoiser = GaussianDenoiser(4, 3)
    condition, x_t = pairs(5)
    alpha, sigma = weights(1.0, 5)
    mean = denoiser.mean(condition)
    assert (mean == 0).all()
    torch.testing.assert_close(denoiser.residual(x_t, mean, alpha, sigma), alpha * x_t)


def test_a_state_dict_restores_it_and_fitting_leaves_no_gradient() -> None:
    condition, target = pairs()
    denoiser = GaussianDenoiser.fit(condition.requires_grad_(), target.requires_grad_())
    assert not any(buffer.requires_grad for buffer in denoiser.buffers())
    again = GaussianDenoiser(4, 3)
    again.load_state_dict(denoiser.state_dict())
    for name, buffer in denoiser.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
