"""Sequences `(B, T, D)`: as wholes by a refiner that was trained on them, frame by frame where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.objective import Objective

VA = {"source": "video", "target": "audio"}
T, D = 6, 12


def world(n: int, seed: int, dims: tuple[int, int] = (D, D)) -> dict[str, Tensor]:
    """Unit frames; what an audio frame holds is what the video showed one frame before."""
    fixed, g = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, dim, generator=fixed) for dim in dims]
    offsets = [torch.randn(dim, generator=fixed) for dim in dims]
    z = torch.randn(n, T + 1, 4, generator=g)
    noise = [0.2 * torch.randn(n, T, dim, generator=g) for dim in dims]
    video, audio = (
        normalize(part @ m + o + e, dim=-1)
        for part, m, o, e in zip((z[:, 1:], z[:, :-1]), maps, offsets, noise, strict=True)
    )
    return {"video": video, "audio": audio}


def measured(n: int = 60, seed: int = 0, **options) -> DiffGAPRefiner:
    data = world(n, seed)
    return DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(n)), **{"width": 32, "depth": 1, **options})


@pytest.fixture(scope="module")
def sequences() -> DiffGAPRefiner:
    """Takes sequences of T frames; its networks add something."""
    refiner, g = measured(), torch.Generator().manual_seed(0)
    for parameter in refiner.cdm.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return refiner


@pytest.fixture(scope="module")
def pooled() -> DiffGAPRefiner:
    data = {m: x[:, 0] for m, x in world(60, 0).items()}
    return DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(60)), width=16, depth=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sequences_go_in_and_out(sequences, dtype: torch.dtype) -> None:
    x = world(5, 1)["video"].to(dtype)
    before = x.clone()
    one = sequences.refine(x, **VA, generator=seeded())
    assert (one.shape, one.dtype) == ((5, T, D), dtype)
    assert torch.allclose(one.float().norm(dim=-1), torch.ones(5, T), atol=1e-2)
    some = sequences.refine(x, **VA, num_samples=3, generator=seeded())
    assert some.shape == (5, 3, T, D)
    assert not torch.equal(some[:, 0], some[:, 1])
    assert torch.equal(x, before)


def test_a_sequence_does_not_depend_on_those_beside_it_but_a_frame_on_its_neighbours(sequences) -> None:
    x = world(4, 1)["video"]
    options = {**VA, "start": "posterior_mean", "strength": 0.0}
    together = sequences.refine(x, **options)
    alone = torch.cat([sequences.refine(x[i : i + 1], **options) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
    changed = x.clone()
    changed[:, -1] = x.flip(0)[:, -1]
    assert not torch.allclose(sequences.refine(changed, **options)[:, 0], together[:, 0], atol=1e-4)


def test_strength_zero_is_the_centred_input_frame_by_frame(sequences) -> None:
    x = world(4, 1)["video"]
    plain = sequences.space.shift(x.flatten(0, 1), "video", "audio").unflatten(0, (4, T))
    assert torch.allclose(sequences.refine(x, **VA, strength=0.0), plain, atol=1e-6)


def test_before_training_a_sequence_is_refined_as_its_frames_are() -> None:
    data, n = world(60, 0), 60
    whole = DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(n)), width=16, depth=1)
    ids = {m: (torch.arange(n)[:, None] * T + torch.arange(T)).flatten() for m in data}
    single = DiffGAPRefiner.measure({m: x.flatten(0, 1) for m, x in data.items()}, ids, few_pairs=0, width=16, depth=1)
    x = world(5, 1)["video"]
    for options in ({"start": "posterior_mean", "strength": 0.0}, {"start": "source", "strength": 0.0}):
        a, b = whole.refine(x, **VA, **options), single.refine(x, **VA, **options, per_frame=True)
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_per_frame_is_row_by_row(pooled, num_samples: int) -> None:
    x = world(5, 1)["video"]
    options = {**VA, "num_samples": num_samples, "strength": 0.5}
    frames = pooled.refine(x, **options, per_frame=True, generator=seeded())
    rows = pooled.refine(x.flatten(0, 1), **options, generator=seeded())
    expected = rows.unflatten(0, (5, T))
    assert torch.equal(frames, expected if num_samples == 1 else expected.transpose(1, 2))
    assert frames.shape == ((5, T, D) if num_samples == 1 else (5, 3, T, D))


def test_gradients_reach_the_network_through_a_sequence(sequences) -> None:
    x = world(2, 1)["video"].requires_grad_()
    sequences.refine_with_grad(x, **VA, num_steps=2, generator=seeded())[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(1) > 0).all()
    assert not x.grad[1].any()
    sequences.zero_grad()


def test_scores_are_inner_products_of_the_frames_mean_features(sequences) -> None:
    data = world(6, 1)
    score = sequences.score(data["video"], data["audio"], **VA)
    assert score.shape == (6, 6)
    backwards = sequences.score(data["audio"], data["video"], source="audio", target="video")
    assert torch.allclose(score, backwards.T, atol=1e-5)
    (pair,) = sequences.config.pairs
    parts = [sequences.components(data[m], modality=m, pair=pair) for m in VA.values()]
    assert {x.shape[0] for part in parts for x in part.values()} == {6}
    ridge = sequences.bridges["ridge"].score_features(data["video"].flatten(0, 1), modality="video", **VA)
    assert torch.allclose(parts[0]["ridge"], ridge.unflatten(0, (6, T)).mean(1), atol=1e-6)


def test_a_refiner_of_sequences_survives_its_folder(sequences, tmp_path: Path) -> None:
    sequences.save_pretrained(tmp_path / "refiner")
    loaded = DiffGAPRefiner.from_pretrained(tmp_path / "refiner")
    assert loaded.config.frames == T
    x = world(3, 1)["video"]
    assert torch.equal(loaded.refine(x, **VA, generator=seeded()), sequences.refine(x, **VA, generator=seeded()))


def test_a_folder_from_before_sequences_still_loads(pooled, tmp_path: Path) -> None:
    folder = pooled.save_pretrained(tmp_path / "refiner")
    record = json.loads((folder / "config.json").read_text())
    assert record["config"].pop("frames") == 0
    (folder / "config.json").write_text(json.dumps(record))
    assert DiffGAPRefiner.from_pretrained(folder).config.frames == 0


def test_many_sequences_are_measured_on_some_of_them_and_hashed_ids_may_be_large(quick) -> None:
    data = world(200, 0)
    ids = {m: torch.arange(200) * 10**15 + 10**18 for m in data}
    refiner = DiffGAPRefiner.measure(data, ids, max_pairs=60 * T, width=8, depth=0)
    some = DiffGAPRefiner.measure(data, ids, width=8, depth=0)
    assert not torch.equal(refiner.space.mean("audio"), some.space.mean("audio"))
    assert torch.allclose(refiner.space.mean("audio"), some.space.mean("audio"), atol=0.1)


def test_modalities_of_different_dimension() -> None:
    data = world(80, 0, (10, 14))
    refiner = DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(80)), width=16, depth=1)
    assert refiner.refine(data["video"][:3], **VA, generator=seeded()).shape == (3, T, 14)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, D), {}, r"video: got shape \(4, 12\), expected \(B, 6, D\): this refiner was trained on sequences of 6"),
        ((4, T + 1, D), {}, r"got shape \(4, 7, 12\), expected \(B, 6, D\).*cut or resample"),
        ((4, T, D + 1), {}, "got dimension 13, expected 12"),
        ((4, T, D), {"per_frame": True}, "sequences of 6 frames as wholes; leave per_frame out"),
        ((0, T, D), {}, "the input is empty"),
        ((D,), {}, r"got shape \(12,\)"),
    ],
)
def test_a_refiner_of_sequences_refuses_everything_else(sequences, shape, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sequences.refine(torch.ones(shape), **VA, **options)


def test_a_refiner_of_embeddings_refuses_sequences_unless_told(pooled) -> None:
    x = world(2, 1)["video"]
    for call in (
        lambda: pooled.refine(x, **VA),
        lambda: pooled.score(x, x, **VA),
        lambda: pooled.start_energy(x, **VA),
    ):
        with pytest.raises(ValueError, match=r"got shape \(2, 6, 12\), a sequence; .*per_frame=True refines every"):
            call()
    with pytest.raises(ValueError, match=r"got shape \(2, 12\), expected \(B, T, D\) with per_frame=True"):
        pooled.refine(x[:, 0], **VA, per_frame=True)


def test_several_sources_of_sequences_are_refused(sequences, pooled) -> None:
    x = world(2, 1)
    with pytest.raises(ValueError, match="sequences: got several sources, expected one"):
        sequences.refine({"video": x["video"]}, target="audio")
    with pytest.raises(ValueError, match="sequences: got several sources, expected one"):
        pooled.refine({"video": x["video"]}, target="audio", per_frame=True)


def test_sequences_of_different_length_are_refused_when_measured() -> None:
    data = world(60, 0)
    ids = dict.fromkeys(data, torch.arange(60))
    with pytest.raises(ValueError, match="video of 6 frames, audio of 5 frames; expected as many frames in all"):
        DiffGAPRefiner.measure({**data, "audio": data["audio"][:, :5]}, ids)
    with pytest.raises(ValueError, match="video of 6 frames, audio without frames"):
        DiffGAPRefiner.measure({**data, "audio": data["audio"][:, 0]}, ids)


def train(refiner: DiffGAPRefiner, data: dict[str, Tensor], batch_size: int, steps: int = 100) -> None:
    """The training module's loss, video to audio."""
    cdm, objective, g = refiner.cdm_of("video", "audio"), Objective(), seeded()
    optimizer = torch.optim.AdamW(cdm.parameters(), lr=4e-3)
    z = {m: refiner.space.coordinates(x - refiner.space.mean(m), m) for m, x in data.items()}
    refiner.train()
    for _ in range(steps):
        i = torch.randint(len(z["video"]), (batch_size,), generator=g)
        loss = objective(cdm, z["video"][i], z["audio"][i], i, z["audio"][i], i, torch.tensor(0.0), g)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    refiner.eval()


