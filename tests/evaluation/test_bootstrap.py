from __future__ import annotations

import pytest
import torch

from diffgap_lightning.evaluation.bootstrap import interval, resample_counts, resampled_means


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_replicate_draws_as_many_ids_as_there_are() -> None:
    counts = resample_counts(7, 50, seeded())
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert torch.equal(counts, resample_counts(7, 50, seeded()))
    assert not torch.equal(counts, resample_counts(7, 50, seeded(1)))


def test_means_equal_those_of_the_rows_written_out() -> None:
    values, unit = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 1, 2, 2])
    counts = torch.tensor([[2, 0, 1], [0, 3, 0], [1, 1, 1]])
    for row, mean in zip(counts, resampled_means(values, unit, counts), strict=True):
        written = [values[i] for c in range(3) for _ in range(int(row[c])) for i in range(5) if unit[i] == c]
        assert mean.item() == pytest.approx(torch.stack(written).mean().item())


def test_a_replicate_without_any_row_falls_back_to_the_mean() -> None:
    means = resampled_means(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), torch.tensor([[0, 2], [2, 0]]))
    assert means.tolist() == [2.0, 2.0]


def test_rows_of_one_id_count_as_one_observation() -> None:
    # 40 ids, ten copies of each row: resampling ids must give the interval of 40 values, not of 400
    values = torch.rand(40, generator=seeded(3))
    once = resampled_means(values, torch.arange(40), resample_counts(40, 400, seeded()))
    copies = resampled_means(values.repeat(10), torch.arange(40).repeat(10), resample_counts(40, 400, seeded()))
    assert torch.allclose(once, copies)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        g = seeded(trial)
        hits = (torch.rand(120, generator=g) < 0.3).float()
        low, high = interval(resampled_means(hits, torch.arange(120), resample_counts(120, 200, g)))
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_of_known_quantiles() -> None:
    assert interval(torch.arange(101, dtype=torch.float64), level=0.9) == pytest.approx([5.0, 95.0])


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="0 ids and 10 replicates"):
        resample_counts(0, 10, seeded())
