"""Refining with gradients: the same values as `refine`, and derivatives that finite differences confirm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffgap_lightning.refiner import DiffGAPRefiner

WAY = {"source": "text", "target": "audio"}
CASES: list[dict[str, Any]] = [
    {"strength": 0.0, "start": "posterior_mean"},
    {"strength": 0.5, "num_steps": 3, "start": "posterior_mean"},
    {"strength": 1.0, "num_steps": 2, "sampler": "ddim", "guidance_scale": 2.0, "num_samples": 3},
]


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("options", CASES)
def test_values_are_those_of_refine(refiner: DiffGAPRefiner, rows: Callable[..., Any], options: dict[str, Any]) -> None:
    text = rows(5, seed=1)[0]["text"]
    expected = refiner.refine(text, **WAY, **options, generator=noise())
    found = refiner.refine_with_grad(text, **WAY, **options, generator=noise())
    assert found.requires_grad
    assert not expected.requires_grad
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert not refiner.refine_with_grad(text, **WAY, **options, generator=noise()).requires_grad


@pytest.mark.parametrize("options", CASES)
def test_gradients_are_those_of_finite_differences(
    own: DiffGAPRefiner, rows: Callable[..., Any], options: dict[str, Any]
) -> None:
    text = rows(4, seed=1)[0]["text"].requires_grad_()
    weight = own.cdm_of("text", "audio").network.output.bias
    g = torch.Generator().manual_seed(1)

    def value() -> torch.Tensor:
        out = own.refine_with_grad(text, **WAY, **options, generator=noise())
        return (out * torch.randn(out.shape, generator=g.manual_seed(1))).sum()

    gradients = torch.autograd.grad(value(), [weight, text])
    for tensor, gradient in zip((weight, text), gradients, strict=True):
        step = torch.randn(tensor.shape, generator=g.manual_seed(2))
        with torch.no_grad():
            tensor.add_(step, alpha=1e-3)
            above = value()
            tensor.sub_(step, alpha=2e-3)
            below = value()
            tensor.add_(step, alpha=1e-3)
        torch.testing.assert_close((gradient * step).sum(), (above - below) / 2e-3, rtol=0.02, atol=2e-3)
