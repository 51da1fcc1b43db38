from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.data.windows import MIN_FRACTION, cut_windows


def test_whole_media_without_a_window() -> None:
    assert cut_windows(7.25, None) == [(0.0, 7.25)]


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (3.0, [(0.0, 3.0)]),  # shorter than a window: kept whole
        (10.0, [(0.0, 10.0)]),
        (10.02, [(0.0, 10.0)]),  # a codec's padding is no second window
        (14.99, [(0.0, 10.0)]),
        (15.0, [(0.0, 10.0), (10.0, 5.0)]),  # half a window is kept
        (20.0, [(0.0, 10.0), (10.0, 10.0)]),
    ],
)
def test_last_partial_window(duration: float, expected: list[tuple[float, float]]) -> None:
    assert cut_windows(duration, 10.0) == expected


def test_overlapping_windows_do_not_add_a_covered_tail() -> None:
    assert cut_windows(15.0, 10.0, 5.0) == [(0.0, 10.0), (5.0, 10.0)]
    assert cut_windows(17.0, 10.0, 5.0) == [(0.0, 10.0), (5.0, 10.0), (10.0, 7.0)]


@given(st.floats(0.01, 500), st.floats(0.1, 30), st.floats(0.1, 40))
@settings(max_examples=200, deadline=None)
def test_windows_lie_within_the_media_and_only_the_last_is_short(duration: float, window: float, hop: float) -> None:
    windows = cut_windows(duration, window, hop)
    assert windows[0][0] == 0.0
    for k, (start, length) in enumerate(windows):
        assert start == pytest.approx(k * hop)
        assert start + length <= duration + 1e-5
        assert length == window or (k == len(windows) - 1 and length <= window)
    if len(windows) > 1:
        assert windows[-1][1] >= MIN_FRACTION * window - 1e-5
    if hop <= window:  # nothing is left out but less than half a window at the end
        assert duration - sum(windows[-1]) <= max(MIN_FRACTION * window, 0) + 1e-5


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.0, -1.0)])
def test_refuses_what_is_not_positive(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected a positive"):
        cut_windows(*arguments)
