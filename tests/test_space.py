"""The space's statistics against NumPy, its round trips, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap_lightning.space import EmbeddingSpace


def unit_rows(n: int = 200, dim: int = 6, seed: int = 0, spread: float = 0.5) -> Tensor:
    """Unit rows around a common direction with unequal variances, as a modality's embeddings are."""
    g = torch.Generator().manual_seed(seed)
    offset = torch.randn(dim, generator=g)
    rows = offset / offset.norm() + spread * torch.randn(n, dim, generator=g) * torch.linspace(1, 0.1, dim)
    return torch.nn.functional.normalize(rows, dim=1)


def principal(x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variances (descending) and directions (columns), by NumPy's singular value decomposition in float64."""
    rows = x.double().numpy()
    mean = rows.mean(0)
    _, singular, directions = np.linalg.svd(rows - mean, full_matrices=False)
    return mean, singular**2 / len(rows), directions.T


@pytest.fixture
def three() -> dict[str, Tensor]:
    return {"text": unit_rows(300, 6, 0), "audio": unit_rows(200, 9, 1), "video": unit_rows(50, 4, 2)}


def test_full_rank_coordinates_decode_to_the_embedding(three) -> None:
    space = EmbeddingSpace.fit(three, rank="full")
    assert space.dims == space.ranks == {"text": 6, "audio": 9, "video": 4}
    for modality, x in three.items():
        back = space.decode(space.encode(x, modality), modality)
        torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


def test_decoding_restores_unit_norm_whatever_the_coordinates(three) -> None:
    space = EmbeddingSpace.fit(three, rank=3)
    z = 5 * torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    out = space.decode(z, "audio")
    assert out.shape == (2, 7, 9)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 7))
    raw = space.mean("audio") + space.scale("audio") * z @ space.basis("audio").T
    torch.testing.assert_close(out, raw / raw.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_rank_keeps_the_leading_principal_directions(rank) -> None:
    x = unit_rows()
    space = EmbeddingSpace.fit({"text": x}, rank=rank)
    mean, variances, directions = principal(x)
    assert space.ranks == {"text": rank}
    np.testing.assert_allclose(space.mean("text").numpy(), mean, atol=1e-7)
    np.testing.assert_allclose(space.scale("text").item(), np.sqrt(variances[:rank].mean()), rtol=1e-6)
    projector = directions[:, :rank] @ directions[:, :rank].T
    np.testing.assert_allclose((space.basis("text") @ space.basis("text").T).numpy(), projector, atol=1e-5)
    expected = mean + (x.double().numpy() - mean) @ projector
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(space.decode(space.encode(x, "text"), "text").numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("rank", ["full", "auto", 3])
def test_coordinates_are_centred_uncorrelated_and_of_unit_variance_on_average(three, rank) -> None:
    space = EmbeddingSpace.fit(three, rank=rank)
    for modality, x in three.items():
        z = space.encode(x, modality)
        assert z.shape == (len(x), space.ranks[modality])
        torch.testing.assert_close(z.mean(0), torch.zeros(z.shape[1]), rtol=0, atol=1e-5)
        covariance = z.T.cov(correction=0)
        assert covariance.diagonal().mean().item() == pytest.approx(1, rel=1e-4)
        assert (covariance.diagonal().diff() < 0).all()
        torch.testing.assert_close(covariance, covariance.diagonal().diag(), rtol=0, atol=1e-4)
        eye = torch.eye(z.shape[1])
        torch.testing.assert_close(space.basis(modality).T @ space.basis(modality), eye, rtol=0, atol=1e-5)


def test_auto_keeps_ninety_nine_percent_of_the_variance_of_few_rows() -> None:
    for seed in range(5):
        x = unit_rows(100, 20, seed)
        _, variances, _ = principal(x)
        share = variances.cumsum() / variances.sum()
        assert EmbeddingSpace.fit({"text": x}).ranks["text"] == np.flatnonzero(share >= 0.99)[0] + 1


@pytest.mark.parametrize(("n", "rank"), [(60, 5), (59, 2)])
def test_auto_keeps_every_direction_present_from_ten_rows_a_dimension_on(n, rank) -> None:
    # Rows in 5 of 6 dimensions, nearly all of whose variance lies in 2.
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 0.01, 0.01, 0.01, 0.0])
    x = torch.nn.functional.normalize(x, dim=1)
    assert EmbeddingSpace.fit({"text": x}, rank="auto").ranks["text"] == rank


