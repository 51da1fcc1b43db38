"""Encoders over tiny models, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def model_files(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_files(name)`: the file or folder of a tiny model, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}
    makers: dict[str, Callable[[], Path]] = {
        "tokenizer": lambda: tiny_models.roberta_tokenizer(folder / "tokenizer"),
        "laion": lambda: tiny_models.laion_checkpoint(folder / "laion.pt"),
        "laion-fusion": lambda: tiny_models.laion_checkpoint(folder / "fusion.pt", fusion=True),
        "clap": lambda: tiny_models.transformers_clap(folder / "clap"),
        "clap-fusion": lambda: tiny_models.transformers_clap(folder / "clap-fusion", fusion=True),
        "open-clip": lambda: tiny_models.open_clip_folder(folder / "open-clip"),
        "cavp": lambda: tiny_models.cavp_checkpoint(folder / "cavp.ckpt"),
    }

    def get(name: str) -> Path:
        if name not in made:
            made[name] = makers[name]()
        return made[name]

    return get


PACKAGES = {"laion": "laion_clap", "clap": "transformers", "open": "open_clip", "cavp": "torchaudio"}


@pytest.fixture(scope="session")
def tiny_encoder(model_files: Callable[[str], Path]) -> Callable[[str], Any]:
    """`tiny_encoder(name)`: the encoder over `model_files(name)`; skips without its package."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        package = PACKAGES[name.split("-")[0]]
        if find_spec(package) is None:  # not importorskip: importing laion_clap downloads
            pytest.skip(f"needs {package}")
        if name not in made:
            made[name] = build(name, model_files)
        return made[name]

    return get


def build(name: str, model_files: Callable[[str], Path]) -> Any:
    path = str(model_files(name))
    if name.startswith("laion"):
        from diffgap_lightning.encoders.laion_clap import LaionClapEncoder

        return LaionClapEncoder(path, tokenizer=str(model_files("tokenizer")))
    if name.startswith("clap"):
        from diffgap_lightning.encoders.transformers_clap import TransformersClapEncoder

        return TransformersClapEncoder(path)
    if name == "cavp":
        from diffgap_lightning.encoders.cavp import CavpEncoder

        return CavpEncoder(path)
    from diffgap_lightning.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder(path)


def noise(seconds: float, rate: int = 48000, seed: int = 0) -> Tensor:
    """`(T,)` with a spectrum that falls, so that a crop of it is not like another."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(round(seconds * rate), generator=generator)
    swell = torch.linspace(0.05, 0.4, len(white)) * torch.sin(torch.linspace(0, 40, len(white))).abs()
    return (white * swell).clamp(-1, 1)


@pytest.fixture
def make_noise() -> Callable[..., Tensor]:
    """`make_noise(seconds, rate=48000, seed=0)`."""
    return noise
