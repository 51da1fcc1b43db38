from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from diffgap_lightning.functional.frechet import frechet_distance
from diffgap_lightning.functional.generation import (
    clap_scores,
    inception_score,
    kernel_audio_distance,
    kl_divergences,
)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: torch.Tensor, covariance: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Rows whose sample mean and covariance are exactly the given ones."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


# --- Frechet distance between two known Gaussians, the closed form by scipy's matrix square root


@pytest.mark.parametrize(("n", "d"), [(400, 5), (300, 64)])
def test_frechet_distance_of_two_known_gaussians_is_the_formula(n: int, d: int) -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="the reference is scipy's matrix square root")
    a, b = (normal(2 * d, d, seed) for seed in (1, 2))
    c1, c2 = a.T @ a / d, b.T @ b / d + 0.1 * torch.eye(d)
    m1, m2 = normal(2, d, 3)
    x, y = exactly(m1, c1, n, 4), exactly(m2, c2, n + 50, 5)
    root = np.real(linalg.sqrtm((c1 @ c2).numpy()))
    formula = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * np.trace(root)
    assert frechet_distance(x, y) == pytest.approx(float(formula), abs=1e-3)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x.float(), x.float()) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_sampled_gaussians_tends_to_the_formula() -> None:
    x, y = normal(100_000, 3), 2 * normal(100_000, 3, 1) + torch.tensor([1.0, 0, 0])
    assert frechet_distance(x, y) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.02)


# --- kernel audio distance


def kad_loop(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition, pair by pair; sigma is the median distance of two different rows of y."""
    sigma = np.median([math.dist(a, b) for a, b in itertools.combinations(y.tolist(), 2)])

    def k(a: list[float], b: list[float]) -> float:
        return math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2))

    xs, ys = x.tolist(), y.tolist()
    within = [np.mean([k(a, b) for a, b in itertools.permutations(rows, 2)]) for rows in (xs, ys)]
    return 100 * float(sum(within) - 2 * np.mean([k(a, b) for a in xs for b in ys]))


@pytest.mark.parametrize(("n", "m", "d"), [(7, 11, 3), (6, 5, 20)])
def test_kad_is_its_definition(n: int, m: int, d: int) -> None:
    x, y = normal(n, d) + 0.5, normal(m, d, 1)
    assert kernel_audio_distance(x, y) == pytest.approx(kad_loop(x, y), abs=1e-9)


def test_kad_is_unbiased_over_all_subsamples() -> None:
    """The mean over all subsets of two finite populations is the populations' own value, at every size of subset."""
    x, y = normal(7, 2) + 0.7, normal(6, 2, 1)
    sigma = 1.3
    whole = kernel_audio_distance(x, y, sigma)
    for size in (2, 3, 5):
        values = [
            kernel_audio_distance(x[list(i)], y[list(j)], sigma)
            for i in itertools.combinations(range(7), size)
            for j in itertools.combinations(range(6), size)
        ]
        assert np.mean(values) == pytest.approx(whole, abs=1e-9)


def test_kad_of_subsamples_of_one_gaussian_is_zero_on_average_where_the_frechet_distance_is_biased() -> None:
    kad, fd = [], []
    for seed in range(200):
        x, y = normal(20, 4, seed), normal(20, 4, 1000 + seed)
        kad.append(kernel_audio_distance(x, y, 2.0))
        fd.append(frechet_distance(x, y))
    assert abs(np.mean(kad)) < 3 * np.std(kad) / math.sqrt(200)
    assert min(kad) < 0
    assert np.mean(fd) > 10 * np.std(fd) / math.sqrt(200)


def test_kad_of_one_dimensional_gaussians_in_closed_form() -> None:
    """E k(x, y) = sigma / sqrt(s) exp(-m^2 / 2s) with s = sigma^2 + the variance of x - y, m its mean."""

    def mean_kernel(m: float, variance: float) -> float:
        return math.exp(-(m**2) / (2 * (1 + variance))) / math.sqrt(1 + variance)

    expected = 100 * (mean_kernel(0, 2) + mean_kernel(0, 8) - 2 * mean_kernel(1, 5))
    quantile = torch.special.ndtri((torch.arange(3000, dtype=torch.float64)[:, None] + 0.5) / 3000)
    assert kernel_audio_distance(quantile, 2 * quantile + 1, 1.0) == pytest.approx(expected, abs=0.05)


# --- KL


def kl_loop(generated: torch.Tensor, reference: torch.Tensor) -> list[float]:
    rows = []
    for q, p in zip(generated.softmax(1).tolist(), reference.softmax(1).tolist(), strict=True):
        rows.append(sum(a * (math.log(a) - math.log(b + 1e-6)) for a, b in zip(p, q, strict=True)))
    return rows


def test_kl_is_per_pair_from_reference_to_generated_over_the_softmax_with_eps() -> None:
    q, p = 3 * normal(6, 9), 3 * normal(6, 9, 1)
    values = kl_divergences(q, p)
    assert values.tolist() == pytest.approx(kl_loop(q, p), abs=1e-12)
    theirs = torch.nn.functional.kl_div((q.softmax(1) + 1e-6).log(), p.softmax(1), reduction="sum") / len(q)
    assert values.mean().item() == pytest.approx(theirs.item(), abs=1e-12)  # as audioldm_eval writes it
    assert values.mean() != pytest.approx(kl_divergences(p, q).mean().item(), rel=1e-3)


def test_kl_of_a_clip_with_itself_is_zero_and_a_missing_class_costs_log_eps() -> None:
    logits = normal(4, 527)
    assert kl_divergences(logits, logits).abs().max() < 527 * 1e-6
    certain = torch.tensor([[1e4, 0.0]])
    assert kl_divergences(certain.flip(1), certain).item() == pytest.approx(-math.log(1e-6), rel=1e-6)


def test_kl_in_half_precision_is_that_of_its_float64_values() -> None:
    q, p = normal(5, 30).half(), normal(5, 30, 1).half()
    assert torch.equal(kl_divergences(q, p), kl_divergences(q.double(), p.double()))


# --- inception score


def test_inception_score_of_certain_balanced_classes_is_their_number_and_of_equal_clips_is_one() -> None:
    certain = 1e4 * torch.eye(8).repeat(5, 1)
    assert inception_score(certain, splits=1)[0] == pytest.approx(8)
    assert inception_score(normal(1, 8).repeat(40, 1)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_inception_score_is_that_of_the_loop_over_ten_splits() -> None:
    logits = 2 * normal(47, 6)
    order = torch.randperm(47, generator=torch.Generator().manual_seed(5))
    p = logits[order].softmax(1).numpy()
    scores = []
    for i in range(10):
        part = p[i * 47 // 10 : (i + 1) * 47 // 10]
        scores.append(math.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), 1))))
    mean, deviation = inception_score(logits, generator=torch.Generator().manual_seed(5))
    assert (mean, deviation) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))


