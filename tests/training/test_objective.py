"""The loss of one direction: which rows see what, what it adds up to, and where its gradients go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.schedule import NoiseSchedule
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.losses import snr_weight
from diffgap_lightning.training.objective import Objective

C, R, B = 5, 4, 48
SCALE = torch.tensor(10.0).log()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Condition, x0 and ids."""
    g = generator()
    condition = torch.randn(n, C, generator=g)
    return condition, condition[:, :R] + 0.5 * torch.randn(n, R, generator=g), torch.arange(n)


class Recorder(nn.Module):
    """Stands for a direction's module: keeps what it was asked and answers with a known estimate."""

    schedule = NoiseSchedule("cosine")

    def __init__(self, error: Tensor) -> None:
        super().__init__()
        self.error = nn.Parameter(error)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        self.x_t, self.t, self.condition, self.keep = x_t, t, condition, keep
        return batch(len(x_t))[1] + self.error


def recorder(n: int = B) -> Recorder:
    return Recorder(torch.randn(n, R, generator=generator(3)))


def call(objective: Objective, cdm: nn.Module, n: int = B, ids: Tensor | None = None, seed: int = 0, scale=SCALE):
    condition, x0, own = batch(n)
    ids = own if ids is None else ids
    return objective(cdm, condition, x0, ids, x0, ids, scale, generator(seed))


