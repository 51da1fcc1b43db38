from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.functional import retrieval
from diffgap_lightning.functional.precision import full_float32
from diffgap_lightning.functional.retrieval import (
    mean_rank,
    median_rank,
    recall_at_k,
    retrieval_ranks,
    retrieval_ranks_from_scores,
    retrieval_summary,
)


def reference(scores: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> tuple[list[int], list[float]]:
    """Sort every row by falling score with positives first among equals, and read the positions off."""
    best, precision = [], []
    for row, query_id in zip(scores, query_ids, strict=True):
        positive = gallery_ids == query_id
        ranking = np.lexsort((~positive, -row))
        places = 1 + np.flatnonzero(positive[ranking])
        best.append(int(places[0]))
        precision.append(sum((i + 1) / p for i, p in enumerate(places) if p <= 10) / len(places))
    return best, precision


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@st.composite
def worlds(draw):
    """Integer features (exact products, many ties, negative scores) and ids that repeat on both sides."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m, d = draw(st.integers(1, 25)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    size = draw(st.sampled_from([1, 2, 30]))
    gallery_ids = rng.integers(-3, draw(st.sampled_from([-2, 1, 30])), m)
    q, g = (rng.integers(-size, size + 1, (k, d)).astype(np.float32) for k in (n, m))
    q[~q.any(1)], g[~g.any(1)] = 1, -1
    return q, g, rng.choice(gallery_ids, n), gallery_ids


@settings(deadline=None, max_examples=80)
@given(worlds(), st.integers(1, 30))
def test_ranks_equal_the_brute_force_reference_for_every_chunk_size(world, chunk_size) -> None:
    q, g, q_ids, g_ids = world
    best, precision = reference(q @ g.T, q_ids, g_ids)
    tensors = [torch.from_numpy(x) for x in world]
    for ranks in (
        retrieval_ranks(*tensors, chunk_size=chunk_size),
        retrieval_ranks_from_scores(torch.from_numpy(q @ g.T), tensors[2], tensors[3]),
    ):
        assert ranks.best.dtype == torch.int64
        assert ranks.average_precision_at_10.dtype == torch.float32
        assert ranks.best.tolist() == best
        np.testing.assert_allclose(ranks.average_precision_at_10.numpy(), precision, rtol=1e-6)


def test_real_valued_features_with_single_positives_in_any_order() -> None:
    q, g = unit(130, 16), unit(130, 16) + 0.8 * unit(130, 16, seed=1)
    shuffle = torch.randperm(130, generator=torch.Generator().manual_seed(2))
    best, precision = reference((q @ g[shuffle].T).numpy(), np.arange(130), shuffle.numpy())
    ranks = retrieval_ranks(q, g[shuffle], torch.arange(130), shuffle, chunk_size=50)
    assert ranks.best.tolist() == best
    np.testing.assert_allclose(ranks.average_precision_at_10.numpy(), precision, rtol=1e-6)


def test_a_large_gallery_shrinks_the_query_chunk_and_changes_nothing(monkeypatch) -> None:
    q, g = torch.sign(unit(20, 8)), torch.sign(unit(300, 8, seed=1))
    q_ids, g_ids = torch.arange(20) % 7, torch.arange(300) % 7
    expected = retrieval_ranks(q, g, q_ids, g_ids)
    largest = []
    count = retrieval.count_above
    monkeypatch.setattr(retrieval, "count_above", lambda s, t: largest.append(s.numel()) or count(s, t))
    monkeypatch.setattr(retrieval, "_MAX_SCORES", 1000)
    for ranks in (retrieval_ranks(q, g, q_ids, g_ids), retrieval_ranks_from_scores(q @ g.T, q_ids, g_ids)):
        assert torch.equal(ranks.best, expected.best)
        assert torch.equal(ranks.average_precision_at_10, expected.average_precision_at_10)
    assert max(largest) <= 1000


def test_negative_cosines_are_ranked_like_any_other() -> None:
    query, gallery = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    ranks = retrieval_ranks(query, gallery, torch.tensor([0]), torch.arange(3))
    assert ranks.best.tolist() == [3]


@pytest.mark.parametrize(("queries", "rows", "dim"), [(1, 7, 512), (3, 50, 48), (17, 279, 512), (100, 1001, 64)])
def test_equal_gallery_rows_tie_wherever_they_stand(queries, rows, dim) -> None:
    gallery = unit(1, dim).expand(rows, dim)
    ids = torch.arange(rows)
    query = unit(queries, dim, seed=1)
    for k in (0, rows // 2, rows - 1):
        assert (retrieval_ranks(query, gallery, ids[k].expand(queries), ids).best == 1).all()


def test_a_clip_counts_by_the_best_of_its_five_captions() -> None:
    """Two clips, five captions each: clip 0's captions stand at 2, 3, 5, 8 and 10; clip 1's at 1, 4, 6, 7 and 9."""
    order = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0, 1, 0])
    scores = torch.arange(10, 0, -1).float().expand(2, 10)
    ranks = retrieval_ranks_from_scores(scores, torch.arange(2), order)
    assert ranks.best.tolist() == [2, 1]
    assert recall_at_k(ranks.best, 1) == 0.5  # hit rate: not a fifth of the positives
    expected = [(1 / 2 + 2 / 3 + 3 / 5 + 4 / 8 + 5 / 10) / 5, (1 / 1 + 2 / 4 + 3 / 6 + 4 / 7 + 5 / 9) / 5]
    assert ranks.average_precision_at_10.tolist() == pytest.approx(expected)


def test_positives_below_rank_ten_still_divide_the_average_precision() -> None:
    scores = torch.arange(20, 0, -1).float()[None]
    gallery_ids = torch.ones(20, dtype=torch.int64)
    gallery_ids[[0, 10, 11, 15, 19]] = 0
    assert retrieval_ranks_from_scores(scores, torch.tensor([0]), gallery_ids).average_precision_at_10.item() == (
        pytest.approx(1 / 5)
    )


def test_more_than_ten_positives_all_on_top() -> None:
    ids = torch.zeros(40, dtype=torch.int64)
    ranks = retrieval_ranks(torch.ones(1, 3), torch.ones(40, 3), ids[:1], ids)
    assert ranks.best.tolist() == [1]
    assert ranks.average_precision_at_10.item() == pytest.approx(10 / 40)


def test_ranking_is_float32_under_autocast_and_reduced_matmul_precision() -> None:
    q, g, ids = unit(200, 64), unit(200, 64, seed=1), torch.arange(200)
    exact, before = retrieval_ranks(q, g, ids, ids), torch.get_float32_matmul_precision()
    rounded = retrieval_ranks_from_scores((q.bfloat16() @ g.bfloat16().T).float(), ids, ids)
    assert not torch.equal(exact.best, rounded.best)  # the case is one where bfloat16 matters
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(retrieval_ranks(q, g, ids, ids).best, exact.best)
            assert (q @ g.T).dtype == torch.bfloat16  # and the caller's autocast is on again
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_settings_come_back_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()

    def fail() -> None:
        with full_float32(torch.device("cpu")), torch.no_grad():
            raise KeyError

    pytest.raises(KeyError, fail)
    assert torch.get_float32_matmul_precision() == before


def test_half_precision_features_are_ranked_by_exact_products() -> None:
    q, g, ids = unit(50, 32).half(), unit(50, 32, seed=1).half(), torch.arange(50)
    assert torch.equal(retrieval_ranks(q, g, ids, ids).best, retrieval_ranks(q.float(), g.float(), ids, ids).best)


def test_summary_figures() -> None:
    best = torch.tensor([1, 2, 6, 11])
    assert (recall_at_k(best, 1), recall_at_k(best, 5), recall_at_k(best, 10)) == (0.25, 0.5, 0.75)
    assert median_rank(best) == 4
    assert median_rank(best[:3]) == 2
    assert mean_rank(best) == 5
    summary = retrieval_summary(retrieval.RetrievalRanks(best, 1 / best))
    expected = {"r1": 0.25, "r5": 0.5, "r10": 0.75, "median_rank": 4, "mean_rank": 5}
    assert summary == pytest.approx(expected | {"map10": (1 + 1 / 2 + 1 / 6 + 1 / 11) / 4})
    assert all(type(v) is float for v in summary.values())


IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((unit(4, 3), unit(4, 3), IDS + 2, IDS), ValueError, r"2 of 4 queries \(first: row 2, id 4\) have no positive"),
        ((unit(4, 3), unit(4, 5), IDS, IDS), ValueError, "gallery: got dimension 5, expected 3"),
        ((unit(4, 3), unit(4, 3), IDS[:3], IDS), ValueError, r"query_ids: got shape \(3,\), expected \(4,\)"),
        ((unit(4, 3), unit(4, 3), IDS, IDS.float()), TypeError, "gallery_ids: got torch.float32, expected int64"),
        ((unit(4, 3) / 0, unit(4, 3), IDS, IDS), ValueError, "query: .* NaN or infinite"),
        ((unit(4, 3), unit(4, 3) * 0, IDS, IDS), ValueError, "gallery: .* zero vectors"),
        ((unit(0, 3), unit(4, 3), IDS[:0], IDS), ValueError, "empty"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        retrieval_ranks(*arguments)


def test_bad_scores_chunk_sizes_and_ranks_are_refused() -> None:
    scores = torch.eye(4)
    with pytest.raises(TypeError, match="bfloat16, expected float32 or float64"):
        retrieval_ranks_from_scores(scores.bfloat16(), IDS, IDS)
    with pytest.raises(ValueError, match="1 entries are NaN"):
        retrieval_ranks_from_scores(scores.index_put((IDS[1], IDS[2]), torch.tensor(torch.nan)), IDS, IDS)
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        retrieval_ranks_from_scores(scores[0], IDS, IDS)
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        retrieval_ranks(scores, scores, IDS, IDS, chunk_size=0)
    with pytest.raises(ValueError, match="at least one query"):
        recall_at_k(IDS[:0], 1)


def test_an_excluded_gallery_row_ranks_last() -> None:
    scores = torch.tensor([[-torch.inf, 0.1, 0.2], [-torch.inf, 0.1, 0.2]])
    assert retrieval_ranks_from_scores(scores, torch.tensor([0, 2]), torch.arange(3)).best.tolist() == [3, 1]
