"""Where long media are cut: windows of equal length at equal hops, the same in every run and for every modality.

Window k covers [k h, k h + w), with w the window and h the hop in seconds. The last partial window is kept if it holds
at least `MIN_FRACTION` of a window and dropped otherwise, except that media shorter than one window are one window:
nothing is dropped whole. So 10.02 s (a 10 s clip with a codec's padding) is one window of 10 s, not two.
"""

from __future__ import annotations

import math

MIN_FRACTION = 0.5
_EPS = 1e-6  # s; durations come from rounded timestamps


def cut_windows(duration: float, window: float | None, hop: float | None = None) -> list[tuple[float, float]]:
    """Windows of media of a given duration.

    Args:
        duration: Of the media, in s.
        window: w in s; None gives one window over everything.
        hop: h in s; `window` by default (no overlap).

    Returns:
        `(start, length)` in s of each window; only the last can be shorter than `window`.

    Raises:
        ValueError: a duration, window or hop that is not positive and finite.

    Example:
        >>> cut_windows(24.0, 10.0), cut_windows(25.0, 10.0)
        ([(0.0, 10.0), (10.0, 10.0)], [(0.0, 10.0), (10.0, 10.0), (20.0, 5.0)])
        >>> cut_windows(3.0, 10.0), cut_windows(15.0, 10.0, 5.0)
        ([(0.0, 3.0)], [(0.0, 10.0), (5.0, 10.0)])
    """
    for name, value in (("duration", duration), ("window", window), ("hop", hop)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: got {value} s, expected a positive, finite number of seconds")
    if window is None:
        return [(0.0, duration)]
    step = window if hop is None else hop
    full = max(0, math.floor((duration - window + _EPS) / step) + 1)
    windows = [(float(k * step), float(window)) for k in range(full)]
    covered = windows[-1][0] + window if windows else 0.0
    rest = duration - full * step
    if not windows or (duration - covered > _EPS and rest >= MIN_FRACTION * window - _EPS):
        windows.append((float(full * step), min(rest, float(window))))
    return windows
