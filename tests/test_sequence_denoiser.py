"""The network of sequences: what a frame knows of the others, and that it starts as nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.schedule import NoiseSchedule
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.sequence_denoiser import SequenceDenoiser

B, T, R_T, R_C = 3, 7, 5, 4


def excited(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return network.eval()


def inputs(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"residual": (B, T, R_T), "mean": (B, T, R_T), "log_snr": (B,), "condition": (B, T, R_C)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def test_before_training_it_adds_nothing() -> None:
    network = SequenceDenoiser(R_T, R_C, T, width=16, depth=2)
    assert torch.equal(network(**inputs(), keep=None), torch.zeros(B, T, R_T))


@pytest.mark.parametrize("width", [1, 16, 96])
def test_every_frame_sees_the_whole_source_sequence_and_no_other_sequence(width: int) -> None:
    network = excited(SequenceDenoiser(R_T, R_C, T, width=width, depth=1))
    for name in ("condition", "residual", "mean"):
        x = inputs()
        x[name].requires_grad_()
        network(**x, keep=None)[1, 0].sum().backward()
        reached = x[name].grad.abs().sum(2)
        if width > 1:
            assert (reached[1] > 0).all(), f"the first frame does not see all of {name}"
        assert not reached[[0, 2]].any()


def test_a_dropped_condition_is_not_seen() -> None:
    network, x = excited(SequenceDenoiser(R_T, R_C, T, width=16, depth=2)), inputs()
    keep = torch.tensor([True, False, True])
    changed = {**x, "condition": x["condition"] + 1}
    a, b = (network(**v, keep=keep) for v in (x, changed))
    assert torch.equal(a[1], b[1])
    assert not torch.allclose(a[0], b[0])
    everything = torch.ones(B, dtype=torch.bool)
    assert torch.allclose(network(**x, keep=everything), network(**x, keep=None))


def test_attention_is_the_softmax_with_a_bias_of_the_distance() -> None:
    network = excited(SequenceDenoiser(R_T, R_C, T, width=64, depth=1))
    attention = network.blocks[0].attention
    assert attention.heads == 2
    h = torch.randn(B, T, 64, generator=torch.Generator().manual_seed(1))
    q, k, v = attention.inputs(h).chunk(3, dim=2)
    mixed = torch.zeros(B, T, 64)
    for b in range(B):
        for head in range(2):
            part = slice(32 * head, 32 * head + 32)
            for i in range(T):
                logits = torch.stack(
                    [
                        q[b, i, part] @ k[b, j, part] / math.sqrt(32) + attention.bias[head, j - i + T - 1]
                        for j in range(T)
                    ]
                )
                mixed[b, i, part] = logits.softmax(0) @ v[b, :, part]
    assert torch.allclose(attention(h), attention.output(mixed), atol=1e-5)


def test_heads_begin_by_looking_near_and_far() -> None:
    for width, heads in ((32, 1), (64, 2), (256, 8), (96, 3), (50, 1)):
        bias = SequenceDenoiser(R_T, R_C, T, width=width, depth=1).blocks[0].attention.bias.detach()
        assert bias.shape == (heads, 2 * T - 1)
        assert torch.equal(bias, bias.flip(1))  # past and future alike
        assert (bias[:, T - 1] == 0).all()
        assert bias[-1, 0] == pytest.approx(-(T - 1) / 64)


def test_the_closed_form_of_a_sequence_is_that_of_its_frames() -> None:
    g = torch.Generator().manual_seed(0)
    c = torch.randn(200, R_C, generator=g)
    x = c @ torch.randn(R_C, R_T, generator=g) + torch.randn(200, R_T, generator=g)
    closed = GaussianDenoiser.fit(c, x)
    schedule = NoiseSchedule("cosine")
    frames = ContrastiveDiffusion(closed, SequenceDenoiser(R_T, R_C, T, width=8, depth=1), schedule, "v")
    rows = ContrastiveDiffusion(closed, MLPDenoiser(R_T, R_C, width=8, depth=1), schedule, "v")
    z, condition = torch.randn(B, T, R_T, generator=g), torch.randn(B, T, R_C, generator=g)
    t, keep = torch.tensor([0.2, 0.7, 1.0]), torch.tensor([True, False, True])
    out = frames(z, t, condition, keep)
    each = rows(z.flatten(0, 1), t.repeat_interleave(T), condition.flatten(0, 1), keep.repeat_interleave(T))
    assert torch.allclose(out.flatten(0, 1), each, atol=1e-6)
    mean = frames.posterior_mean(condition)
    assert torch.allclose(mean.flatten(0, 1), rows.posterior_mean(condition.flatten(0, 1)), atol=1e-6)
    noisy = schedule.add_noise(z, condition.sum() * torch.ones_like(z), t)
    assert torch.equal(noisy[:, 3], schedule.add_noise(z[:, 3], condition.sum() * torch.ones_like(z[:, 3]), t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_under_autocast(dtype: torch.dtype) -> None:
    network = excited(SequenceDenoiser(R_T, R_C, T, width=32, depth=1))
    with torch.no_grad():
        exact = network(**inputs(), keep=None)
        with torch.autocast("cpu", dtype=dtype):
            rough = network(**inputs(), keep=None)
    assert torch.allclose(rough.float(), exact, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("wrong", [{"width": 0}, {"depth": -1}, {"frames": 0}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected width >= 1, depth >= 0 and at least 1 frame"):
        SequenceDenoiser(R_T, R_C, **{"frames": T, **wrong})
