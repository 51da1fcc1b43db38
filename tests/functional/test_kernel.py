"""Kernel regression: against its definition, its leave-out errors against refits, and what it falls back to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.functional.kernel import kernel, kernel_regression, leave_out_residual, unit_rows


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predict(x: Tensor, guess: Tensor, fit) -> Tensor:
    return fit.share * guess + kernel(unit_rows(x), fit.anchors) @ fit.dual


def data(n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, targets near twice the guess, and units of one to three rows."""
    x = randn(n, 5)
    return x, 0.6 * x[:, :3] + 0.3 * torch.sin(3 * x[:, :3]) + 0.1 * randn(n, 3, seed=1), torch.arange(n) * 5 // 8


def test_the_kernel_is_that_of_squared_distances_between_unit_rows() -> None:
    x, a = unit_rows(randn(4, 3)), unit_rows(randn(6, 3, seed=1))
    expected = torch.tensor([[math.exp(-float((u - v).square().sum())) for v in a] for u in x], dtype=torch.float64)
    torch.testing.assert_close(kernel(x, a), expected)


def test_the_fit_solves_its_normal_equations() -> None:
    x, y, units = data()
    fit = kernel_regression(x, y, x[:, :3], units, (0.7,))
    gram = kernel(fit.anchors, fit.anchors) + 0.7 * torch.eye(len(x), dtype=torch.float64)
    order = [int((fit.anchors - row).norm(dim=1).argmin()) for row in unit_rows(x)]
    torch.testing.assert_close((gram @ fit.dual)[order], y - fit.share * x[:, :3])


def test_residuals_are_those_of_refits_without_the_unit() -> None:
    x, y, units = data()
    guess = x[:, :3]
    fit = kernel_regression(x, y, guess, units, (0.7,))
    assert 0 < fit.share < 1
    for unit in units.unique():
        rest, held = units != unit, units == unit
        anchors = unit_rows(x[rest])
        gram = kernel(anchors, anchors) + 0.7 * torch.eye(int(rest.sum()), dtype=torch.float64)
        dual = torch.linalg.solve(gram, y[rest] - fit.share * guess[rest])
        without = fit.share * guess[held] + kernel(unit_rows(x[held]), anchors) @ dual
        torch.testing.assert_close(fit.residual[held], y[held] - without)


def test_share_and_penalty_are_those_of_least_leave_out_error() -> None:
    x, y, units = data(40)
    best = kernel_regression(x, y, x[:, :3], units)
    errors = [kernel_regression(x, y, x[:, :3], units, (p,)).residual.square().sum() for p in (0.3, 0.5, 1.0, 2.0, 4.0)]
    assert best.residual.square().sum() == min(errors)
    for share in (best.share - 0.05, best.share + 0.05):  # no other share does better
        gram = kernel(unit_rows(x), unit_rows(x)) + best.penalty * torch.eye(40, dtype=torch.float64)
        inverse = gram.inverse()
        other = leave_out_residual(inverse, inverse @ (y - share * x[:, :3]), units)
        assert other.square().sum() > best.residual.square().sum()


def test_far_from_every_row_it_is_the_guess() -> None:
    x = normalize(torch.cat([1 + 0.1 * randn(20, 4), torch.zeros(20, 40, dtype=torch.float64)], 1), dim=1)
    fit = kernel_regression(x, x + 0.5, x, torch.arange(20))
    far = torch.zeros(1, 44, dtype=torch.float64).index_fill_(1, torch.tensor([43]), 30.0)
    near = predict(x[:1], x[:1], fit) - fit.share * x[:1]
    assert (predict(far, far, fit) - fit.share * far).norm() < 0.2 * near.norm()


def test_equal_rows_share_an_anchor() -> None:
    x = randn(6, 4).repeat_interleave(5, 0)
    y = x[:, :2] + 0.1 * randn(30, 2, seed=1)
    fit = kernel_regression(x, y, x[:, :2], torch.arange(30), (1.0,))
    assert fit.anchors.shape == (6, 4)
    gram = kernel(unit_rows(x), unit_rows(x)) + torch.eye(30, dtype=torch.float64)
    whole = fit.share * x[:, :2] + kernel(unit_rows(x), unit_rows(x)) @ torch.linalg.solve(
        gram, y - fit.share * x[:, :2]
    )
    torch.testing.assert_close(predict(x, x[:, :2], fit), whole)


def test_a_guess_of_nothing_is_left_out() -> None:
    x, y, units = data()
    fit = kernel_regression(x, y, torch.zeros_like(y), units)
    assert fit.share == 0
    assert fit.dual.isfinite().all()