def test_inception_score_is_that_of_torchmetrics_on_the_same_splits() -> None:
    """One split has no shuffle in it, so the two must agree exactly."""
    image = pytest.importorskip("torchmetrics.image.inception", reason="an independent implementation")
    logits = normal(30, 7).float()
    try:
        metric = image.InceptionScore(feature=torch.nn.Identity(), splits=1)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    metric.update(logits)
    assert inception_score(logits, splits=1)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_two_clips_a_split_are_enough_for_an_inception_score_and_fewer_are_refused() -> None:
    mean, deviation = inception_score(1e4 * torch.eye(6).double(), splits=3)
    assert (mean, deviation) == (pytest.approx(2), pytest.approx(0, abs=1e-9))  # two certain, different clips
    with pytest.raises(ValueError, match="5 clips for 3 splits"):
        inception_score(normal(5, 4), splits=3)


def test_inception_score_does_not_touch_the_global_seed() -> None:
    logits = normal(40, 5)
    state = torch.get_rng_state()
    first = inception_score(logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert inception_score(logits) == first


# --- CLAP score


def test_clap_scores_are_cosines_of_pairs_at_any_length() -> None:
    x, y = normal(5, 8), normal(5, 8, 1)
    expected = [float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, y, strict=True)]
    assert clap_scores(x, y).tolist() == pytest.approx(expected)
    assert clap_scores(3 * x, 0.1 * y).tolist() == pytest.approx(expected)
    assert clap_scores(x, x).tolist() == pytest.approx([1.0] * 5)


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_audio_distance(normal(1, 3), normal(5, 3)), "generated: got 1 row"),
        (lambda: kernel_audio_distance(normal(5, 3), normal(5, 4)), "reference: got dimension 4, expected 3"),
        (lambda: kl_divergences(normal(3, 4), normal(2, 4)), "expected pairs of one shape"),
        (lambda: kl_divergences(normal(3, 4).log(), normal(3, 4)), "generated: NaN"),
        (lambda: kl_divergences(normal(3, 4)[0], normal(3, 4)), r"generated: got shape \(4,\)"),
        (lambda: inception_score(normal(19, 4)), "got 19 clips for 10 splits"),
        (lambda: clap_scores(normal(3, 4), normal(2, 4)), "got 3 audio and 2 caption"),
    ],
)
def test_what_has_no_answer_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
