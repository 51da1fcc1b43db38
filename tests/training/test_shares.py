"""The mean of the ranks' losses is the loss of one process, and so are the gradients; here without any process."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.schedule import NoiseSchedule
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.losses import split_batch
from diffgap_lightning.training.objective import Objective
from diffgap_lightning.training.shares import Share, own_rows

DIRECTIONS = (("text", "audio"), ("audio", "text"))
N, R = 24, 4


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_row_is_on_one_rank_where_it_says(world: int) -> None:
    for lo, hi in itertools.combinations(range(0, 17, 4), 2):
        seen = []
        for rank in range(world):
            own, share = own_rows(slice(lo, hi), rank, world)
            batch = torch.arange(16)[rank::world]  # the numbers, in the whole batch, of what this rank holds
            numbers = share.of(torch.arange(lo, hi))
            assert batch[own].tolist() == numbers.tolist()
            assert len(numbers) == len(share)
            assert [share.before(k) for k in range(hi - lo + 1)] == [
                int((numbers < lo + k).sum()) for k in range(hi - lo + 1)
            ]
            seen += numbers.tolist()
        assert sorted(seen) == list(range(lo, hi))


def networks() -> dict[tuple[str, str], ContrastiveDiffusion]:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(60, R, generator=g)
    made = {}
    for direction in DIRECTIONS:
        network = MLPDenoiser(R, R, width=8, depth=1, dropout=0.0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=g)
        closed = GaussianDenoiser.fit(z, z + 0.3 * torch.randn(60, R, generator=g))
        made[direction] = ContrastiveDiffusion(closed, network, NoiseSchedule())
    return made


def step(objective: Objective, split: str, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch of N rows, as DDP would average them over the ranks."""
    g = torch.Generator().manual_seed(1)
    z = {m: torch.randn(N, R, generator=g) for m in ("text", "audio")}
    ids, scale = torch.arange(N) // 2, torch.tensor(1.0, requires_grad=True)
    cdm = networks()
    total = torch.zeros(())
    for rank in range(world):
        generator = torch.Generator().manual_seed(2)
        for (s, t), rows in split_batch(N, DIRECTIONS, split, step=1).items():
            own, share = own_rows(rows, rank, world)
            here = {m: x[rank::world] for m, x in z.items()}
            parts = objective(
                cdm[s, t], here[s][own], here[t][own], ids[rank::world][own], z[t], ids, scale, generator, share
            )
            total = total + parts["loss"] / world
    total.backward()
    named = {f"{d}/{k}": p.grad for d, m in cdm.items() for k, p in m.network.named_parameters() if p.grad is not None}
    return total.detach(), named | ({} if scale.grad is None else {"scale": scale.grad})


OBJECTIVES = {
    "plain": Objective(),
    "contrastive": Objective(contrastive_weight=0.3),
    "noisy": Objective(condition_noise=0.2, condition_dropout=0.5, loss_weighting="min_snr"),
    "regression": Objective("regression", contrastive_weight=0.3),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("split", ["bst", "joint", "alternate", "forward", "backward"])
def test_ranks_together_make_the_step_of_one_process(objective: Objective, split: str) -> None:
    loss, gradients = step(objective, split, 1)
    for world in (2, 3, 8, 24):  # with 24 a rank holds one row, of one direction, and often none at t = 1
        other, others = step(objective, split, world)
        torch.testing.assert_close(other, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4, msg=f"{world} ranks: {name}")


def test_a_share_of_everything_is_everything() -> None:
    assert own_rows(slice(0, 9), 0, 1) == (slice(0, 9), Share(9))
