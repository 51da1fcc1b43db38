"""Seeds, lengths and refined rows: what every `EmbeddingGenerator` shares."""

from __future__ import annotations

import torch

from diffgap_lightning.integrations.conditions import RefineOptions, refine_rows
from diffgap_lightning.integrations.generator import derive_seed, fit_length
from diffgap_lightning.refiner import DiffGAPRefiner


def test_rows_are_refined_with_noise_of_their_own(sound_refiner: DiffGAPRefiner) -> None:
    rows = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    together = refine_rows(sound_refiner, rows, [5, 6, 5], "text", "audio", RefineOptions(strength=0.5))
    expected = sound_refiner.refine(
        rows[1:2], source="text", target="audio", strength=0.5, start="posterior_mean",
        generator=torch.Generator().manual_seed(6),
    )  # fmt: skip
    torch.testing.assert_close(together[1:2], expected)
    again = refine_rows(sound_refiner, rows[[2]], [5], "text", "audio", RefineOptions(strength=0.5))
    torch.testing.assert_close(again, together[2:])


def test_seeds_differ_by_every_part() -> None:
    seeds = {derive_seed(s, key, k) for s in (0, 1) for key in ("a", "b", "ab") for k in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab")
    assert fit_length(torch.ones(1, 3), 5).tolist() == [[1, 1, 1, 0, 0]]
