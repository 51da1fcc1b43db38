"""DiffGAP: close the modality gap of contrastive text, video and audio embeddings with a small bidirectional diffusion.

An embedding space is measured (`EmbeddingSpace`), a small denoiser learns p(audio | text) and p(text | audio) in it,
and a `DiffGAPRefiner` samples from it. Method: DiffGAP, ICASSP 2025, arXiv 2503.12131.

Importing this package and refining need torch, numpy and safetensors alone; the names that need Lightning are loaded
at their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

_LAZY = {
    "DiffGAPRefiner": "refiner",
    "EmbeddingSpace": "space",
    "DiffGAPModule": "training.module",
    "EmbeddingTable": "data.table",
    "EmbeddingDataModule": "data.datamodules",
    "SyntheticDataModule": "data.datamodules",
    "PairedRetrieval": "metrics",
    "ModalityGap": "metrics",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
