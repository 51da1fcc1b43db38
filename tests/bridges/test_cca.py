"""CCA against its formula, and what its automatic choice chooses."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import CCABridge, RidgeBridge, cca_choice
from diffgap_lightning.bridges.cca_choice import CCAChoice, best_choice, moments_of, open_choices
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.functional.linear import canonical_correlations

unit = torch.nn.functional.normalize


def world(n=400, d=12, noise=0.5, distractors=0, seed=0):
    """A shared latent; `distractors` loud dimensions of each side that say nothing about the other."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 6, generator=g)
    sides = []
    for _ in range(2):
        rows = latent @ torch.randn(6, d, generator=g) + noise * torch.randn(n, d, generator=g)
        loud = 6 * torch.randn(n, distractors, generator=g)
        sides.append(unit(torch.cat([rows, loud], 1) + torch.randn(d + distractors, generator=g), dim=1))
    return {"text": sides[0], "audio": sides[1]}, {"text": torch.arange(n), "audio": torch.arange(n)}


def paired(embeddings, ids):
    a, b = (embeddings[m] - embeddings[m].mean(0) for m in ("audio", "text"))
    return PairedRows.find(a, b, ids["audio"], ids["text"], "a and b")


def r1(bridge, rows):
    scores = bridge.score(rows["text"], rows["audio"], source="text", target="audio")
    return float((scores.argmax(1) == torch.arange(len(scores))).float().mean())


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_score_is_the_weighted_canonical_cosine_plus_the_centred_one(power):
    embeddings, ids = world()
    bridge = CCABridge(rank=8, shrinkage=0.2, power=power, centred_weight=0.4).fit(embeddings, ids)
    x, y = (embeddings[m] - embeddings[m].mean(0) for m in ("text", "audio"))
    w_x, w_y, c = canonical_correlations(x, y, rank=8, shrinkage=0.2)
    expected = unit(x @ (w_x * c**power)) @ unit(y @ (w_y * c**power)).T + 0.4 * unit(x) @ unit(y).T
    score = bridge.score(embeddings["text"], embeddings["audio"], source="text", target="audio")
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)


def test_refine_is_a_regression_of_reduced_rank():
    embeddings, ids = world()
    bridge = CCABridge(rank=3, shrinkage=0.1, centred_weight=0.0).fit(embeddings, ids)
    assert int(torch.linalg.matrix_rank(bridge._get("map:text->audio"), rtol=1e-4)) == 3
    full = CCABridge(rank=12, shrinkage=0.0, centred_weight=0.0).fit(embeddings, ids)
    ridge = RidgeBridge(penalty=1e-6).fit(embeddings, ids)
    a, b = (m.refine(embeddings["text"], source="text", target="audio") for m in (full, ridge))
    assert float((a * b).sum(1).mean()) > 0.995


def test_canonical_coordinates_ignore_what_is_loud_and_says_nothing():
    embeddings, ids = world(n=600, distractors=4)
    fit = {m: x[:400] for m, x in embeddings.items()}
    new = {m: x[400:] for m, x in embeddings.items()}
    bridge = CCABridge().fit(fit, {m: i[:400] for m, i in ids.items()})
    plain = RidgeBridge().fit(fit, {m: i[:400] for m, i in ids.items()})
    assert r1(bridge, new) > r1(plain, new) + 0.1


def test_given_options_are_kept_and_auto_fills_the_rest():
    choices = open_choices(rank=7, shrinkage="auto", power=1.0, centred_weight=0.25)
    assert {(c.rank, c.power, c.centred_weight) for c in choices} == {(7, 1.0, 0.25)}
    assert len({c.shrinkage for c in choices}) == len(choices) > 3
    bridge = CCABridge(rank=7, power=1.0).fit(*world(n=60))
    assert bridge.chosen["audio", "text"].rank == 7
    assert bridge.chosen["audio", "text"].power == 1.0


def test_few_noisy_rows_choose_more_shrinkage_than_many():
    few, many = (
        CCABridge(rank=32, power=1.0, centred_weight=0.0).fit(*world(n=n, d=40, noise=1.0)).chosen["audio", "text"]
        for n in (50, 3000)
    )
    assert few.shrinkage > many.shrinkage


def test_choice_is_that_of_a_plain_cross_validation():
    """Refit from the rows themselves in every fold, instead of from differences of moments."""
    rows = paired(*world(n=120, noise=1.0))
    choices = open_choices(rank=8, shrinkage="auto", power=1.0, centred_weight=0.0)
    loss = dict.fromkeys(choices, 0.0)
    for held in rows.held_out(5, 500, seed=3):
        rest = rows.of(~torch.isin(rows.first_ids[rows.i], held.first_ids))
        positive = held.first_ids[:, None] == held.second_ids
        for choice in choices:
            w_x, w_y, c = canonical_correlations(rest.x, rest.y, choice.rank, choice.shrinkage)
            cosine = unit(held.first @ (w_x * c)) @ unit(held.second @ (w_y * c)).T
            loss[choice] += cca_choice._contrastive_loss(cosine, positive)
    assert best_choice(choices, rows, moments_of(rows), seed=3) == min(loss, key=loss.__getitem__)


def test_contrastive_loss_prefers_right_scores_and_counts_all_positives():
    positive = torch.eye(4, dtype=torch.bool)
    assert cca_choice._contrastive_loss(torch.eye(4), positive) < cca_choice._contrastive_loss(
        torch.ones(4, 4), positive
    )
    every = torch.ones(2, 3, dtype=torch.bool)
    assert cca_choice._contrastive_loss(torch.randn(2, 3), every) == pytest.approx(0.0, abs=1e-6)


def test_with_a_single_id_there_is_nothing_to_choose_by():
    embeddings, _ = world(n=6)
    ids = {m: torch.zeros(6, dtype=torch.int64) for m in embeddings}
    bridge = CCABridge().fit(embeddings, ids)
    assert isinstance(bridge.chosen["audio", "text"], CCAChoice)
