"""Losses against their definitions, hand-written loops and symmetries; how times and batches are dealt out."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffgap_lightning.diffusion.prediction import from_x0
from diffgap_lightning.diffusion.schedule import NoiseSchedule
from diffgap_lightning.losses import contrastive_loss, denoising_loss, snr_weight, split_batch, stratified_times

CPU = torch.device("cpu")
TWO = (("text", "audio"), ("audio", "text"))
FOUR = (*TWO, ("video", "audio"), ("audio", "video"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_a_weighting_is_the_squared_error_of_the_quantity_that_it_names(kind) -> None:
    schedule, t = NoiseSchedule(), torch.linspace(0.02, 1, 12, dtype=torch.float64)
    x0, eps, estimate = torch.randn(3, 12, 5, generator=seeded(), dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = (w[:, None] for w in schedule.alpha_sigma(t))
    truth = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[kind]
    expected = (from_x0(estimate, kind, x_t, alpha, sigma) - truth).square().mean()
    torch.testing.assert_close(denoising_loss(estimate, x0, schedule.log_snr(t), kind), expected)


@given(log_snr=st.floats(-10, 16))
@settings(max_examples=60, deadline=None)
def test_min_snr_and_truncated_snr_are_clamped_at_five_and_one(log_snr) -> None:
    level, snr = torch.tensor([log_snr], dtype=torch.float64), math.exp(log_snr)
    assert snr_weight(level, "min_snr").item() == pytest.approx(min(snr, 5))
    assert snr_weight(level, "truncated_snr").item() == pytest.approx(max(snr, 1))
    assert snr_weight(level, "x0").item() == 1
    assert snr_weight(level, "v").item() == pytest.approx(snr + 1)


def test_each_rows_error_has_its_own_weight() -> None:
    log_snr = torch.tensor([-2.0, 0.0, 1.0])
    x0, estimate = torch.randn(2, 3, 4, generator=seeded())
    by_row = [denoising_loss(estimate[i : i + 1], x0[i : i + 1], log_snr[i : i + 1], "eps") for i in range(3)]
    torch.testing.assert_close(denoising_loss(estimate, x0, log_snr, "eps"), sum(by_row) / 3)


def test_the_plain_loss_is_the_mean_squared_error_and_zero_at_the_truth() -> None:
    x0, estimate = torch.randn(2, 3, 4, generator=seeded())
    log_snr = torch.randn(3, generator=seeded())
    torch.testing.assert_close(denoising_loss(estimate, x0, log_snr), torch.nn.functional.mse_loss(estimate, x0))
    for weighting in ("x0", "eps", "v", "min_snr", "truncated_snr"):
        assert denoising_loss(x0, x0, log_snr, weighting) == 0


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_weighting: got 'snr'"):
        snr_weight(torch.zeros(1), "snr")


def loop_infonce(query: Tensor, gallery: Tensor, query_ids: list[int], gallery_ids: list[int], scale: float) -> float:
    """-log(sum over positives / sum over all) a query, one pair at a time."""
    total = 0.0
    for q, query_id in zip(query, query_ids, strict=True):
        positive, everything = 0.0, 0.0
        for g, gallery_id in zip(gallery, gallery_ids, strict=True):
            term = math.exp(scale * torch.cosine_similarity(q, g, dim=0).item())
            everything += term
            positive += term if query_id == gallery_id else 0.0
        total -= math.log(positive / everything)
    return total / len(query)


QUERY, GALLERY = torch.randn(2, 6, 5, generator=seeded(), dtype=torch.float64)
IDS = {"distinct": ([0, 1, 2, 3, 4, 5],) * 2, "repeated": ([0, 0, 1, 2, 2, 2], [2, 0, 1, 1, 0, 2])}


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_contrastive_loss_is_the_hand_written_loop(ids, scale) -> None:
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
    loss = contrastive_loss(QUERY, GALLERY, *(torch.tensor(i) for i in ids), log_scale)
    assert loss.item() == pytest.approx(loop_infonce(QUERY, GALLERY, *ids, scale), rel=1e-9)


def test_distinct_ids_give_the_usual_cross_entropy() -> None:
    ids = torch.arange(6)
    unit = torch.nn.functional.normalize
    logits = 10 * unit(QUERY, dim=1) @ unit(GALLERY, dim=1).T
    loss = contrastive_loss(QUERY, GALLERY, ids, ids, torch.tensor(10.0).double().log())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, ids))


def test_contrastive_loss_does_not_depend_on_norms_or_on_the_order_of_rows() -> None:
    ids, scale = torch.tensor(IDS["repeated"][0]), torch.tensor(2.0, dtype=torch.float64)
    loss = contrastive_loss(QUERY, GALLERY, ids, ids, scale)
    order, other = torch.randperm(6, generator=seeded(1)), torch.randperm(6, generator=seeded(2))
    lengths = torch.rand(6, 1, generator=seeded(3), dtype=torch.float64) + 0.5
    shuffled = contrastive_loss((lengths * QUERY)[order], (GALLERY / lengths)[other], ids[order], ids[other], scale)
    torch.testing.assert_close(shuffled, loss)


def test_the_two_sides_of_the_loss_change_roles_with_the_arguments() -> None:
    # A gallery that answers each query equally well: both sides see the same symmetric score matrix.
    ids, scale = torch.arange(6), torch.tensor(1.0, dtype=torch.float64)
    symmetric = -torch.log_softmax(scale.exp() * cosine(QUERY), 0).diag().mean()
    torch.testing.assert_close(contrastive_loss(QUERY, QUERY, ids, ids, scale), symmetric)
    forward, backward = (contrastive_loss(a, b, ids, ids, scale) for a, b in ((QUERY, GALLERY), (GALLERY, QUERY)))
    assert forward.item() == pytest.approx(loop_infonce(QUERY, GALLERY, ids.tolist(), ids.tolist(), math.e))
    assert backward.item() == pytest.approx(loop_infonce(GALLERY, QUERY, ids.tolist(), ids.tolist(), math.e))
    assert abs(forward - backward) > 0.01


def cosine(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x, dim=1)
    return unit @ unit.T


def test_rows_of_equal_id_are_never_pushed_apart() -> None:
    # With one id only there is no negative: no loss and no gradient, however unlike the rows are.
    query = QUERY.clone().requires_grad_()
    ids, scale = torch.zeros(6, dtype=torch.int64), torch.tensor(3.0, dtype=torch.float64)
    loss = contrastive_loss(query, GALLERY, ids, ids, scale)
    loss.backward()
    assert loss.abs() < 1e-12
    assert query.grad.abs().max() < 1e-12


def test_a_duplicate_of_the_positive_lowers_the_loss_and_one_of_a_negative_raises_it() -> None:
    ids, scale = torch.arange(6), torch.tensor(1.0, dtype=torch.float64)

    def loss(extra: int) -> float:
        rows = torch.cat([torch.arange(6), torch.tensor([extra])])
        return contrastive_loss(QUERY[:1], GALLERY[rows], ids[:1], ids[rows], scale).item()

    base = contrastive_loss(QUERY[:1], GALLERY, ids[:1], ids, scale).item()
    assert loss(0) < base < loss(3)


def test_gradients_of_the_contrastive_loss_are_right_and_reach_the_temperature() -> None:
    ids = torch.tensor(IDS["repeated"][0])
    inputs = [x.clone().requires_grad_() for x in (QUERY, GALLERY, torch.tensor(1.0, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda q, g, s: contrastive_loss(q, g, ids, ids, s), inputs)


@pytest.mark.parametrize(("batch_size", "share"), [(16, 0.0), (16, 0.25), (16, 0.3), (5, 0.01), (7, 1.0), (1, 0.0)])
def test_times_are_stratified_after_the_share_of_pure_noise(batch_size, share) -> None:
    count = math.ceil(batch_size * share)
    for seed in range(5):
        t = stratified_times(batch_size, share, seeded(seed), CPU)
        assert t.shape == (batch_size,)
        assert (t[:count] == 1).all()
        rest = batch_size - count
        # One time in each of the equally long intervals.
        assert torch.equal((t[count:] * rest).floor().long(), torch.arange(rest))
        assert (t > 0).all()


@pytest.mark.parametrize(("batch_size", "share", "count"), [(10, 0.7, 7), (100, 0.07, 7), (30, 0.1, 3), (10, 0.71, 8)])
def test_the_share_of_pure_noise_is_rounded_up_to_a_row_but_not_by_rounding_errors(batch_size, share, count) -> None:
    assert (stratified_times(batch_size, share, seeded(), CPU) == 1).sum() == count


def test_over_many_batches_times_are_uniform() -> None:
    generator = seeded()
    t = torch.cat([stratified_times(4, 0.0, generator, CPU) for _ in range(2000)])
    histogram = torch.histc(t, bins=20, min=0, max=1) / len(t)
    # 400 draws a bin, at most binomial errors.
    assert (histogram - 0.05).abs().max() < 4 * math.sqrt(0.05 / 8000)


def test_no_time_is_below_a_thousandth_however_large_the_batch() -> None:
    t = stratified_times(5000, 0.0, seeded(), torch.device("cpu"))
    assert t.min().item() == pytest.approx(1e-3)
    assert t[5:].diff().min() > 0  # of the other intervals none is touched
    assert t.max() < 1


def test_times_follow_the_generator_and_leave_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (stratified_times(8, 0.1, seeded(s), CPU) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("share", [-0.1, 1.2, math.nan])
def test_a_share_outside_zero_to_one_is_refused(share) -> None:
    with pytest.raises(ValueError, match="share_of_noise: got"):
        stratified_times(4, share, None, CPU)


def rows(batch_size: int, part: slice) -> list[int]:
    return list(range(batch_size))[part]


@pytest.mark.parametrize("step", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("batch_size", "directions"),
    [(1, TWO[:1]), (2, TWO), (3, TWO), (4, TWO), (7, TWO), (64, TWO), (4, FOUR), (7, FOUR), (64, FOUR)],
)
def test_bst_parts_a_batch_into_equal_shares(batch_size, directions, step) -> None:
    parts = split_batch(batch_size, directions, "bst", step)
    assert tuple(parts) == directions
    sizes = [len(rows(batch_size, part)) for part in parts.values()]
    assert sorted(sum((rows(batch_size, part) for part in parts.values()), [])) == list(range(batch_size))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("batch_size", [2, 4, 7])
@pytest.mark.parametrize("split", ["bst", "forward", "backward"])
def test_over_a_turn_of_steps_every_row_trains_every_direction_equally_often(batch_size, split) -> None:
    directions = FOUR if batch_size >= 4 else TWO
    seen: Counter[tuple] = Counter()
    for step in range(8):
        for direction, part in split_batch(batch_size, directions, split, step).items():
            seen.update((direction, row) for row in rows(batch_size, part))
    chosen = {"bst": directions, "forward": directions[::2], "backward": directions[1::2]}[split]
    assert seen == {(d, row): 8 // len(chosen) for d in chosen for row in range(batch_size)}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_joint_gives_every_row_to_every_direction(batch_size) -> None:
    parts = split_batch(batch_size, FOUR, "joint", 3)
    assert {d: rows(batch_size, part) for d, part in parts.items()} == dict.fromkeys(FOUR, list(range(batch_size)))


def test_alternate_gives_whole_batches_in_turn() -> None:
    for step in range(9):
        parts = split_batch(5, FOUR, "alternate", step)
        assert {d: rows(5, part) for d, part in parts.items()} == {FOUR[step % 4]: list(range(5))}


@pytest.mark.parametrize(("split", "first"), [("forward", 0), ("backward", 1)])
def test_one_way_splits_train_their_own_directions_only(split, first) -> None:
    assert split_batch(6, TWO, split, 4) == {TWO[first]: slice(0, 6)}
    assert tuple(split_batch(6, FOUR, split)) == FOUR[first::2]


@pytest.mark.parametrize(
    ("batch_size", "directions", "split", "words"),
    [
        (1, TWO, "bst", "got 1 rows for 2 directions"),
        (3, FOUR, "bst", "got 3 rows for 4 directions"),
        (1, FOUR, "forward", "got 1 rows for 2 directions"),
        (8, TWO[:1], "backward", "got 8 rows for 0 directions"),
        (8, (), "bst", "for 0 directions"),
        (8, (), "joint", "for 0 directions"),
        (8, (), "alternate", "for 0 directions"),
        (8, TWO, "both", "split: got 'both'"),
    ],
)
def test_splits_that_leave_a_direction_without_rows_are_refused(batch_size, directions, split, words) -> None:
    with pytest.raises(ValueError, match=words):
        split_batch(batch_size, directions, split)
