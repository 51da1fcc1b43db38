from __future__ import annotations

import pytest
import torch

from diffgap_lightning.functional.checks import check_embeddings, frames_as_rows


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_good_rows_come_back_untouched() -> None:
    x = unit(4, 8)
    assert check_embeddings(x, "audio", dim=8, unit=True) is x
    check_embeddings(x.half(), "audio", unit=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.long(), TypeError, "audio: got torch.int64 tensor"),
        (lambda x: x[None], ValueError, r"audio: got shape \(1, 4, 8\)"),
        (lambda x: x[:0], ValueError, "empty"),
        (lambda x: x[:, :5], ValueError, "got dimension 5, expected 8"),
        (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), ValueError, r"row 2\) have NaN"),
        (lambda x: x.index_fill(0, torch.tensor([1]), float("inf")), ValueError, r"row 1\) have NaN or infinite"),
        (lambda x: x.index_fill(0, torch.tensor([3]), 0.0), ValueError, r"row 3\) have zero vectors"),
        (lambda x: x * 2, ValueError, "4 of 4 rows .* norm different from 1 .first: 2"),
    ],
)
def test_bad_rows_are_refused_with_the_field_and_the_row(change, error, words) -> None:
    with pytest.raises(error, match=words):
        check_embeddings(change(unit(4, 8)), "audio", dim=8, unit=True)


def test_lengths_that_differ_from_one_by_less_than_a_thousandth_pass() -> None:
    check_embeddings(unit(4, 8) * 1.0009, "audio", unit=True)
    check_embeddings(unit(4, 8) * 0.9991, "audio", unit=True)
    for wrong in (1.0012, 0.9988):
        with pytest.raises(ValueError, match="norm different from 1"):
            check_embeddings(unit(4, 8) * wrong, "audio", unit=True)


def test_a_list_is_refused_by_type() -> None:
    with pytest.raises(TypeError, match="text: got list"):
        check_embeddings([[1.0]], "text")


@pytest.mark.parametrize(("frames", "per_frame"), [(3, False), (0, True)])
def test_sequences_become_rows_frame_after_frame(frames: int, per_frame: bool) -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(frames_as_rows(x, "x", frames, per_frame), torch.cat([x[0], x[1]]))


@pytest.mark.parametrize(
    ("shape", "frames", "per_frame", "words"),
    [
        ((2, 4), 3, False, r"got shape \(2, 4\), expected \(B, 3, D\)"),
        ((2, 5, 4), 3, False, r"got shape \(2, 5, 4\), expected \(B, 3, D\)"),
        ((2, 5, 4), 0, False, r"a sequence; expected \(B, D\)"),
        ((2, 4), 0, True, r"expected \(B, T, D\)"),
        ((2, 3, 4), 3, True, "takes sequences of 3 frames as wholes"),
    ],
)
def test_sequences_and_embeddings_are_not_taken_for_each_other(shape, frames, per_frame, words) -> None:
    with pytest.raises(ValueError, match=words):
        frames_as_rows(torch.randn(shape), "x", frames, per_frame)


def test_embeddings_and_what_is_neither_pass_through() -> None:
    for x in (torch.randn(2, 4), torch.randn(4), [1.0]):
        assert frames_as_rows(x, "x", 0) is x
