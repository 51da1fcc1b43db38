"""Which products are rounded, and that settings are put back."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.functional.precision import full_float32, tensor_float32

matmul = torch.backends.cuda.matmul
pytestmark = pytest.mark.skipif(not hasattr(matmul, "fp32_precision"), reason="this torch has no setting by backend")


def test_tf32_comes_with_bfloat16_on_a_gpu_only() -> None:
    before, gpu = matmul.fp32_precision, torch.device("cuda")
    with tensor_float32(gpu):
        assert matmul.fp32_precision == before
    with torch.autocast("cpu", torch.bfloat16), tensor_float32(torch.device("cpu")):
        assert matmul.fp32_precision == before
    torch.set_autocast_enabled("cuda", True)
    try:
        with tensor_float32(gpu):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == before
        with pytest.raises(KeyError), tensor_float32(gpu):
            raise KeyError
        assert matmul.fp32_precision == before
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_full_precision_wins_inside() -> None:
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with full_float32(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
