"""Dropout that depends on a number alone, so that a resumed run drops what the uninterrupted one would have dropped.

`nn.Dropout` draws from torch's global generator, whose state no checkpoint holds. Here that generator is seeded for the
length of a step and then put back: nobody else's random numbers change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `device` within the block."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        seed = key & (2**63 - 1)
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        yield
