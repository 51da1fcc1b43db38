"""Samples of a classic WebDataset tar, one embedding a member: `key.audio.npy`, `key.text.npy`, next key.

WebDataset's own rules are used: the key is the path up to the first dot of the file name, and members of one sample are
neighbours. Only `<modality>.npy` members are kept; `.pyd`, `.pth` and the like are never looked into.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffgap_lightning.data.npy import decode_npy
from diffgap_lightning.data.tar import iter_members


@dataclass
class Sample:
    """One key and its undecoded members."""

    key: str
    members: dict[str, memoryview]
    repeated: list[str] = field(default_factory=list)

    def row(self, modality: str, dim: int | None = None) -> np.ndarray:
        """The `(D,)` float32 embedding of a modality.

        Raises:
            ValueError: the member is missing, there twice, or no floating `(D,)` array.
        """
        name = f"{modality}.npy"
        if name in self.repeated:
            raise ValueError(f"{name} is there twice")
        if name not in self.members:
            raise ValueError(f"lacks {name}")
        row = decode_npy(self.members[name], name)
        if row.ndim != 1 or row.dtype.kind != "f" or (dim is not None and len(row) != dim):
            raise ValueError(f"{name}: got {row.shape} of {row.dtype}, expected ({dim or 'D'},) floating")
        return row.astype(np.float32, copy=False)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and kind of a member by WebDataset's convention; None for names without a dot and for `__meta__` files."""
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.tariterators import base_plus_ext

    key, kind = base_plus_ext(name)
    return None if key is None or key.startswith("__") else (key, kind.lower())


def iter_samples(buffer: np.ndarray, modalities: Sequence[str]) -> Iterator[Sample]:
    """Samples in a `(size,)` uint8 range of a tar that hold at least one of the modalities."""
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.tariterators import group_by_keys

    wanted = {f"{m}.npy" for m in modalities}
    repeated: list[tuple[str, str]] = []
    seen: set[tuple[str, str]] = set()

    def files() -> Iterator[dict[str, Any]]:
        for name, data in iter_members(buffer):
            parts = split_name(name)
            if parts is None or parts[1] not in wanted:
                continue
            if parts in seen:
                repeated.append(parts)
                continue
            seen.add(parts)
            yield {"fname": name, "data": data, "__url__": ""}

    for sample in group_by_keys(files()):
        key = sample["__key__"]
        twice = [kind for other, kind in repeated if other == key]
        repeated = [(other, kind) for other, kind in repeated if other != key]
        seen = {parts for parts in seen if parts[0] != key}
        yield Sample(key, {kind: sample[kind] for kind in wanted if kind in sample}, twice)