def test_auto_never_keeps_a_direction_in_which_nothing_varies() -> None:
    x = unit_rows(3, 8)
    assert EmbeddingSpace.fit({"text": x}, rank="auto").ranks["text"] <= 2


def test_each_modality_may_have_a_rank_of_its_own(three) -> None:
    space = EmbeddingSpace.fit(three, rank={"text": 2, "audio": "full", "video": "auto"})
    assert space.modalities == ("text", "audio", "video")
    assert space.ranks["text"] == 2
    assert space.ranks["audio"] == 9
    assert 1 <= space.ranks["video"] <= 4


def test_the_basis_does_not_depend_on_the_order_or_precision_of_the_rows() -> None:
    x = unit_rows()
    basis = EmbeddingSpace.fit({"text": x}, rank="full").basis("text")
    for other in (x.flip(0), x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))], x.double()):
        again = EmbeddingSpace.fit({"text": other}, rank="full").basis("text")
        torch.testing.assert_close(again, basis, rtol=0, atol=1e-5)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_statistics_of_a_tight_cluster_over_several_chunks_are_accurate() -> None:
    # Variances of 1e-9 around a mean of norm 1: squares summed in single precision would keep no digit of them.
    x = unit_rows(70_000, 4, spread=1e-4)
    mean, variances, _ = principal(x)
    space = EmbeddingSpace.fit({"text": x}, rank=2)
    np.testing.assert_allclose(space.mean("text").numpy(), mean, atol=6e-8)
    np.testing.assert_allclose(space.scale("text").item(), np.sqrt(variances[:2].mean()), rtol=1e-5)


def test_half_precision_rows_are_measured_and_encoded_in_single_precision() -> None:
    x = unit_rows()
    space = EmbeddingSpace.fit({"text": x.half()}, rank=3)
    torch.testing.assert_close(space.mean("text").double(), x.half().double().mean(0), rtol=0, atol=1e-7)
    z = space.encode(x.half(), "text")
    assert z.dtype == space.mean("text").dtype == torch.float32
    torch.testing.assert_close(z, space.encode(x.half().float(), "text"))


def test_coordinates_keep_single_precision_under_autocast(three) -> None:
    space, x = EmbeddingSpace.fit(three), three["text"]
    z = space.encode(x, "text")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(space.encode(x, "text"), z)
        torch.testing.assert_close(space.decode(z.bfloat16(), "text"), space.decode(z.bfloat16().float(), "text"))


def test_a_state_dict_restores_the_space_bit_by_bit(three) -> None:
    space = EmbeddingSpace.fit(three, rank=3)
    again = EmbeddingSpace(space.dims, space.ranks)
    again.load_state_dict(space.state_dict())
    for modality, x in three.items():
        assert torch.equal(again.encode(x, modality), space.encode(x, modality))
    assert not list(space.parameters())


def test_rows_that_carry_a_gradient_leave_none_in_the_space() -> None:
    space = EmbeddingSpace.fit({"text": unit_rows().requires_grad_()})
    assert not any(buffer.requires_grad for buffer in space.buffers())


def test_a_new_space_is_the_identity() -> None:
    x = unit_rows()
    space = EmbeddingSpace({"text": 6}, {"text": 6})
    torch.testing.assert_close(space.encode(x, "text"), x)
    torch.testing.assert_close(space.decode(x, "text"), x)


