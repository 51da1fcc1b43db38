from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffgap_lightning.functional import frechet
from diffgap_lightning.functional.gap import frechet_distance, ledoit_wolf_shrinkage


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(n: int, mean: list[float], variances: list[float], seed: int = 0) -> torch.Tensor:
    """Rows whose sample mean and covariance are exactly these."""
    q = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), rows(n, len(mean), seed)], 1)).Q[:, 1:]
    scale = torch.tensor(variances, dtype=torch.float64).sqrt()
    return q * (n - 1) ** 0.5 * scale + torch.tensor(mean, dtype=torch.float64)


def shrunk(c: np.ndarray, amount: float) -> np.ndarray:
    return (1 - amount) * c + amount * np.trace(c) / len(c) * np.eye(len(c))


def reference(x: np.ndarray, y: np.ndarray, amount: float = 0.0) -> float:
    a, b = (shrunk(np.cov(z, rowvar=False), amount) for z in (x, y))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))


def test_two_gaussians_in_closed_form() -> None:
    """With commuting covariances: |mean difference|^2 + sum of (sd_1 - sd_2)^2."""
    x, y = with_moments(40, [0, 1, 2], [1, 4, 9]), with_moments(30, [1, 1, 0], [4, 4, 1], seed=1)
    assert frechet_distance(x, y) == pytest.approx(5 + 1 + 0 + 4)


@pytest.mark.parametrize("amount", [0.0, 0.3])
def test_it_equals_the_formula_with_a_matrix_square_root(amount: float) -> None:
    x, y = rows(60, 6) @ rows(6, 6, seed=5), rows(50, 6, seed=1) + 0.3
    assert frechet_distance(x, y, amount) == pytest.approx(reference(x.numpy(), y.numpy(), amount), rel=1e-7)


def test_fewer_rows_than_dimensions() -> None:
    """Samples that live in different coordinates do not overlap: the cross term is 0."""
    x, y = torch.zeros(2, 5, 40, dtype=torch.float64)
    x[:, :5], y[:, 20:25] = rows(5, 5), rows(5, 5, seed=1)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    assert frechet_distance(x, y) == pytest.approx((mean + x.var(0).sum() + y.var(0).sum()).item())
    x, y = rows(8, 40), rows(7, 40, seed=1)
    assert frechet_distance(x, y, 0.2) == pytest.approx(reference(x.numpy(), y.numpy(), 0.2), rel=1e-7)


@pytest.mark.parametrize("n", [5, 300])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0, "ledoit-wolf"])
def test_the_distance_to_itself_is_zero(n: int, shrinkage: float | str) -> None:
    x = torch.nn.functional.normalize(rows(n, 32), dim=1).float()
    assert frechet_distance(x, x.flip(0), shrinkage) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, "ledoit-wolf"])
def test_symmetry_rotation_translation_and_scale(shrinkage: float | str) -> None:
    x, y = rows(30, 6) @ rows(6, 6, seed=5), rows(9, 6, seed=1)
    r = torch.linalg.qr(rows(6, 6, seed=9)).Q
    expected = frechet_distance(x, y, shrinkage)
    assert frechet_distance(y, x, shrinkage) == pytest.approx(expected)
    assert frechet_distance(x @ r + 7, y @ r + 7, shrinkage) == pytest.approx(expected)
    assert frechet_distance(3 * x, 3 * y, shrinkage) == pytest.approx(9 * expected)


def test_full_shrinkage_compares_spheres() -> None:
    x, y = with_moments(40, [0, 0, 0], [1, 4, 1]), with_moments(30, [1, 0, 0], [8, 8, 8], seed=1)
    assert frechet_distance(x, y, 1.0) == pytest.approx(1 + 3 * (8**0.5 - 2**0.5) ** 2)


def test_chunks_of_rows_change_nothing(monkeypatch) -> None:
    x, y = rows(50, 6) + 2, rows(9, 6, seed=1)
    expected = frechet_distance(x, y), ledoit_wolf_shrinkage(x)
    monkeypatch.setattr(frechet, "_CHUNK", 4)
    assert (frechet_distance(x, y), ledoit_wolf_shrinkage(x)) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "d"), [(6, 20), (40, 4), (12, 12)])
def test_ledoit_wolf_equals_its_definition(n: int, d: int) -> None:
    x = rows(n, d) * torch.linspace(0.2, 2, d, dtype=torch.float64) + 1
    z = x.numpy() - x.numpy().mean(0)
    s = z.T @ z / n
    sphere = np.trace(s) / d * np.eye(d)
    b = sum(((np.outer(k, k) - s) ** 2).sum() for k in z) / n**2
    assert ledoit_wolf_shrinkage(x) == pytest.approx(min(1, b / ((s - sphere) ** 2).sum()))


def test_ledoit_wolf_vanishes_with_many_rows_and_is_one_without_structure() -> None:
    x = rows(4000, 3) * torch.tensor([1.0, 2.0, 3.0])
    assert ledoit_wolf_shrinkage(x) < 0.01
    assert ledoit_wolf_shrinkage(with_moments(30, [0, 0], [2, 2])) == pytest.approx(1)


def test_what_has_no_answer_is_refused() -> None:
    x = rows(4, 3)
    for shrinkage in (-0.1, 1.1, float("nan"), "oas", None):
        with pytest.raises(ValueError, match="shrinkage: got"):
            frechet_distance(x, x, shrinkage)
    with pytest.raises(ValueError, match="source: got 1 row, expected at least 2"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="target: got dimension 2, expected 3"):
        frechet_distance(x, x[:, :2])
