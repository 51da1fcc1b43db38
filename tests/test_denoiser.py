"""The network: silent before training, blind to a dropped condition, steered by the noise level, wholly trainable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffgap_lightning.denoiser import LevelEmbedding, MLPDenoiser

T, C = 5, 3


def network(dropout: float = 0.0, **options) -> MLPDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPDenoiser(T, C, **{"width": 16, "depth": 2, **options}, dropout=dropout)


def batch(n: int = 8, seed: int = 0) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    return {
        "residual": torch.randn(n, T, generator=g),
        "mean": torch.randn(n, T, generator=g),
        "log_snr": 4 * torch.randn(n, generator=g),
        "condition": torch.randn(n, C, generator=g),
        "keep": torch.arange(n) % 4 > 0,
    }


def train(net: MLPDenoiser, steps: int) -> MLPDenoiser:
    """A few steps towards an arbitrary function of all inputs, one row in four without its condition."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(steps):
        inputs = batch(32, step)
        goal = inputs["condition"] @ torch.ones(C, T) + inputs["log_snr"].sin()[:, None] * inputs["residual"]
        optimizer.zero_grad()
        (net(**inputs) - goal).square().mean().backward()
        optimizer.step()
    return net


def test_before_training_the_correction_is_exactly_zero() -> None:
    for inputs in (batch(), batch() | {"keep": None}):
        out = network()(**inputs)
        assert out.shape == (8, T)
        assert (out == 0).all()


def test_a_few_steps_of_training_lower_the_error() -> None:
    inputs = batch(32, 100)
    goal = inputs["condition"] @ torch.ones(C, T)
    before, after = ((train(network(), n)(**inputs | {"keep": None}) - goal).square().mean() for n in (0, 60))
    assert after < 0.8 * before


def test_blocks_are_open_before_training_and_unsteered() -> None:
    h, steer = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.ones(8, 4)
    for block in network().blocks:
        centred = h - h.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(block(h, steer), h + block.layers(normed), rtol=1e-5, atol=1e-5)


def test_a_dropped_condition_leaves_no_trace_in_the_output() -> None:
    net, inputs = train(network(), 4), batch()
    changed = inputs | {"condition": batch(seed=1)["condition"]}
    same = (net(**inputs) == net(**changed)).all(dim=1)
    assert torch.equal(same, ~inputs["keep"])


def test_no_mask_keeps_every_condition() -> None:
    net, inputs = train(network(), 4), batch()
    kept = net(**inputs | {"keep": torch.ones(8, dtype=torch.bool)})
    assert torch.equal(net(**inputs | {"keep": None}), kept)
    assert not torch.equal(net(**inputs), kept)


@pytest.mark.parametrize("name", ["residual", "mean", "log_snr", "condition"])
def test_after_training_every_input_matters(name) -> None:
    net, inputs = train(network(), 12), batch() | {"keep": None}
    changed = inputs | {name: batch(seed=1)[name]}
    assert ((net(**inputs) - net(**changed)).abs().amax(1) > 1e-5).all()


def test_the_noise_level_steers_every_norm_and_not_only_the_last() -> None:
    net = train(network(), 4)
    for layer in (net.modulation, *(block.modulation for block in net.blocks)):
        assert (layer.weight.abs().amax(1) > 0).all()


def test_training_reaches_every_parameter() -> None:
    # The zero layers let gradients through one after another: after three steps nothing is left out.
    net = train(network(), 4)
    for name, parameter in net.named_parameters():
        assert (parameter.grad.abs() > 0).float().mean() > 0.9, name


def test_rows_do_not_see_each_other() -> None:
    net, inputs = train(network(), 4), batch()
    alone = [net(**{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(8)]
    torch.testing.assert_close(net(**inputs), torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    net, inputs = train(network(), 4), batch()
    noisy = network(dropout=0.5)
    noisy.load_state_dict(net.state_dict())
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(noisy.train()(**inputs), net(**inputs))
    assert torch.equal(noisy.eval()(**inputs), net(**inputs))


def test_both_directions_of_512_dimensions_take_less_than_seven_and_a_half_million_parameters() -> None:
    with torch.random.fork_rng(devices=[]):
        count = sum(p.numel() for p in MLPDenoiser(512, 512).parameters())
    assert 2 * count < 7.5e6


def test_depth_and_expansion_build_what_they_say() -> None:
    net = network(depth=3, expansion=2.0, width=8)
    assert len(net.blocks) == 3
    assert net.blocks[0].layers[0].weight.shape == (16, 8)
    assert network(depth=0)(**batch()).shape == (8, T)
    assert network(width=1)(**batch()).shape == (8, T)


@pytest.mark.parametrize(("width", "depth"), [(0, 3), (16, -1)])
def test_impossible_sizes_are_refused(width, depth) -> None:
    with pytest.raises(ValueError, match="denoiser: got width"):
        MLPDenoiser(T, C, width=width, depth=depth)


def test_level_embedding_tells_noise_levels_apart_over_the_whole_range() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embed = LevelEmbedding(16)
    levels = torch.linspace(-10, 16, 53)
    out = embed(levels)
    assert out.shape == (53, 16)
    distance = torch.cdist(out, out) + torch.eye(53)
    assert distance.min() > 1e-2
    assert not embed.state_dict().keys() & {"frequencies"}
