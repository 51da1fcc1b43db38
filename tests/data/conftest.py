"""Small embeddings whose id can be read off the row, and shards made of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable

DIMS = {"audio": 6, "text": 4}


def marked_rows(ids: torch.Tensor, dim: int) -> torch.Tensor:
    """`(N, dim)` unit rows, all different: an angle made of the id, then noise that depends on the id."""
    angle = (ids.double() + 1) * 0.6180339887498949 % 1
    rest = torch.sin(ids.double()[:, None] * torch.arange(1, dim - 1))
    rows = torch.cat([torch.cos(6 * angle)[:, None], torch.sin(6 * angle)[:, None], 0.5 * rest], dim=1)
    return torch.nn.functional.normalize(rows, dim=1).float()


def make_table(pairs: int, captions: int = 1, first_id: int = 0) -> EmbeddingTable:
    """`pairs` clips with `captions` texts each."""
    ids = torch.arange(first_id, first_id + pairs)
    texts = ids.repeat_interleave(captions)
    text_rows = marked_rows(torch.arange(len(texts)) + 10 * first_id, DIMS["text"])
    return EmbeddingTable({"audio": marked_rows(ids, DIMS["audio"]), "text": text_rows}, {"audio": ids, "text": texts})


@pytest.fixture
def table() -> Callable[..., EmbeddingTable]:
    """`table(pairs, captions=1, first_id=0)`."""
    return make_table


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """`shards(pairs, count=1, kind="pairs", name="train", block=16, **options)`: a folder with exactly `count` tars."""

    def make(pairs: int, count: int = 1, kind: str = "pairs", name: str = "train", block: int = 16, **options) -> Path:
        source = make_table(pairs, options.pop("captions", 1))
        lengths = [len(source.ids["text"])] if kind == "pairs" else [len(ids) for ids in source.ids.values()]
        sizes = [(b, s) for b in range(block, 0, -1) for s in range(2 * max(lengths), b - 1, -1)]
        block, per_shard = next((b, s) for b, s in sizes if count_shards(lengths, b, s) == count)
        options = {"dtype": "float32", "rows_per_block": block, "rows_per_shard": per_shard} | options
        manifest = write_embedding_shards(source, tmp_path / name, kind=kind, **options)
        assert len(manifest.shards) == count
        return tmp_path / name

    return make


def count_shards(lengths: list[int], block: int, per_shard: int) -> int:
    """Shards that a writer makes of modalities with these numbers of rows, one after the other."""
    shards, held = 0, [0] * len(lengths)
    for m, rows in enumerate(lengths):
        for start in range(0, rows, block):
            held[m] += min(block, rows - start)
            if max(held) >= per_shard:
                shards, held = shards + 1, [0] * len(lengths)
    return shards + (max(held) > 0)


def npy_bytes(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.fixture
def tar() -> Callable[..., Path]:
    """`tar(path, {name: bytes or array})`: a tar with these members, in this order."""

    def make(path: Path, members: dict[str, bytes | np.ndarray]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as file:
            for name, value in members.items():
                data = value if isinstance(value, bytes) else npy_bytes(np.asarray(value))
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def classic(tmp_path: Path, tar: Callable[..., Path]) -> Callable[..., list[Path]]:
    """`classic(samples, count=1)`: tars with one key a sample, `s0000.audio.npy`, `s0000.text.npy`."""

    def make(samples: int, count: int = 1, name: str = "classic") -> list[Path]:
        source = make_table(samples)
        paths = []
        for shard, part in enumerate(np.array_split(np.arange(samples), count)):
            members = {
                f"s{i:04d}.{m}.npy": source.embeddings[m][i].numpy() for i in part.tolist() for m in ("audio", "text")
            }
            paths.append(tar(tmp_path / name / f"{shard:03d}.tar", members))
        return paths

    return make
