"""Arithmetic that ranks and statistics are made of: true float32 products, whatever the trainer has switched on.

Autocast turns a float32 product into bfloat16, and `torch.set_float32_matmul_precision("high")` into TF32; both round
scores to about three digits, which makes ties and changes R@1. Inside `full_float32` neither happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in IEEE float32 on `device`: no autocast, no TF32, no bfloat16 products; all settings are put back."""
    with torch.autocast(device_type=device.type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            yield from _backend_precision()
        else:  # before torch 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)


def _backend_precision() -> Iterator[None]:
    """The setting by backend. The older getter refuses to read a mixture of both, so only this one is touched."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@contextmanager
def tensor_float32(device: torch.device) -> Iterator[None]:
    """Round the factors of float32 products to TF32's three digits where bfloat16 autocast is on, on a GPU."""
    on = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    if not on or not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        yield
        return
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before


def column_mean(x: Tensor) -> Tensor:
    """Mean row `(D,)` of `(N, D)` in float64, without a float64 copy of the rows."""
    return widest(x).mean(0, dtype=torch.float64)


def true_float(x: Tensor, centre: Tensor | None = None) -> Tensor:
    """`x` in float32, or in float64 if it is, less the float64 row `centre` `(D,)`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if centre is None else x - centre.to(x)


def widest(x: Tensor) -> Tensor:
    """`x` on a device that knows float64: Apple's does not, so its tensors are moved to the CPU."""
    return x.cpu() if x.device.type == "mps" else x
