"""Windows of one long waveform, and how they become one again.

n = ceil((N - F) / (T - F)) windows of T samples are spread evenly over N samples, so that neighbours share at least the
F samples of the crossfade. Around the middle c of what two neighbours share, one fades out and the other in:

    g_out(u) = cos(pi u / 2),  g_in(u) = sin(pi u / 2),   u from 0 at c - F/2 to 1 at c + F/2

g_out^2 + g_in^2 = 1: the windows are generated from independent noise, so their powers add, and the sum keeps the
loudness ("equal power"). With T >= 3 F no sample lies in two crossfades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spread_windows(total: int, window: int, fade: int) -> list[int]:
    """First samples of the windows that cover `total` samples; one window where they fit into it.

    Args:
        total: N, from 1.
        window: T, samples of a window.
        fade: F, samples of a crossfade, at most a third of T.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> spread_windows(250, 100, 10), spread_windows(80, 100, 10)
        ([0, 75, 150], [0])
    """
    if total < 1 or window < 1:
        raise ValueError(f"windows: got {total} samples in windows of {window}, expected positive numbers")
    if not 0 <= 3 * fade <= window:
        raise ValueError(f"crossfade: got {fade} samples, expected from 0 to a third of the window's {window}")
    if total <= window:
        return [0]
    count = math.ceil((total - fade) / (window - fade))
    return [round(k * (total - window) / (count - 1)) for k in range(count)]


def join_windows(windows: Sequence[Tensor], starts: Sequence[int], total: int, fade: int) -> Tensor:
    """Crossfade windows into one waveform.

    Args:
        windows: Waveforms `(T,)`, all of one length.
        starts: The first sample of each, as `spread_windows` gives them.
        total: N.
        fade: F.

    Returns:
        `(N,)`; a single window is cut to N samples, or padded with silence.
    """
    if len(windows) != len(starts) or not windows:
        raise ValueError(
            f"windows: got {len(windows)} of them and {len(starts)} starts, expected as many, at least one"
        )
    length = len(windows[0])
    out = windows[0].new_zeros(total)
    rise = torch.sin(math.pi / 2 * (torch.arange(fade, dtype=out.dtype, device=out.device) + 0.5) / max(fade, 1))
    cuts = [(a + length + b) // 2 - fade // 2 for a, b in zip(starts[:-1], starts[1:], strict=True)]  # c - F/2
    for k, (samples, start) in enumerate(zip(windows, starts, strict=True)):
        first = cuts[k - 1] if k else 0
        last = cuts[k] + fade if k < len(cuts) else min(start + length, total)
        part = samples[first - start : last - start].clone()
        if k:
            part[:fade] *= rise
        if k < len(cuts):
            part[len(part) - fade :] *= rise.flip(0)
        out[first:last] += part
    return out
