"""What a refiner is unsure of: coverage on a Gaussian world, and rows that are not of its space."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner.uncertainty import calibrated_level, coverage


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def big(rows) -> DiffGAPRefiner:
    return DiffGAPRefiner.measure(*rows(4000), rank="full", width=8, depth=1)


def test_the_true_target_is_covered(big, rows) -> None:
    """Nearly by itself, although this world is not Gaussian; as promised after calibrating the level on other rows."""
    held, fresh = rows(1000, seed=4)[0], rows(1000, seed=5)[0]
    direction = {"source": "text", "target": "audio", "num_samples": 64, "generator": seeded()}
    plain = big.uncertainty(fresh["text"], **direction)
    assert coverage(plain, fresh["audio"]) == pytest.approx(0.9, abs=0.08)
    true = torch.cosine_similarity(plain.mean, fresh["audio"])
    assert float(plain.expected_cosine.mean()) == pytest.approx(float(true.mean()), abs=0.03)
    level = calibrated_level(big.refine(held["text"], strength=1.0, **direction), held["audio"])
    better = big.uncertainty(fresh["text"], level=level, **direction)
    assert coverage(better, fresh["audio"]) == pytest.approx(0.9, abs=0.03)


def test_one_in_a_hundred_genuine_rows_is_novel(big, rows) -> None:
    fresh, _ = rows(4000, seed=6)
    for m in ("text", "audio"):
        assert float((big.novelty(fresh[m], modality=m) > 1).float().mean()) == pytest.approx(0.01, abs=0.01)


def test_other_modalities_and_noise_are_novel(big, rows) -> None:
    fresh, _ = rows(200, seed=6)
    noise = normalize(torch.randn(200, 16, generator=seeded()), dim=1)
    # In 16 dimensions, all of them in use, a few of the other modality's rows look like this one's.
    assert (big.novelty(fresh["audio"], modality="text") > 1).float().mean() > 0.8
    assert (big.novelty(noise, modality="text") > 1).float().mean() > 0.95


def test_what_lies_outside_the_basis_is_novel(low_rank, rows) -> None:
    fresh, _ = rows(100, seed=6)
    x, basis = fresh["text"], low_rank.space.basis("text")
    out = torch.linalg.svd(basis, full_matrices=True)[0][:, -1]
    far = normalize(x + 2 * out, dim=1)
    inside_only = normalize(low_rank.space.mean("text") + (x - low_rank.space.mean("text")) @ basis @ basis.T, dim=1)
    assert (low_rank.novelty(far, modality="text") > 2).all()
    assert low_rank.novelty(inside_only, modality="text").median() < low_rank.novelty(far, modality="text").median()


def test_few_rows_do_not_refuse_their_like(rows) -> None:
    """With 60 rows of 16 dimensions, distances in sample would be far too small."""
    refiner = DiffGAPRefiner.measure(*rows(60), rank=12, width=8, depth=1)
    fresh, _ = rows(2000, seed=9)
    assert float((refiner.novelty(fresh["text"], modality="text") > 1).float().mean()) < 0.1


def test_novelty_is_saved(big, rows, tmp_path) -> None:
    fresh, _ = rows(5)
    again = DiffGAPRefiner.from_pretrained(big.save_pretrained(tmp_path / "refiner"))
    assert torch.equal(again.novelty(fresh["text"], modality="text"), big.novelty(fresh["text"], modality="text"))


def test_a_refiner_of_an_older_version_says_so(own, rows) -> None:
    own.config.typical.clear()
    with pytest.raises(ValueError, match="measure it anew"):
        own.novelty(rows(5)[0]["text"], modality="text")


def test_uncertainty_needs_samples(own, rows) -> None:
    with pytest.raises(ValueError, match="several samples"):
        own.uncertainty(rows(5)[0]["text"], source="text", target="audio", num_samples=1)