@pytest.mark.slow
def test_where_neighbours_inform_the_sequence_beats_its_frames(quick) -> None:
    data, held_out = world(300, 0), world(100, 1)
    flat = {m: x.flatten(0, 1) for m, x in data.items()}
    make: Callable[..., DiffGAPRefiner] = DiffGAPRefiner.measure
    refiners = [
        make(rows, {m: torch.arange(len(x)) for m, x in rows.items()}, width=64, depth=1, rank="full")
        for rows in (data, flat)
    ]
    for refiner, rows, size in zip(refiners, (data, flat), (32, 32 * T), strict=True):
        train(refiner, rows, size)
    for strength in (0.0, 0.2):
        whole, frame = (
            refiner.refine(
                held_out["video"], **VA, start="posterior_mean", strength=strength,
                generator=seeded(), per_frame=not refiner.config.frames,
            )
            for refiner in refiners
        )  # fmt: skip
        whole, frame = ((x * held_out["audio"]).sum(-1).mean().item() for x in (whole, frame))
        assert whole > frame + 0.3, (whole, frame)


def test_diff_foleys_sequences_fit(quick) -> None:
    """32 frames of 512 numbers."""
    g = seeded()
    data = {m: normalize(torch.randn(4, 32, 512, generator=g), dim=-1) for m in ("video", "audio")}
    refiner = DiffGAPRefiner.measure(data, dict.fromkeys(data, torch.arange(4)), width=16, depth=1, rank=8)
    assert refiner.refine(data["video"], **VA, generator=g).shape == (4, 32, 512)
