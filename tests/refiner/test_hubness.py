"""The hub correction: its definition, that it looks at one row alone, and that it helps where there are hubs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.functional.retrieval import recall_at_k, retrieval_ranks
from diffgap_lightning.refiner import hubness
from diffgap_lightning.refiner.hubness import HubCorrection


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_log_mean_exponential_of_scores_to_the_bank() -> None:
    bank = normalize(randn(9, 4)), normalize(randn(7, 4, seed=1))
    hub = HubCorrection.fit(*bank)
    q, g = normalize(randn(3, 4, seed=2)), normalize(randn(5, 4, seed=3))
    score = hub(q, True) @ hub(g, False).T
    near_q = torch.stack([torch.stack([(10 * a @ b).exp() for b in bank[1]]).mean().log() / 10 for a in q])
    near_g = torch.stack([torch.stack([(10 * a @ b).exp() for b in bank[0]]).mean().log() / 10 for a in g])
    torch.testing.assert_close(score, -near_q[:, None] - near_g, atol=1e-5, rtol=1e-4)


def test_the_scale_of_the_features_does_not_matter_to_the_ranks() -> None:
    bank = randn(20, 4), randn(20, 4, seed=1)
    g = randn(6, 4, seed=2)
    small, large = (HubCorrection.fit(bank[0] * s, bank[1] * s)(g * s, False) for s in (0.1, 10.0))
    assert small.shape == (6, 2)
    assert torch.equal(small[:, 1].argsort(), large[:, 1].argsort())


def test_a_large_bank_is_a_fixed_subset(monkeypatch) -> None:
    monkeypatch.setattr(hubness, "MAX_ROWS", 8)
    one, two = (HubCorrection.fit(randn(50, 4), randn(6, 4, seed=1)) for _ in range(2))
    assert one.source.shape == (8, 4)
    assert one.target.shape == (6, 4)
    assert torch.equal(one.source, two.source)


def test_where_some_candidates_are_near_to_everything_it_finds_more() -> None:
    # A fifth of the candidates are moved towards the middle of all queries and turn up for queries of others.
    def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
        latent, middle = randn(n, 12, seed=seed), randn(12, seed=99)
        q = latent + 0.6 * randn(n, 12, seed=seed + 1) + 0.7 * middle
        g = latent + 0.6 * randn(n, 12, seed=seed + 2)
        g[::5] += 1.5 * middle
        return normalize(q, dim=1), normalize(g, dim=1)

    hub, (q, g), ids = HubCorrection.fit(*rows(300, 0)), rows(200, 10), torch.arange(200)
    corrected = [torch.cat([x, 0.5**0.5 * hub(x, side)], 1) for x, side in ((q, True), (g, False))]
    plain, better = (recall_at_k(retrieval_ranks(*f, ids, ids).best, 1) for f in ((q, g), corrected))
    assert better > plain + 0.03
