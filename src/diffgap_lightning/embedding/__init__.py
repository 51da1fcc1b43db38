"""From media to shards: `embed_corpus`, and from a refiner to shards or a table: `RefinedEmbeddingWriter`.

    corpus -> parts -> workers decode -> encoder -> part files -> shards + manifest

A corpus is cut into parts that depend on nothing but the corpus. Ranks share the parts, a finished part is a file, and
a run that was killed goes on with the parts that are not finished. This package stands above `data` and `encoders.base`
and uses Lightning; only `cli` stands above it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "CatalogCorpus": "corpus",
    "RawCorpus": "corpus",
    "EmbedSettings": "decode",
    "EmbedSummary": "merge",
    "embed_corpus": "engine",
    "RefinedEmbeddingWriter": "refined_writer",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
