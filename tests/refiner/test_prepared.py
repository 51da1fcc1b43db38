"""A prepared refiner is `refine` with its options fixed, for every option, and so is its exported program."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap_lightning.refiner import DiffGAPRefiner


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def check_same(refiner: DiffGAPRefiner, text: Tensor, tolerance: float = 1e-5, **options: Any) -> None:
    expected = refiner.refine(text, source="text", target="audio", generator=generator(), **options)
    prepared = refiner.prepare(source="text", target="audio", **options)
    torch.testing.assert_close(prepared.refine(text, generator()), expected, rtol=0, atol=tolerance)


@pytest.fixture
def embeddings(rows: Callable[..., Any]) -> Tensor:
    return rows(seed=3)[0]["text"][:12]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_steps": 1}, {"strength": 0.6}, {"strength": 1.0, "start": "posterior_mean"}, {"sampler": "ddim"},
        {"start": "source", "num_steps": 4},
    ],
    ids=str,
)  # fmt: skip
def test_it_is_refine(refiner: DiffGAPRefiner, embeddings: Tensor, options: dict[str, Any]) -> None:
    check_same(refiner, embeddings, **options)


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
@pytest.mark.parametrize("rank", [5, "full"])
def test_it_is_refine_in_every_space(rows: Any, excite: Any, rank: Any, prediction: str) -> None:
    table, ids = rows(n=160)
    made = DiffGAPRefiner.measure(table, ids, rank=rank, width=12, depth=2, prediction=prediction, few_pairs=0)
    check_same(excite(made), table["text"][:7], tolerance=3e-5)


def test_kernel_means_and_unequal_dimensions(rows: Any, excite: Any) -> None:
    table, ids = rows(n=40)
    kernel = DiffGAPRefiner.measure(table, ids, rank=6, width=8, depth=0, few_pairs=2000)
    check_same(excite(kernel), table["text"][:3])
    table, ids = rows(n=160, dims={"text": 9, "audio": 16})
    check_same(excite(DiffGAPRefiner.measure(table, ids, width=8, depth=1)), table["text"][:3])


def test_it_is_a_copy(refiner: DiffGAPRefiner, embeddings: Tensor) -> None:
    changed = copy.deepcopy(refiner)
    prepared = changed.prepare(source="text", target="audio")
    before = prepared.refine(embeddings, generator())
    for parameter in changed.parameters():
        parameter.data.zero_()
    assert torch.equal(prepared.refine(embeddings, generator()), before)
    assert prepared.refine(embeddings.half()).dtype == torch.float16


def test_bfloat16_is_close(refiner: DiffGAPRefiner, embeddings: Tensor) -> None:
    options = {"source": "text", "target": "audio"}
    full, half = (refiner.prepare(**options, dtype=d) for d in (torch.float32, torch.bfloat16))
    cosine = (full.refine(embeddings, generator()) * half.refine(embeddings, generator())).sum(1)
    assert 0.999 < cosine.min() < 1 - 1e-8


@pytest.mark.slow
def test_an_exported_program_takes_any_batch(refiner: DiffGAPRefiner, embeddings: Tensor, tmp_path: Path) -> None:
    prepared = refiner.prepare(source="text", target="audio", num_steps=3)
    prepared.export(tmp_path / "refiner.pt2")
    program = torch.export.load(tmp_path / "refiner.pt2").module()
    for count in (1, 2, 12):
        noise = torch.randn(count, 16, generator=generator())
        out = program(embeddings[:count], noise)
        torch.testing.assert_close(out, prepared(embeddings[:count], noise), rtol=0, atol=1e-6)
        assert torch.equal(prepared.refine(embeddings[:count], generator()), prepared(embeddings[:count], noise))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("count", [1, 12])
def test_a_replayed_graph_is_the_function(refiner: DiffGAPRefiner, embeddings: Tensor, count: int) -> None:
    prepared = copy.deepcopy(refiner).cuda().prepare(source="text", target="audio")
    for k in range(3):
        rows = embeddings.roll(k, 0)[:count].cuda()
        noise = torch.randn(count, 16, generator=generator()).cuda()
        torch.testing.assert_close(prepared.refine(rows, generator()), prepared(rows, noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength: got 0.0, expected above 0"),
        ({"sampler": "ddpm"}, "sampler: got 'ddpm', expected 'dpmpp_2m' or 'ddim'"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"source": "video"}, "this refiner knows"),
        ({"start": "middle"}, "start: got 'middle'"),
    ],
)
def test_what_cannot_be_prepared_is_refused(refiner: DiffGAPRefiner, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refiner.prepare(**{"source": "text", "target": "audio", **options})


def test_unusable_rows_are_refused(refiner: DiffGAPRefiner, embeddings: Tensor) -> None:
    with pytest.raises(ValueError, match="text: got dimension 9"):
        refiner.prepare(source="text", target="audio").refine(embeddings[:, :9])
