from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.encoders.hashing import HashingEncoder
from diffgap_lightning.integrations.candidates import embed_waveforms, rank_candidates
from diffgap_lightning.refiner import DiffGAPRefiner

B, K, D = 3, 4, 16


def rows(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.4, dim=-1)


@pytest.fixture(scope="module")
def refiner() -> DiffGAPRefiner:
    data = {"text": rows(120, D, seed=1), "audio": rows(120, D, seed=2)}
    return DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(120)), width=8, depth=1, rank=6)


def test_scores_are_those_of_each_pair_alone(refiner: DiffGAPRefiner) -> None:
    audio, prompt = rows(B, K, D, seed=3), rows(B, D, seed=4)
    found = rank_candidates(audio, prompt, refiner=refiner)
    for b in range(B):
        for k in range(K):
            pair = prompt[b, None], audio[b, k, None]
            assert float(found.scores["clap"][b, k]) == pytest.approx(float(pair[0] @ pair[1].T), abs=1e-6)
            fused = float(refiner.score(*pair, source="text", target="audio"))
            assert float(found.scores["refiner"][b, k]) == pytest.approx(fused, abs=1e-5)


@pytest.mark.parametrize("by", ["clap", "refiner"])
def test_best_first_by_the_chosen_score(refiner: DiffGAPRefiner, by: str) -> None:
    found = rank_candidates(rows(B, K, D, seed=3), rows(B, D, seed=4), refiner=refiner, by=by)
    ordered = found.scores[by].gather(1, found.order)
    assert (ordered.diff(dim=1) <= 0).all()
    assert all(sorted(row) == list(range(K)) for row in found.order.tolist())


def test_a_prompts_ranking_does_not_depend_on_the_others(refiner: DiffGAPRefiner) -> None:
    """The trap of pipelines that score all candidates against all prompts: here a rival prompt's perfect match."""
    audio, prompt = rows(B, K, D, seed=3), rows(B, D, seed=4)
    audio[1] = prompt[0]  # every candidate of prompt 1 sounds exactly like prompt 0
    together = rank_candidates(audio, prompt, refiner=refiner)
    for b in range(B):
        alone = rank_candidates(audio[b : b + 1], prompt[b : b + 1], refiner=refiner)
        assert alone.order[0].tolist() == together.order[b].tolist()
        torch.testing.assert_close(alone.scores["refiner"][0], together.scores["refiner"][b], atol=1e-5, rtol=1e-5)


def test_equal_candidates_keep_their_order() -> None:
    found = rank_candidates(rows(1, 1, D).expand(1, K, D), rows(1, D, seed=1))
    assert found.order.tolist() == [list(range(K))]


def test_spaces_of_different_widths_have_the_refiners_score_only() -> None:
    data = {"video": rows(120, 24, seed=1), "audio": rows(120, D, seed=2)}
    refiner = DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(120)), width=8, depth=1, rank=6)
    audio, prompt = rows(B, K, D, seed=3), rows(B, 24, seed=4)
    found = rank_candidates(audio, prompt, refiner=refiner, source="video", by="refiner")
    assert set(found.scores) == {"refiner"}
    with pytest.raises(ValueError, match="equal widths, got 24 and 16"):
        rank_candidates(audio, prompt, refiner=refiner, source="video")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, K, D\)"):
        rank_candidates(rows(B, D), rows(B, D))
    with pytest.raises(ValueError, match="needs a refiner"):
        rank_candidates(rows(B, K, D), rows(B, D), by="refiner")
    with pytest.raises(ValueError, match="'loudness'"):
        rank_candidates(rows(B, K, D), rows(B, D), by="loudness")  # type: ignore[arg-type]


def test_waveforms_are_resampled_to_the_encoders_rate() -> None:
    pytest.importorskip("torchaudio", reason="needs the extra media")
    encoder = HashingEncoder(dim=D, sample_rate=16000)
    t = torch.arange(24000) / 24000
    high = 0.3 * torch.sin(2 * torch.pi * 3000 * t)
    at16 = 0.3 * torch.sin(2 * torch.pi * 3000 * torch.arange(16000) / 16000)
    other = 0.3 * torch.sin(2 * torch.pi * 300 * torch.arange(16000) / 16000)
    resampled, direct, low = (
        embed_waveforms(encoder, [w], r)[0] for w, r in ((high, 24000), (at16, 16000), (other, 16000))
    )
    assert float(resampled @ direct) > 0.99 > float(low @ direct)
