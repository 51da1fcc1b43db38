"""Rows of a small world, and refiners measured on them; shared by the session, so that they are measured once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.bridges import CentreBridge, RidgeBridge
from diffgap_lightning.refiner import DiffGAPRefiner

DIM = 16
Rows = tuple[dict[str, Tensor], dict[str, Tensor]]


def make_rows(n: int = 160, seed: int = 0, dims: dict[str, int] | None = None) -> Rows:
    """Unit rows of each modality, made of shared latents by a map of its own, and their ids."""
    dims = dims or {"text": DIM, "audio": DIM}
    world, g = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    latent, embeddings = torch.randn(n, 6, generator=g), {}
    common = torch.randn(6, DIM, generator=world)
    for modality, dim in dims.items():
        own, offset = torch.randn(6, dim, generator=world), 3 * torch.randn(dim, generator=world)
        shared = latent @ common if dim == DIM else 0
        noise = torch.randn(n, dim, generator=g)
        embeddings[modality] = normalize(shared + torch.tanh(latent @ own) + offset + noise, dim=1)
    return embeddings, dict.fromkeys(dims, torch.arange(n) + 7)


def excited(refiner: DiffGAPRefiner, seed: int = 0) -> DiffGAPRefiner:
    """Stand for training: give every network weights that are not zero."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in refiner.cdm.named_parameters():
        parameter.data.copy_((0.05 if ".output." in name else 0.3) * torch.randn(parameter.shape, generator=g))
    return refiner


@pytest.fixture
def rows() -> Callable[..., Rows]:
    """`rows(n=160, seed=0, dims=None)`: unit rows of each modality from shared latents, and their ids."""
    return make_rows


@pytest.fixture
def excite() -> Callable[..., DiffGAPRefiner]:
    """`excite(refiner, seed=0)` gives every network weights that are not zero, and returns the refiner."""
    return excited


@pytest.fixture(scope="session")
def untrained() -> DiffGAPRefiner:
    """Of full rank, as it was measured."""
    return DiffGAPRefiner.measure(*make_rows(), rank="full", width=16, depth=1, dropout=0.3)


@pytest.fixture(scope="session")
def refiner(untrained: DiffGAPRefiner) -> DiffGAPRefiner:
    """Of full rank, with networks that add something; tests must not change it."""
    return excited(DiffGAPRefiner.from_state(vars(untrained.config), untrained.state_dict()))


@pytest.fixture(scope="session")
def low_rank() -> DiffGAPRefiner:
    """Five of sixteen dimensions, with networks that add something."""
    return excited(DiffGAPRefiner.measure(*make_rows(), rank=5, width=16, depth=1))


@pytest.fixture
def own(refiner: DiffGAPRefiner) -> DiffGAPRefiner:
    """A copy that a test may change."""
    return DiffGAPRefiner.from_state(vars(refiner.config), refiner.state_dict())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the bridge whose options take long to choose."""
    monkeypatch.setattr("diffgap_lightning.refiner.measuring.BRIDGES", {"centre": CentreBridge, "ridge": RidgeBridge})
