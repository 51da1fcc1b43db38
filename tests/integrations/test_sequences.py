"""A refiner of sequences in Diff-Foley's place: its CAVP features `(B, 32, 512)` go in and come out whole."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.diff_foley import refine_features
from diffgap_lightning.refiner import DiffGAPRefiner

VA = {"source": "video", "target": "audio"}


def frames(n: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, 32, 512, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_diff_foleys_features_are_refined_as_wholes() -> None:
    data = {"video": frames(6, 0), "audio": frames(6, 1)}
    refiner = DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(6)), rank=4, width=32, depth=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in refiner.cdm.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    x = frames(2, 2)
    options = {"strength": 0.5}
    found = refine_features(refiner, x, seed=3, **options)
    assert torch.equal(found, refiner.refine(x, **VA, **options, generator=torch.Generator().manual_seed(3)))
    condition = Conditioner(refiner, source="video", num_samples=2, per_candidate=True, strength=0.5)
    tiled = condition(x, 3)
    assert tiled.shape == (6, 32, 512)
    assert torch.allclose(tiled.norm(dim=-1), torch.ones(6, 32), atol=1e-5)
    assert not torch.equal(tiled[0], tiled[1])
