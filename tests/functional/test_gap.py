from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.functional.gap import alignment, centroid_distance, paired_cosine, uniformity, unpaired_cosine


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(rows(n, d, seed), dim=1)


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(rows(d, d, seed=99)).Q


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-2, 3), min_size=1, max_size=9), st.lists(st.integers(-2, 3), min_size=1, max_size=9))
def test_sums_over_pairs_equal_the_double_loop(source_ids: list[int], target_ids: list[int]) -> None:
    x, y = rows(len(source_ids), 3), rows(len(target_ids), 3, seed=1) + 0.5
    cosine = {True: [], False: []}
    distance = []
    for a, i in zip(x.numpy(), source_ids, strict=True):
        for b, j in zip(y.numpy(), target_ids, strict=True):
            cosine[i == j].append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            distance += [((a - b) ** 2).sum()] if i == j else []
    arguments = (x, y, torch.tensor(source_ids), torch.tensor(target_ids))
    if distance:
        assert paired_cosine(*arguments) == pytest.approx(np.mean(cosine[True]), abs=1e-12)
        assert alignment(*arguments) == pytest.approx(np.mean(distance), rel=1e-9)
        if cosine[False]:
            assert unpaired_cosine(*arguments) == pytest.approx(np.mean(cosine[False]), abs=1e-12)
        else:
            pytest.raises(ValueError, unpaired_cosine, *arguments)
    else:
        with pytest.raises(ValueError, match="no id in common"):
            paired_cosine(*arguments)


def test_without_ids_rows_are_pairs() -> None:
    x, y, ids = unit(6, 4), unit(6, 4, seed=1), torch.arange(6)
    for measure in (paired_cosine, unpaired_cosine, alignment):
        assert measure(x, y) == measure(x, y, ids, ids)
    assert paired_cosine(x, y) == pytest.approx((x * y).sum(1).mean().item())


def test_alignment_of_unit_rows_is_two_minus_twice_the_cosine() -> None:
    x, y = unit(6, 4), unit(6, 4, seed=1)
    assert alignment(x, y) == pytest.approx(2 - 2 * paired_cosine(x, y))
    assert alignment(x, x) == pytest.approx(0, abs=1e-12)


def test_alignment_of_equal_rows_is_never_negative() -> None:
    ids = torch.arange(4).repeat(3)
    for seed in range(20):
        x = unit(4, 64, seed).float().repeat(3, 1)
        assert 0 <= alignment(x, x, ids, ids) < 1e-6


def test_cosines_do_not_depend_on_length() -> None:
    x, y = unit(5, 4), unit(5, 4, seed=1)
    scale = torch.linspace(0.1, 9, 5)[:, None]
    assert paired_cosine(x * scale, y) == pytest.approx(paired_cosine(x, y))
    assert unpaired_cosine(x, y * scale) == pytest.approx(unpaired_cosine(x, y))


def test_centroid_distance_is_the_length_of_the_shift() -> None:
    x, shift = rows(50, 3), torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    assert centroid_distance(x, x + shift) == pytest.approx(3)
    assert centroid_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_uniformity_is_the_log_mean_potential_of_distinct_pairs(chunk_size: int) -> None:
    x = unit(20, 5)
    squares = torch.pdist(x).square()
    assert uniformity(x, chunk_size=chunk_size) == pytest.approx(math.log((-2 * squares).exp().mean()), rel=1e-10)
    assert uniformity(x, t=0.5, chunk_size=chunk_size) == pytest.approx(
        math.log((-0.5 * squares).exp().mean()), rel=1e-10
    )


def test_uniformity_is_zero_for_a_collapsed_modality_and_lower_when_spread() -> None:
    one = unit(1, 8)
    assert uniformity(one.expand(5, 8)) == pytest.approx(0, abs=1e-12)
    assert uniformity(100 * torch.eye(4)) == -math.inf
    assert uniformity(torch.eye(4)) == pytest.approx(-4, rel=1e-6)  # every squared distance is 2
    assert uniformity(unit(200, 8)) < uniformity(torch.nn.functional.normalize(unit(200, 8) + one, dim=1)) < 0


def test_all_measures_survive_a_rotation_and_swap_of_sides() -> None:
    x, y, r = unit(9, 5), unit(9, 5, seed=1), rotation(5)
    for measure in (centroid_distance, paired_cosine, unpaired_cosine, alignment):
        assert measure(x @ r, y @ r) == pytest.approx(measure(x, y), rel=1e-9)
        assert measure(y, x) == pytest.approx(measure(x, y), rel=1e-9)
    assert uniformity(x @ r) == pytest.approx(uniformity(x), rel=1e-9)


def test_half_precision_and_autocast_give_the_float32_figures() -> None:
    x, y = unit(30, 16).half(), unit(30, 16, seed=1).half()
    for measure in (centroid_distance, paired_cosine, unpaired_cosine, alignment):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert measure(x, y) == measure(x.float(), y.float())
        assert measure(x, y) == pytest.approx(measure(x.double(), y.double()), rel=1e-5)


def test_what_has_no_answer_is_refused() -> None:
    x, ids = unit(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match="all ids are equal"):
        unpaired_cosine(x, x, ids * 0, ids * 0)
    with pytest.raises(ValueError, match="got 3 source and 2 target rows: give ids"):
        paired_cosine(x, x[:2])
    with pytest.raises(ValueError, match="ids of one side"):
        alignment(x, x, ids)
    with pytest.raises(ValueError, match=r"target_ids: got shape \(2,\), expected \(3,\)"):
        paired_cosine(x, x, ids, ids[:2])
    with pytest.raises(ValueError, match="target: got dimension 2, expected 4"):
        centroid_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="source: .*NaN"):
        centroid_distance(x / 0 * 0, x)
    with pytest.raises(ValueError, match="uniformity: got 1 row, expected at least 2"):
        uniformity(x[:1])
