"""Refining from several sources: two are better than either, any may be missing, one is the ordinary path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner.product import PosteriorProduct, presence_groups

SOURCES = ("text", "video")


def world(n: int, seed: int) -> dict[str, Tensor]:
    """Audio made of 8 latents; text tells the first five, video the last five, both with noise."""
    maps, g = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 8, generator=g)
    parts = {"audio": latent, "text": latent[:, :5], "video": latent[:, 3:]}
    rows = {}
    for name, part in parts.items():
        seen = part if name == "audio" else part + 0.3 * torch.randn(part.shape, generator=g)
        raw = seen @ torch.randn(part.shape[1], 24, generator=maps) + 3 * torch.randn(24, generator=maps)
        rows[name] = normalize(raw + 0.3 * torch.randn(n, 24, generator=g), dim=1)
    return rows


@pytest.fixture(scope="module")
def three() -> DiffGAPRefiner:
    rows = world(1500, 0)
    ids = {m: torch.arange(1500) for m in rows}
    return DiffGAPRefiner.measure(rows, ids, [("text", "audio"), ("video", "audio")], rank=12, width=8, depth=1)


@pytest.fixture(scope="module")
def test_rows() -> dict[str, Tensor]:
    return world(400, 1)


def both(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {m: rows[m] for m in SOURCES}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("strength", [0.0, 0.2, 1.0])
def test_two_sources_are_better_than_either(three, test_rows, strength: float) -> None:
    options = {"target": "audio", "strength": strength, "start": "posterior_mean"}
    cosine = {
        m: float(
            cosine_similarity(
                three.refine(test_rows[m], source=m, generator=seeded(), **options), test_rows["audio"]
            ).mean()
        )
        for m in SOURCES
    }
    together = three.refine(both(test_rows), generator=seeded(), **options)
    assert float(cosine_similarity(together, test_rows["audio"]).mean()) > max(cosine.values()) + 0.03


def test_the_start_has_the_variance_of_the_target(three, test_rows) -> None:
    produced = three.refine(both(test_rows), target="audio", strength=0.0, start="posterior_mean")
    spread = [three.space.encode(x, "audio").square().mean() for x in (produced, test_rows["audio"])]
    assert spread[0] / spread[1] == pytest.approx(1, abs=0.1)


def test_one_source_is_the_ordinary_path(three, test_rows) -> None:
    alone = three.refine(test_rows["text"], source="text", target="audio", generator=seeded())
    for given in ({"text": test_rows["text"]}, {"text": test_rows["text"], "video": None}):
        assert torch.equal(three.refine(given, target="audio", generator=seeded()), alone)


def test_rows_may_lack_a_source(three, test_rows) -> None:
    rows, has_video = both(test_rows), torch.arange(400) % 3 > 0
    rows["video"] = torch.where(has_video[:, None], rows["video"], torch.nan)
    mixed = three.refine(rows, target="audio", present={"video": has_video}, strength=0.0, start="posterior_mean")
    options = {"target": "audio", "strength": 0.0, "start": "posterior_mean"}
    full = three.refine({m: x[has_video] for m, x in rows.items()}, **options)
    text = three.refine(rows["text"][~has_video], source="text", **options)
    torch.testing.assert_close(mixed[has_video], full)
    torch.testing.assert_close(mixed[~has_video], text)


def test_samples_have_a_dimension_of_their_own(three, test_rows) -> None:
    few = {m: test_rows[m][:3] for m in SOURCES}
    samples = three.refine(few, target="audio", num_samples=5, strength=1.0, generator=seeded())
    assert samples.shape == (3, 5, 24)
    assert samples.var(1).sum() > 0
    torch.testing.assert_close(samples.norm(dim=-1), torch.ones(3, 5))


def test_the_product_of_gaussians_is_exact(three, test_rows) -> None:
    """At any noise level, the mean of prod_k N(x0; m_k, S_k) N(x_t; a x0, s^2) / prior^(K - 1)."""
    conditions = [three.space.encode(test_rows[m][:4], m) for m in SOURCES]
    cdms = [three.cdm_of(m, "audio") for m in SOURCES]
    x_t, t = torch.randn(4, 12, generator=seeded()), torch.tensor(0.6)
    alpha, sigma = (w.double() for w in cdms[0].schedule.alpha_sigma(t))
    inverse = {
        (k, i): torch.linalg.inv(
            (c.closed_form.basis[i].double() * c.closed_form.variance[i].double()) @ c.closed_form.basis[i].T.double()
        )
        for k, c in enumerate(cdms)
        for i in (0, 1)
    }
    prior = (inverse[0, 1] + inverse[1, 1]) / 2
    precision = inverse[0, 0] + inverse[1, 0] - prior + torch.eye(12) * (alpha / sigma) ** 2
    pull = sum(
        c.closed_form.mean(z).double() @ inverse[k, 0] for k, (c, z) in enumerate(zip(cdms, conditions, strict=True))
    )
    expected = torch.linalg.solve(precision, (pull + x_t.double() * alpha / sigma**2).T).T
    found = PosteriorProduct(cdms, conditions).denoiser()(x_t, t)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=2e-2)


def test_more_sources_never_explain_less(three, test_rows) -> None:
    conditions = [three.space.encode(test_rows[m][:4], m) for m in SOURCES]
    together, alone = PosteriorProduct([three.cdm_of(m, "audio") for m in SOURCES], conditions).explained()
    assert 1 > together > max(alone) > 0


def test_guidance_changes_the_product(three, test_rows) -> None:
    few = {m: test_rows[m][:3] for m in SOURCES}
    out = [three.refine(few, target="audio", strength=1.0, guidance_scale=g, generator=seeded()) for g in (1.0, 2.0)]
    assert not torch.allclose(*out)


def test_groups_keep_every_row_once() -> None:
    present = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([True, True, False, True])}
    groups = presence_groups(present, 4)
    assert [(names, rows.tolist()) for names, rows in groups][0] == (("a", "b"), [0, 3])
    assert sorted(int(r) for _, rows in groups for r in rows) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": {}}, "got none"),
        ({"embedding": {"text": None}}, "got none"),
        ({"embedding": {"text": torch.eye(24)[:2], "video": torch.eye(24)[:3]}}, "as many of each"),
        ({"present": {"smell": torch.ones(2, dtype=torch.bool)}}, "smell"),
        ({"present": {"text": torch.ones(2)}}, "bool"),
        ({"present": {m: torch.tensor([True, False]) for m in SOURCES}}, "row 1 of 2 has no source"),
        ({"start": "source"}, "posterior_mean"),
        ({"target": "text"}, "this refiner knows"),
        ({"source": "text"}, "source"),
    ],
)
def test_wrong_use_is_refused(three, change: dict, message: str) -> None:
    good = {"embedding": {m: torch.eye(24)[:2] for m in SOURCES}, "target": "audio"}
    with pytest.raises(ValueError, match=message):
        three.refine(**(good | change))


def test_presence_belongs_to_several_sources(three) -> None:
    with pytest.raises(ValueError, match="belongs to one tensor"):
        three.refine(torch.eye(24)[:2], source="text", target="audio", present={})
