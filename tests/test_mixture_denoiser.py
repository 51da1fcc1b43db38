"""The mixture as a refiner's closed form: the bridge's mean in coordinates, and what a saved refiner keeps of it."""

from __future__ import annotations

import pytest
import torch

from diffgap_lightning.bridges import MixtureBridge
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.mixture_denoiser import MixtureDenoiser
from diffgap_lightning.refiner import DiffGAPRefiner

WORLD = SyntheticWorld(latent_dim=6, num_concepts=12, num_modes=2, dim=16, hidden_dim=12, gap=3.0)


def rows(n: int, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    sample = WORLD.sample(n, seed=seed)
    return {"text": sample.text, "audio": sample.audio}, {m: torch.arange(n) for m in ("text", "audio")}


@pytest.fixture(scope="module")
def refiner() -> DiffGAPRefiner:
    return DiffGAPRefiner.measure(*rows(MixtureBridge.least_rows, 0), width=8, depth=1, blend=0.0)


def test_many_pairs_make_the_mixture_the_closed_form_and_few_do_not(refiner: DiffGAPRefiner) -> None:
    assert isinstance(refiner.cdm_of("text", "audio").closed_form, MixtureDenoiser)
    few = DiffGAPRefiner.measure(*rows(500, 0), width=8, depth=1)
    assert "mixture" not in few.bridges
    assert type(few.cdm_of("text", "audio").closed_form) is GaussianDenoiser


def test_an_untrained_posterior_mean_is_that_of_the_bridge(refiner: DiffGAPRefiner) -> None:
    text = rows(50, 1)[0]["text"]
    bridge = refiner.bridges["mixture"]
    expected = bridge.conditional_mean("text", "audio")(bridge.centre(text, "text"))
    mean = refiner.cdm_of("text", "audio").posterior_mean(refiner.space.encode(text, "text"))
    torch.testing.assert_close(refiner.space.offset(mean, "audio"), expected, atol=1e-4, rtol=1e-3)


def test_dropped_conditions_have_no_mean(refiner: DiffGAPRefiner) -> None:
    condition = refiner.space.encode(rows(4, 2)[0]["text"], "text")
    keep = torch.tensor([True, False, True, False])
    mean = refiner.cdm_of("text", "audio").closed_form.mean(condition, keep)
    assert (mean[~keep] == 0).all()
    assert (mean[keep] != 0).any()


def test_saved_and_loaded_it_refines_and_scores_bit_for_bit(refiner: DiffGAPRefiner, tmp_path) -> None:
    loaded = DiffGAPRefiner.from_pretrained(refiner.save_pretrained(tmp_path / "refiner"))
    new = rows(20, 3)[0]
    one, two = (
        r.refine(new["text"], source="text", target="audio", generator=torch.Generator().manual_seed(0))
        for r in (refiner, loaded)
    )
    assert torch.equal(one, two)
    scores = (r.score(new["text"], new["audio"], source="text", target="audio") for r in (refiner, loaded))
    assert torch.equal(*scores)
