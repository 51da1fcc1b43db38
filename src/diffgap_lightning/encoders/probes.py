"""Synthetic inputs on which encoders are checked: what any usable encoder tells apart.

Texts of different things, and signals and pictures that differ as sounds and scenes do; drawn with a fixed generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TEXTS = (
    "a dog barks in the distance",
    "rain falls on a tin roof",
    "a woman sings an opera aria",
    "an engine starts and idles",
    "glass breaks on a stone floor",
    "birds sing in a forest at dawn",
    "people applaud in a large hall",
    "a telephone rings twice",
)
_FRAMES, _SIDE = 16, 112


def probe(modality: str, sample_rate: int | None = None) -> Sequence[str] | list[Tensor]:
    """Items of a modality as its `embed_<modality>` takes them, before its transform."""
    if modality == "text":
        return TEXTS
    if modality == "audio":
        assert sample_rate is not None
        return sounds(sample_rate)
    return clips() if modality == "video" else [clip[0] for clip in clips()]


def sounds(sample_rate: int) -> list[Tensor]:
    """Noise, a chirp, clicks, a beating chord and a decaying hum; 1 s to 3 s, `(T_i,)`."""
    generator = torch.Generator().manual_seed(0)

    def time(seconds: float) -> Tensor:
        return torch.arange(round(seconds * sample_rate)) / sample_rate

    noise = 0.2 * torch.randn(sample_rate, generator=generator).clamp(-3, 3)
    t = time(2.0)
    beating = 0.25 * (torch.sin(2 * math.pi * 440 * t) + torch.sin(2 * math.pi * 446 * t))
    clicks = torch.zeros(sample_rate * 3)
    clicks[:: sample_rate // 5] = 0.9
    t = time(1.5)
    hum = 0.8 * torch.exp(-4 * t) * torch.sin(2 * math.pi * 60 * t)
    return [noise, chirp(2.0, sample_rate), clicks, beating, hum]


def chirp(seconds: float, sample_rate: int) -> Tensor:
    """`(T,)`: 200 Hz rising to 3 kHz, so that any rate from 8 kHz on can hold it."""
    t = torch.arange(round(seconds * sample_rate)) / sample_rate
    return 0.5 * torch.sin(2 * math.pi * (200 * t + 1400 / seconds * t.square()))


def clips() -> list[Tensor]:
    """A moving grating, flicker, coarse noise and two colour fields; `(T, 3, H, W)` uint8."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(_FRAMES)[:, None, None, None]
    x = torch.arange(_SIDE).expand(1, 1, _SIDE, _SIDE)
    grating = 127 + 120 * torch.sin((x + 4 * t) / 6.0)
    flicker = (255 * (t % 2)) + 0 * x
    coarse = torch.randint(0, 256, (_FRAMES, 3, 7, 7), generator=generator).repeat_interleave(16, 2)
    fields = [torch.tensor(colour)[None, :, None, None] + 0 * (x + t) for colour in ((200, 30, 30), (20, 60, 210))]
    patterns = [grating, flicker, coarse.repeat_interleave(16, 3), *fields]
    return [p.expand(_FRAMES, 3, _SIDE, _SIDE).to(torch.uint8).contiguous() for p in patterns]