def test_offsets_and_coordinates_are_each_others_inverse_within_the_basis(three) -> None:
    space = EmbeddingSpace.fit(three, rank=3)
    z = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    offset = space.offset(z, "audio")
    assert offset.shape == (2, 5, 9)
    torch.testing.assert_close(space.coordinates(offset, "audio"), z, rtol=1e-5, atol=1e-5)
    centred = space.centre(three["audio"], "audio")
    outside = centred - space.offset(space.encode(three["audio"], "audio"), "audio")
    torch.testing.assert_close(outside @ space.basis("audio"), torch.zeros(200, 3), rtol=0, atol=1e-6)


def test_centre_removes_the_centroid(three) -> None:
    space = EmbeddingSpace.fit(three)
    centred = space.centre(three["audio"], "audio")
    torch.testing.assert_close(centred, three["audio"] - three["audio"].mean(0), rtol=0, atol=1e-6)


def test_shift_moves_one_centroid_onto_the_other() -> None:
    source, target = unit_rows(100, 6, 0), unit_rows(80, 6, 1)
    space = EmbeddingSpace.fit({"text": source, "audio": target}, rank=2)
    moved = source - source.mean(0) + target.mean(0)
    expected = moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(space.shift(source, "text", "audio"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(space.shift(source, "text", "text"), source, rtol=0, atol=1e-6)


def test_shift_refuses_unequal_dimensions(three) -> None:
    with pytest.raises(ValueError, match=r"text \(6-d\) onto audio \(9-d\)"):
        EmbeddingSpace.fit(three).shift(three["text"], "text", "audio")


@pytest.mark.parametrize("call", ["encode", "decode", "centre", "mean", "basis", "scale", "shift"])
def test_an_unknown_modality_is_refused(three, call) -> None:
    space = EmbeddingSpace.fit(three)
    arguments = {"mean": (), "basis": (), "scale": (), "shift": (three["text"], "text")}.get(call, (three["text"],))
    with pytest.raises(ValueError, match="modality: got 'image', expected one of text, audio, video"):
        getattr(space, call)(*arguments, "image")


def test_embeddings_of_another_dimension_or_with_nan_are_refused(three) -> None:
    space = EmbeddingSpace.fit(three)
    with pytest.raises(ValueError, match="text: got dimension 9, expected 6"):
        space.encode(three["audio"], "text")
    with pytest.raises(ValueError, match="text: .* NaN"):
        space.encode(three["text"].index_fill(0, torch.tensor([1]), float("nan")), "text")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (unit_rows(1), "text: got 1 row, expected at least 2"),
        (unit_rows(1).expand(50, -1), "text: all 50 rows are the same"),
        (2 * unit_rows(), "text: .* norm different from 1"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(rows, words) -> None:
    with pytest.raises(ValueError, match=words):
        EmbeddingSpace.fit({"text": rows})


@pytest.mark.parametrize("rank", [0, -1, 7, 2.5, True, "most"])
def test_a_rank_out_of_range_is_refused(rank) -> None:
    with pytest.raises(ValueError, match="rank: got"):
        EmbeddingSpace.fit({"text": unit_rows()}, rank=rank)


def test_a_rank_for_other_modalities_than_the_rows_is_refused(three) -> None:
    with pytest.raises(ValueError, match="rank: got ranks of audio, text, expected"):
        EmbeddingSpace.fit(three, rank={"text": 2, "audio": 2})
    with pytest.raises(ValueError, match="image"):
        EmbeddingSpace.fit(three, rank={"text": 2, "audio": 2, "video": 2, "image": 2})


def test_a_space_of_inconsistent_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 7 for text"):
        EmbeddingSpace({"text": 6}, {"text": 7})
    with pytest.raises(ValueError, match="expected the same"):
        EmbeddingSpace({"text": 6}, {"audio": 6})
