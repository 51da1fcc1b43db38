from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from diffgap_lightning.functional import mmd
from diffgap_lightning.functional.gap import median_bandwidth, mmd2

SHARED = Path(os.environ.get("DIFFGAP_SHARED", Path(__file__).resolve().parents[3] / "shared" / "data"))


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    """The estimator by its definition, over explicit lists of pairs."""
    k = [np.exp(-(d**2) / (2 * sigma**2)) for d in (pdist(x), pdist(y), cdist(x, y).ravel())]
    return k[0].mean() + k[1].mean() - 2 * k[2].mean()


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_it_equals_the_definition_for_every_chunk_size(chunk_size: int) -> None:
    x, y = rows(13, 4), rows(9, 4, seed=1) + 0.7
    assert mmd2(x, y, 1.3, chunk_size=chunk_size) == pytest.approx(reference(x.numpy(), y.numpy(), 1.3), rel=1e-10)
    assert mmd2(x, y, chunk_size=chunk_size) == pytest.approx(
        reference(x.numpy(), y.numpy(), np.median(pdist(y.numpy())) / math.sqrt(2)), rel=1e-10
    )


def test_block_memory_is_bounded_and_changes_nothing(monkeypatch) -> None:
    x, y = rows(40, 3), rows(30, 3, seed=1)
    expected = mmd2(x, y, 1.0)
    largest, distances = [], mmd.squared_distances
    monkeypatch.setattr(mmd, "squared_distances", lambda a, b: largest.append(len(a) * len(b)) or distances(a, b))
    monkeypatch.setattr(mmd, "_MAX_BLOCK", 64)
    assert mmd2(x, y, 1.0) == pytest.approx(expected, rel=1e-10)
    assert max(largest) <= 64


def test_it_is_unbiased_over_all_subsamples() -> None:
    """A U-statistic: its mean over every pair of subsets of a population is its value on the population."""
    x, y = rows(6, 2), rows(5, 2, seed=1) + 0.5
    values = [
        mmd2(x[list(i)], y[list(j)], 0.9)
        for i in itertools.combinations(range(6), 3)
        for j in itertools.combinations(range(5), 2)
    ]
    assert np.mean(values) == pytest.approx(mmd2(x, y, 0.9), rel=1e-9)


def test_same_distribution_is_near_zero_and_a_shift_is_seen() -> None:
    x, y = rows(400, 8), rows(400, 8, seed=1)
    assert abs(mmd2(x, y)) < 2e-3
    assert mmd2(x + 1, y) > 0.1


def test_one_dimensional_gaussians_have_a_closed_form() -> None:
    """E k for N(a, 1), N(b, 1) and kernel width s is s / sqrt(s^2 + 2) exp(-(a - b)^2 / (2 (s^2 + 2)))."""
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(3000, dtype=torch.float64) + 0.5) / 3000)[:, None]
    width = 1.5
    expected = 2 * width / math.sqrt(width**2 + 2) * (1 - math.exp(-1 / (2 * (width**2 + 2))))
    assert mmd2(quantiles, quantiles + 1, width) == pytest.approx(expected, abs=1e-3)


def test_symmetry_rotation_and_translation() -> None:
    x, y = rows(13, 4), rows(9, 4, seed=1) + 0.7
    r = torch.linalg.qr(rows(4, 4, seed=9)).Q
    assert mmd2(y, x, 1.1) == pytest.approx(mmd2(x, y, 1.1), rel=1e-10)
    assert mmd2(x @ r + 3, y @ r + 3) == pytest.approx(mmd2(x, y), rel=1e-9)


def test_far_from_the_origin_float32_loses_nothing() -> None:
    x, y = rows(50, 4).float(), rows(50, 4, seed=1).float()
    assert mmd2(x + 512, y + 512, 1.0) == pytest.approx(mmd2(x, y, 1.0), abs=2e-5)


def test_several_bandwidths_are_averaged() -> None:
    x, y = rows(13, 4), rows(9, 4, seed=1)
    assert mmd2(x, y, [0.5, 1, 4]) == pytest.approx(np.mean([mmd2(x, y, s) for s in (0.5, 1, 4)]), rel=1e-10)


def test_autocast_changes_nothing() -> None:
    x, y = rows(13, 4).float(), rows(9, 4, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mmd2(x, y)
    assert inside == mmd2(x, y)


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_median_bandwidth_is_the_median_distance_over_root_two(n: int) -> None:
    x = rows(n, 3)
    assert median_bandwidth(x) == pytest.approx(np.median(pdist(x.numpy())) / math.sqrt(2), rel=1e-10)


def test_median_of_many_rows_comes_from_a_fixed_draw(monkeypatch) -> None:
    x = rows(3000, 3)
    state = torch.get_rng_state()
    drawn = median_bandwidth(x)
    assert drawn == median_bandwidth(x)
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(mmd, "_MEDIAN_ROWS", 3000)
    assert drawn == pytest.approx(median_bandwidth(x), rel=0.02)


def test_what_has_no_answer_is_refused() -> None:
    x = rows(4, 3)
    for bandwidth in (0.0, -1.0, math.nan, math.inf, [], [1.0, 0.0]):
        with pytest.raises(ValueError, match="bandwidth: got"):
            mmd2(x, x, bandwidth)
    with pytest.raises(ValueError, match="target: got 1 row, expected at least 2"):
        mmd2(x, x[:1])
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        mmd2(x, x, 1.0, chunk_size=0)


@pytest.mark.parametrize("others", [0, 1, 5, 8])
def test_targets_that_are_mostly_one_row_have_no_median_distance(others: int) -> None:
    """Rounding gives equal rows a squared distance of about 1e-7 of either sign: neither a bandwidth nor a crash."""
    for seed in range(10):
        y = torch.cat([rows(1, 37, seed).expand(40 - others, 37), rows(others, 37, seed + 1)]).float()
        with pytest.raises(ValueError, match="median distance of the target rows is 0"):
            mmd2(rows(5, 37).float(), y)


def test_known_figures_on_real_embeddings() -> None:
    """Five folds of AudioCaps-dev in the CLAP space: raw text 175.4, centred text 0.6 (both x 1000)."""
    path = SHARED / "real_clap" / "audiocaps_dev.npz"
    if not path.exists():
        pytest.skip("the real CLAP embeddings are not beside this checkout")
    with np.load(path, allow_pickle=False) as table:
        audio, text, folds = table["audio"], table["text"], (table["audio_fold"], table["text_fold"])
        audio_of = {clip: k for k, clip in enumerate(table["audio_id"])}
        partner = audio[[audio_of[clip] for clip in table["text_id"]]]
    raw, centred = [], []
    for fold in range(5):
        train, test = folds[1] != fold, folds[1] == fold
        moved = text[test] - text[train].mean(0) + partner[train].mean(0)
        target = torch.from_numpy(audio[folds[0] == fold])
        raw.append(1000 * mmd2(torch.from_numpy(text[test]), target))
        centred.append(1000 * mmd2(torch.nn.functional.normalize(torch.from_numpy(moved), dim=1), target))
    assert np.mean(raw) == pytest.approx(175.4, abs=0.1)
    assert np.mean(centred) == pytest.approx(0.64, abs=0.02)
