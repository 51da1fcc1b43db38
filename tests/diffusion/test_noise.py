from __future__ import annotations

import pytest
import torch
from scipy import stats

from diffgap_lightning.diffusion.noise import row_normal, row_uniform

ROWS = torch.arange(4000)


def test_a_row_has_its_noise_in_any_batch() -> None:
    whole = row_normal(ROWS, 7, 3)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(row_normal(order, 7, 3), whole[order])
    assert torch.equal(row_normal(ROWS, 5, 3), whole[:, :5])
    assert not torch.equal(row_normal(ROWS, 7, 4), whole)
    assert row_normal(ROWS[:0], 7, 3).shape == (0, 7)


@pytest.mark.parametrize(("draw", "law"), [(row_uniform, "uniform"), (row_normal, "norm")])
@pytest.mark.parametrize("rows", [ROWS, ROWS << 32, ROWS.flip(0) - 2000], ids=["near", "far", "negative"])
def test_it_follows_its_law_in_rows_columns_and_seeds(draw, law, rows) -> None:
    samples = [draw(rows, 10, 0).flatten(), draw(rows[:10], 4000, 0).flatten(), draw(rows, 1, 7).flatten()]
    for x in samples:
        assert stats.kstest(x.numpy(), law).pvalue > 1e-3
    x = draw(rows, 10, 0)
    assert float(torch.corrcoef(x.T).sub(torch.eye(10)).abs().max()) < 0.08  # between columns
    assert abs(float(torch.corrcoef(torch.stack([x[1:].flatten(), x[:-1].flatten()]))[0, 1])) < 0.02  # between rows
    other = draw(rows, 10, 1)
    assert abs(float(torch.corrcoef(torch.stack([x.flatten(), other.flatten()]))[0, 1])) < 0.02  # between seeds
    assert len(x.unique()) > 0.99 * x.numel()


def test_uniform_numbers_never_reach_the_ends() -> None:
    x = row_uniform(torch.arange(200_000), 10, 0)
    assert 0 < float(x.min()) < 1e-5
    assert 1 - 1e-5 < float(x.max()) < 1
    assert row_normal(torch.arange(200_000), 10, 0).isfinite().all()


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 - 1, -3])
def test_it_is_splitmix64_of_the_counter(seed: int) -> None:
    """Against integers without end, reduced modulo 2^64 as the paper has it."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def bits(row: int, column: int) -> int:
        return mix(mix((mix((row + seed * 0x9E3779B97F4A7C15) % 2**64) + column * 0xD1342543DE82EF95) % 2**64))

    rows = torch.tensor([0, 1, 12, 2**40])
    expected = [[((bits(r, c) >> 40) % 2**24 + 0.5) / 2**24 for c in range(3)] for r in rows.tolist()]
    torch.testing.assert_close(row_uniform(rows, 3, seed), torch.tensor(expected), rtol=1e-6, atol=1e-7)
