from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.integrations.crossfade import join_windows, spread_windows


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    window = draw(st.integers(3, 60))
    return draw(st.integers(1, 5 * window)), window, draw(st.integers(0, window // 3))


@settings(deadline=None)
@given(sizes())
def test_windows_cover_everything_and_overlap_by_the_crossfade(size: tuple[int, int, int]) -> None:
    total, window, fade = size
    starts = spread_windows(total, window, fade)
    assert starts[0] == 0
    assert starts[-1] == max(0, total - window)
    assert all(0 < b - a <= window - fade for a, b in zip(starts[:-1], starts[1:], strict=True))


@settings(deadline=None)
@given(sizes())
def test_powers_of_the_windows_add_up_to_one(size: tuple[int, int, int]) -> None:
    """Window k holds the unit vector e_k as its 'sample': what comes out is the gain of each window at each time."""
    total, window, fade = size
    starts = spread_windows(total, window, fade)
    gains = []
    for k in range(len(starts)):
        windows = [torch.full((window,), float(j == k), dtype=torch.float64) for j in range(len(starts))]
        gains.append(join_windows(windows, starts, total, fade))
    power = torch.stack(gains).square().sum(0)
    covered = min(total, window) if len(starts) == 1 else total
    torch.testing.assert_close(power[:covered], torch.ones(covered, dtype=torch.float64))
    assert not power[covered:].any()  # shorter than the video: silence
    assert int((torch.stack(gains) > 0).sum(0).max()) <= 2


def test_samples_stay_where_they_were() -> None:
    """Windows cut from one signal: outside of the crossfades it is unchanged."""
    signal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    starts = spread_windows(1000, 300, 50)
    out = join_windows([signal[s : s + 300] for s in starts], starts, 1000, 50)
    same = (out == signal).float().mean()
    assert same == pytest.approx(1 - 50 * (len(starts) - 1) / 1000, abs=0.01)


def test_loudness_of_independent_noise_does_not_dip() -> None:
    g = torch.Generator().manual_seed(0)
    starts = spread_windows(70_000, 30_000, 10_000)
    windows = torch.randn(len(starts), 30_000, generator=g)
    out = join_windows(list(windows), starts, 70_000, 10_000)
    for part in out.split(2_500):
        assert float(part.std()) == pytest.approx(1, abs=0.06)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="from 0 to a third"):
        spread_windows(100, 30, 11)
    with pytest.raises(ValueError, match="positive"):
        spread_windows(0, 30, 0)
    with pytest.raises(ValueError, match="1 of them and 2 starts"):
        join_windows([torch.zeros(3)], [0, 2], 5, 0)
