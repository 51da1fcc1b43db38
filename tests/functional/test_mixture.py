"""The mixture against torch.distributions, and what EM finds in rows whose components are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from diffgap_lightning.functional.linear import second_moment
from diffgap_lightning.functional.mixture import Mixture, _maximise, fit_mixture

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def known(k: int = 8, d: int = 3, spread: float = 6.0, seed: int = 0) -> Mixture:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=g) * 0.4 + torch.eye(d)
    weight = torch.rand(k, generator=g) + 0.5
    return Mixture((weight / weight.sum()).log(), spread * torch.randn(k, d, generator=g), root @ root.T)


def reference(mixture: Mixture) -> MixtureSameFamily:
    return MixtureSameFamily(
        Categorical(logits=mixture.log_weight.double()),
        MultivariateNormal(mixture.mean.double(), mixture.covariance.double()),
    )


def draw(mixture: Mixture, n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(mixture.log_weight.exp(), n, replacement=True, generator=g)
    noise = torch.randn(n, mixture.mean.shape[1], generator=g) @ torch.linalg.cholesky(mixture.covariance).T
    return mixture.mean[k] + noise


def test_densities_and_responsibilities_are_those_of_the_mixture() -> None:
    mixture = known()
    z = draw(mixture, 200, seed=1)
    expected = reference(mixture)
    constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
    torch.testing.assert_close(mixture.log_density(z).double(), expected.log_prob(z.double()) + constant, **CLOSE)
    component = expected.component_distribution.log_prob(z.double()[:, None]) + mixture.log_weight.double()
    torch.testing.assert_close(mixture.responsibilities(z).double(), component.softmax(1), **CLOSE)


def test_the_marginal_is_the_density_of_some_coordinates() -> None:
    mixture = known(d=4)
    part = mixture.marginal(slice(1, 3))
    z = draw(mixture, 50, seed=2)[:, 1:3]
    other = Mixture(mixture.log_weight, mixture.mean[:, 1:3], mixture.covariance[1:3, 1:3])
    constant = math.log(2 * math.pi)
    torch.testing.assert_close(part.log_density(z).double(), reference(other).log_prob(z.double()) + constant, **CLOSE)


def test_fitting_comes_close_to_the_density_that_rows_were_drawn_from() -> None:
    truth = known(k=8)
    fitted = fit_mixture(draw(truth, 4000, 3), draw(truth, 500, 4), 32, torch.Generator().manual_seed(0))
    assert len(fitted.mean) >= 8
    new = draw(truth, 4000, 5)
    lost = truth.log_density(new).mean() - fitted.log_density(new).mean()
    assert lost < 0.1  # one Gaussian loses 2.4
    assert torch.cdist(truth.mean, fitted.mean).min(1).values.max() < 1.0


def test_one_gaussian_is_found_to_be_one() -> None:
    truth = known(k=1)
    rows = draw(truth, 600, 1)
    fitted = fit_mixture(rows, draw(truth, 300, 2), 64, torch.Generator().manual_seed(0))
    assert len(fitted.mean) == 1
    torch.testing.assert_close(fitted.mean[0], rows.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fitted.covariance, torch.cov(rows.T), atol=0.05, rtol=0.05)


def test_means_of_few_rows_are_shrunk_where_components_hardly_differ() -> None:
    """Two coordinates tell components apart; in ten others the means are equal and only noise differs."""
    g = torch.Generator().manual_seed(0)
    truth = torch.zeros(30, 12)
    truth[:, :2] = 5 * torch.randn(30, 2, generator=g)
    rows = truth.repeat_interleave(10, 0) + torch.randn(300, 12, generator=g)
    raw = rows.unflatten(0, (30, 10)).mean(1)
    fitted = _maximise(raw, torch.full((30,), 10.0), second_moment(rows), len(rows))
    error, plain = ((m - truth).square().mean(0) for m in (fitted.mean, raw))
    assert error[2:].mean() < 0.3 * plain[2:].mean()
    assert error[:2].mean() < 1.1 * plain[:2].mean()
    torch.testing.assert_close(fitted.covariance, torch.eye(12), atol=0.25, rtol=0.0)


def test_a_generator_decides_everything() -> None:
    truth = known()
    rows, held = draw(truth, 400, 1), draw(truth, 100, 2)
    a, b = (fit_mixture(rows, held, 16, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_components_than_allowed(most: int) -> None:
    truth = known()
    fitted = fit_mixture(draw(truth, 400, 1), draw(truth, 100, 2), most, torch.Generator().manual_seed(0))
    assert len(fitted.mean) <= most
