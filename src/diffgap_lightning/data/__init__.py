"""Where embeddings come from: tables in a file, a synthetic world with a known optimum, and Lightning datamodules.

Names that need Lightning are loaded at their first use, so that importing this package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "EmbeddingTable": "table",
    "SyntheticWorld": "synthetic",
    "EmbeddingDataModule": "datamodules",
    "SyntheticDataModule": "datamodules",
    "WebDatasetDataModule": "webdataset_module",
    "write_embedding_shards": "shards",
    "read_embedding_shards": "shard_table",
    "verify_shards": "shard_verify",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