def module(prediction: str = "x0") -> ContrastiveDiffusion:
    """With a network that has left its zero start."""
    condition, x0, _ = batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPDenoiser(R, C, width=16, depth=1, dropout=0.0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return ContrastiveDiffusion(GaussianDenoiser.fit(condition, x0), network, NoiseSchedule(), prediction)


def test_regression_is_the_error_of_the_posterior_mean_and_nothing_else() -> None:
    cdm = recorder()
    parts = call(Objective("regression", loss_weighting="eps", condition_dropout=0.9), cdm)
    assert torch.equal(cdm.t, torch.ones(B))
    assert not cdm.x_t.any()
    assert cdm.keep.all()
    assert set(parts) == {"loss", "denoising"}
    torch.testing.assert_close(parts["loss"], cdm.error.square().mean())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
def test_a_share_of_the_rows_trains_the_posterior_mean_and_the_rest_all_noise_levels(share) -> None:
    cdm = recorder()
    call(Objective(share_of_noise=share, condition_dropout=0.5), cdm)
    first = {0.0: 0, 0.25: 12, 0.3: 15, 1.0: 48}[share]
    assert torch.equal(cdm.t[:first], torch.ones(first))
    assert not cdm.x_t[:first].any()
    assert cdm.keep[:first].all()
    t, x_t, x0 = cdm.t[first:], cdm.x_t[first:], batch()[1][first:]
    if len(t):
        assert not cdm.keep[first:].all()
        assert len(set(t.tolist())) == len(t)
        assert t.min() < 0.05 < 0.9 < t.max() <= 1.0
        alpha, sigma = cdm.schedule.alpha_sigma(t)
        eps = (x_t - alpha[:, None] * x0) / sigma[:, None]
        assert abs(float(eps.mean())) < 0.25
        assert 0.75 < float(eps.std()) < 1.25


@pytest.mark.parametrize("weighting", ["x0", "eps", "v", "min_snr", "truncated_snr"])
def test_the_loss_counts_every_row_once_and_weights_all_but_those_at_t_1(weighting) -> None:
    cdm = recorder()
    parts = call(Objective(share_of_noise=0.25, loss_weighting=weighting), cdm)
    error = cdm.error.square().mean(1)
    weight = snr_weight(cdm.schedule.log_snr(cdm.t), weighting)
    weight[:12] = 1.0  # for eps and min-SNR it would be next to 0 there
    torch.testing.assert_close(parts["loss"], (weight * error).mean())
    assert torch.equal(parts["loss"], parts["denoising"])
    assert not parts["denoising"].requires_grad


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("name", ["diffusion", "regression"])
def test_gradients_reach_the_whole_network(prediction, name) -> None:
    cdm = module(prediction)
    call(Objective(name), cdm)["loss"].backward()
    grads = {k: p.grad for k, p in cdm.network.named_parameters()}
    without = {k for k, g in grads.items() if g is None or not g.any()}
    assert without == ({"no_condition"} if name == "regression" else set())
    assert all(g.isfinite().all() for g in grads.values() if g is not None)
    assert not any(True for _ in cdm.closed_form.parameters())  # fitted, never trained


def test_the_loss_falls_along_its_gradient() -> None:
    cdm = module()
    before = call(Objective(contrastive_weight=0.1), cdm)["loss"]
    before.backward()
    with torch.no_grad():
        for parameter in cdm.network.parameters():
            parameter -= 1e-3 * parameter.grad
    assert call(Objective(contrastive_weight=0.1), cdm)["loss"] < before


def by_hand(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, scale: float) -> float:
    """InfoNCE, row by row: every equal id is a positive."""
    unit = nn.functional.normalize
    total = 0.0
    for q, i in zip(unit(query, dim=1), query_ids, strict=True):
        weights = [torch.exp(scale * (q @ g)) for g in unit(gallery, dim=1)]
        positive = [w for w, j in zip(weights, gallery_ids, strict=True) if i == j]
        total -= float(torch.log(sum(positive) / sum(weights)))
    return total / len(query)


def test_the_contrastive_term_sees_the_rows_at_t_1_against_every_target() -> None:
    cdm, ids = recorder(), torch.arange(B) // 3
    condition, x0, _ = batch()
    extra = torch.randn(9, R, generator=generator(8))
    gallery, gallery_ids = torch.cat([x0, extra]), torch.cat([ids, torch.arange(9)])
    objective = Objective(share_of_noise=0.25, contrastive_weight=0.4)
    parts = objective(cdm, condition, x0, ids, gallery, gallery_ids, SCALE, generator())
    expected = by_hand((x0 + cdm.error.detach())[:12], gallery, ids[:12], gallery_ids, 10.0)
    assert float(parts["contrastive"]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(parts["loss"], parts["denoising"] + 0.4 * parts["contrastive"])
    assert not parts["contrastive"].requires_grad


def test_without_weight_there_is_no_contrastive_term_and_the_temperature_is_not_trained() -> None:
    scale = nn.Parameter(SCALE.clone())
    parts = call(Objective(), recorder(), scale=scale)
    assert "contrastive" not in parts
    parts["loss"].backward()
    assert scale.grad is None
    call(Objective(contrastive_weight=0.1), recorder(), scale=scale)["loss"].backward()
    assert scale.grad != 0


def test_equal_ids_are_never_negatives() -> None:
    """With one id in the whole batch there is nothing to tell apart, however unlike the rows are."""
    objective = Objective("regression", contrastive_weight=1.0)
    same = call(objective, module(), ids=torch.full((B,), 7))
    assert float(same["contrastive"]) == pytest.approx(0, abs=1e-5)
    assert float(call(objective, module())["contrastive"]) > 0.1


def test_condition_noise_has_the_given_spread_and_leaves_the_batch_alone() -> None:
    condition, x0, ids = batch(400)
    before, cdm = condition.clone(), recorder(400)
    Objective(condition_noise=0.3)(cdm, condition, x0, ids, x0, ids, SCALE, generator())
    assert float((cdm.condition - condition).std()) == pytest.approx(0.3, rel=0.1)
    assert torch.equal(condition, before)
    Objective()(cdm, condition, x0, ids, x0, ids, SCALE, generator())
    assert torch.equal(cdm.condition, condition)


@pytest.mark.parametrize(("dropout", "least", "most"), [(0.0, 300, 300), (0.2, 220, 260), (1.0, 0, 0)])
def test_conditions_are_dropped_at_the_given_rate_outside_t_1(dropout, least, most) -> None:
    cdm = recorder(400)
    call(Objective(condition_dropout=dropout), cdm, n=400)
    assert cdm.keep[:100].all()
    assert least <= int(cdm.keep[100:].sum()) <= most


def test_the_generator_decides_everything() -> None:
    objective = Objective(condition_noise=0.1, condition_dropout=0.5, contrastive_weight=0.1)
    before, cdm = torch.get_rng_state(), module()
    losses = [call(objective, cdm, seed=seed)["loss"].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_batches_of_very_few_rows(n) -> None:
    for name in ("diffusion", "regression"):
        parts = call(Objective(name, contrastive_weight=0.1), recorder(n), n=n)
        assert parts["loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "flow"}, "objective: got 'flow', expected one of diffusion, regression"),
        ({"contrastive_weight": -0.1}, "contrastive_weight: got -0.1, expected a number >= 0"),
        ({"condition_noise": -1.0}, "condition_noise: got -1.0"),
        ({"contrastive_weight": 0.1, "share_of_noise": 0.0}, "share_of_noise: got 0, but contrastive_weight > 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_at_once(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        Objective(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"condition_dropout": 1.5}, "condition_dropout: got 1.5"),
        ({"share_of_noise": -0.5}, "share_of_noise: got -0.5"),
        ({"loss_weighting": "snr"}, "loss_weighting: got 'snr'"),
    ],
    ids=str,
)
def test_other_settings_are_refused_at_the_first_step(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        call(replace(Objective(), **options), recorder())
