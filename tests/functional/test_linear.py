"""The closed-form solvers against their definitions and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffgap_lightning.functional import linear


def pairs(n=60, d_x=7, d_y=5, noise=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_x, generator=g) * torch.linspace(1.5, 0.3, d_x)
    y = x @ torch.randn(d_x, d_y, generator=g) + noise * torch.randn(n, d_y, generator=g)
    return x - x.mean(0), y - y.mean(0)


def covariance(d, seed, rank=None):
    a = torch.randn(d, rank or 3 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / a.shape[1]


@pytest.mark.parametrize(("n", "d_x"), [(60, 7), (5, 9)])
def test_ridge_solves_its_normal_equations(n, d_x):
    x, y = pairs(n, d_x)
    w = linear.ridge(x, y, 2.0)
    assert w.shape == (d_x, 5)
    assert w.dtype == torch.float32
    torch.testing.assert_close(x.T @ (x @ w) + 2.0 * w, x.T @ y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "d_x"), [(60, 7), (5, 9)])
def test_ridge_without_penalty_is_the_least_squares_solution_of_least_norm(n, d_x):
    x, y = pairs(n, d_x)
    expected = np.linalg.pinv(x.double().numpy(), rcond=1e-6) @ y.double().numpy()
    torch.testing.assert_close(linear.ridge(x, y, 0).double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_ridge_vanishes_as_the_penalty_grows():
    x, y = pairs()
    assert linear.ridge(x, y, 1e12).abs().max() < 1e-8


def test_automatic_penalty_is_the_least_gcv_score_of_a_brute_force_search():
    x, y = (rows.double() for rows in pairs(noise=3.0))

    def score(penalty):
        hat = x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(7), x.T)
        return float((y - hat @ y).square().sum() / (len(x) - 1 - hat.trace()) ** 2)

    chosen = linear.ridge_penalty_gcv(x, y)
    grid = np.logspace(-4, 4, 400)
    assert score(chosen) <= min(score(p) for p in grid) * 1.001
    torch.testing.assert_close(linear.ridge(x, y), linear.ridge(x, y, chosen))


def test_automatic_penalty_grows_with_noise_and_predicts_better_than_none():
    g = torch.Generator().manual_seed(1)
    d, w = 30, torch.randn(30, 30, generator=g)

    def draw(n):
        x = torch.randn(n, d, generator=g)
        return x, x @ w + 20 * torch.randn(n, d, generator=g)

    (x, y), (x_new, y_new) = draw(40), draw(500)
    x, y = x - x.mean(0), y - y.mean(0)
    error = {p: (x_new @ linear.ridge(x, y, p) - y_new).square().mean() for p in ("auto", 0)}
    assert error["auto"] < 0.8 * error[0]
    assert linear.ridge_penalty_gcv(x, y) > linear.ridge_penalty_gcv(x, x @ w)


def test_automatic_penalty_never_interpolates_with_fewer_rows_than_dimensions():
    x, y = pairs(20, 50, 5, noise=5.0)
    residual = (y - x @ linear.ridge(x, y)).square().sum() / y.square().sum()
    assert residual > 0.05


def test_automatic_penalty_is_large_where_the_score_cannot_tell():
    """Isotropic rows, fewer than dimensions: the score is the same for every penalty but for rounding."""
    x, y = pairs(20, 50, 5)
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    white = u[:, :19] @ vt[:19]
    assert linear.ridge_penalty_gcv(white, y) > 50


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_ridge_refuses_a_bad_penalty(penalty):
    with pytest.raises(ValueError, match="penalty"):
        linear.ridge(*pairs(), penalty)


def test_unequal_row_counts_are_refused():
    x, y = pairs()
    with pytest.raises(ValueError, match=r"\(60, 7\) and \(59, 5\)"):
        linear.ridge(x, y[:-1], 1.0)


def test_second_moment_over_chunks_equals_one_product(monkeypatch):
    monkeypatch.setattr(linear, "_CHUNK", 7)
    x, y = pairs()
    torch.testing.assert_close(linear.second_moment(x, y), x.double().T @ y.double())
    torch.testing.assert_close(linear.second_moment(x), x.double().T @ x.double())


def test_canonical_coordinates_are_white_and_their_cross_covariance_is_diagonal():
    x, y = pairs()
    w_x, w_y, c = linear.canonical_correlations(x, y, rank=10)
    assert w_x.shape == (7, 5)
    assert w_y.shape == (5, 5)
    a, b = x @ w_x, y @ w_y
    eye = torch.eye(5)
    torch.testing.assert_close(a.T @ a / 60, eye, atol=1e-4, rtol=0)
    torch.testing.assert_close(b.T @ b / 60, eye, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.T @ b / 60, torch.diag(c), atol=1e-4, rtol=0)
    assert (c[:-1] >= c[1:]).all()


def test_canonical_correlations_do_not_depend_on_an_invertible_map_of_one_side():
    x, y = pairs()
    mixed = x @ torch.randn(7, 7, generator=torch.Generator().manual_seed(3))
    expected = linear.canonical_correlations(x, y, rank=10)[2]
    torch.testing.assert_close(linear.canonical_correlations(mixed, y, rank=10)[2], expected, atol=1e-4, rtol=1e-4)


def test_canonical_correlations_of_a_rotated_copy_are_one():
    x, _ = pairs()
    q = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)))[0]
    torch.testing.assert_close(linear.canonical_correlations(x, x @ q, rank=7)[2], torch.ones(7), atol=1e-5, rtol=0)


def test_shrinkage_lowers_the_correlations_and_full_shrinkage_ignores_the_covariances():
    x, y = pairs(n=12, d_x=10, d_y=10)
    full = linear.canonical_correlations(x, y, rank=8)[2]
    half = linear.canonical_correlations(x, y, rank=8, shrinkage=0.5)[2]
    assert half.sum() < full.sum()
    w_x, _, _ = linear.canonical_correlations(x, y, rank=8, shrinkage=1.0)
    gram = w_x.T @ w_x
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-4, rtol=1e-4)


def test_canonical_rank_is_limited_to_what_the_rows_span():
    x, y = pairs(n=5, d_x=9, d_y=8)
    assert len(linear.canonical_correlations(x, y, rank=64, shrinkage=0.1)[2]) == 4


@pytest.mark.parametrize(("rank", "shrinkage", "message"), [(0, 0.1, "rank 0"), (3, 1.5, "shrinkage 1.5")])
def test_canonical_correlations_refuse_bad_options(rank, shrinkage, message):
    with pytest.raises(ValueError, match=message):
        linear.canonical_correlations(*pairs(), rank=rank, shrinkage=shrinkage)


def test_procrustes_recovers_a_rotation():
    x, _ = pairs()
    q = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(4)))[0]
    torch.testing.assert_close(linear.procrustes(x, x @ q), q, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("d_x", "d_y"), [(7, 5), (5, 7)])
def test_procrustes_is_semi_orthogonal_and_beats_other_such_maps(d_x, d_y):
    x, y = pairs(d_x=d_x, d_y=d_y)
    r = linear.procrustes(x, y)
    small = r.T @ r if d_x > d_y else r @ r.T
    torch.testing.assert_close(small, torch.eye(5), atol=1e-5, rtol=0)
    g = torch.Generator().manual_seed(5)
    for _ in range(20):
        u, _, vt = torch.linalg.svd(r + 0.3 * torch.randn(d_x, d_y, generator=g), full_matrices=False)
        assert ((x @ r) * y).sum() > ((x @ (u @ vt)) * y).sum()


def test_gaussian_transport_reaches_the_target_covariance_and_is_symmetric_positive():
    a, b = covariance(6, 0), covariance(6, 1)
    t = linear.gaussian_transport(a, b).double()
    torch.testing.assert_close(t @ a @ t, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(t, t.T)
    assert torch.linalg.eigvalsh(t).min() > 0


def test_gaussian_transport_costs_the_bures_distance():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    a, b = covariance(6, 2), covariance(6, 3)
    step = linear.gaussian_transport(a, b).double() - torch.eye(6)
    root = scipy_linalg.sqrtm(a.numpy())
    bures = a.trace() + b.trace() - 2 * np.trace(scipy_linalg.sqrtm(root @ b.numpy() @ root)).real
    torch.testing.assert_close((step @ a @ step).trace(), bures, atol=1e-5, rtol=1e-5)


def test_gaussian_transport_between_equal_covariances_is_the_identity_and_stays_in_a_singular_range():
    a = covariance(6, 4)
    torch.testing.assert_close(linear.gaussian_transport(a, a), torch.eye(6), atol=1e-5, rtol=0)
    singular = covariance(6, 5, rank=2)
    t = linear.gaussian_transport(singular, a).double()
    assert torch.isfinite(t).all()
    assert torch.linalg.matrix_rank(t, rtol=1e-5) == 2


def test_gaussian_transport_refuses_unequal_sizes():
    with pytest.raises(ValueError, match="square"):
        linear.gaussian_transport(torch.eye(3), torch.eye(4))


def test_restoring_scale_restores_the_total_variance():
    x, y = pairs()
    y = y[:, :3].repeat(1, 2)[:, :5]
    scaled = x[:, :5] * linear.restoring_scale(x[:, :5], y) + 3
    assert scaled.var(0, unbiased=False).sum().item() == pytest.approx(y.var(0, unbiased=False).sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="all equal"):
        linear.restoring_scale(torch.ones(4, 2), y)


def test_inputs_are_not_changed_and_gradients_do_not_leak():
    x, y = pairs()
    before = x.clone()
    x.requires_grad_(True)
    assert not linear.ridge(x, y).requires_grad
    assert torch.equal(x.detach(), before)


def test_ridge_from_moments_is_ridge_from_the_rows_they_are_of():
    x, y = (rows.double() for rows in pairs(d_x=6, d_y=6, noise=2.0))
    found = linear.ridge_from_moments(x.T @ x, x.T @ y, y.T @ y, len(x))
    torch.testing.assert_close(found, linear.ridge(x, y).double(), atol=1e-5, rtol=1e-5)
