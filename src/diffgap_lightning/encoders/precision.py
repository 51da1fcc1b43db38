"""Parts of a network that autocast must leave alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Full precision on a device, whatever autocast says."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class InFloat32(nn.Module):
    """Runs a module in float32 under autocast.

    For spectrograms, whose dynamic range half precision does not hold, and for code that writes the result of one
    operation into that of another and fails where autocast gives them different dtypes.

    Args:
        module: Called with a tensor and whatever follows it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Run it."""
        with without_autocast(x.device):
            return self.module(x.float(), *arguments, **named)
