"""A short run of the fuzzer's mutations over every reader, inputs that once were findings, and claims by hypothesis.

The long runs are `python tests/hostile/fuzz.py shards|table|checkpoint`; see docs/reliability.md.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from diffgap_lightning.data.npy import decode_npy
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_reader import BlockReader
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.mark.parametrize(("reader", "count"), [("shards", 300), ("table", 300), ("checkpoint", 150)])
def test_a_mutated_file_is_taken_or_refused(reader: str, count: int, fuzz: ModuleType, bounded) -> None:
    """Whatever is no refusal, or memory beyond half a gibibyte, fails here."""
    pool, rng = fuzz.seeds(reader), random.Random(1)
    fuzz.run_one(reader, pool[0])
    with bounded(512):
        taken = sum(fuzz.run_one(reader, fuzz.mutate(rng.choice(pool), rng)) for _ in range(count))
    assert 0 < taken < count


def test_every_honest_seed_is_taken(fuzz: ModuleType) -> None:
    for reader in ("table", "checkpoint"):
        assert all(fuzz.run_one(reader, data) for data in fuzz.seeds(reader))


def _header(text: str) -> bytes:
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    "text", ["{'descr': '<f4', 'shape': (", "(", "", "{'descr': '<f4', 'shape': (1,), \n\n"], ids=repr
)
def test_headers_that_the_tokenizer_gave_up_on(text: str) -> None:
    with pytest.raises(ValueError, match="not a readable .npy header"):
        decode_npy(_header(text), "x.npy")


PICKLES = {
    "stack underflow": b"\x80\x02u.",
    "unknown memo": b"\x80\x02jA\0\0\0.",
    "a type that is no storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "persistent id": b"\x80\x02X\1\0\0\0xQ.",
    "empty": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_the_restricted_unpickler_stumbled_over(name: str, honest: Path, fuzz: ModuleType) -> None:
    """KeyError, IndexError, TypeError and AssertionError came out of PyTorch's unpickler."""
    with zipfile.ZipFile(honest / "zip.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members = {k: PICKLES[name] if k.endswith("data.pkl") else v for k, v in members.items()}
    data = fuzz.corpus.npz(members)
    for kind in (5, 6):
        assert not fuzz.run_one("checkpoint", bytes([kind]) + data)
        assert not fuzz.run_one("checkpoint", bytes([kind]) + PICKLES[name])


numbers = st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_, ">f4", "U3"])


@QUICK
@given(st.data())
def test_arrays_of_any_shape_and_type_are_tables_or_refused(data: st.DataObject) -> None:
    """What is read has unit rows, and reads the same after writing."""
    fields = {}
    for name in ("audio", "audio_id", "text", "text_id"):
        fields[name] = data.draw(
            arrays(data.draw(numbers), data.draw(array_shapes(min_dims=0, max_dims=3, max_side=3)))
        )
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "x.npz", **fields)
        try:
            table = EmbeddingTable.read(Path(folder) / "x.npz", require_pairs=False, normalize=True)
        except ValueError:
            return
        again = EmbeddingTable.read(table.write(Path(folder) / "y.npz"), require_pairs=False)
    for modality, rows in table.embeddings.items():
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))
        torch.testing.assert_close(again.embeddings[modality], rows)
        assert torch.equal(again.ids[modality], table.ids[modality])


ids = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12, unique=True) | st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6),
    min_size=1, max_size=12, unique=True,
)  # fmt: skip


@QUICK
@given(ids, st.sampled_from(["float16", "float32"]), st.integers(1, 5), st.sampled_from(["pairs", "rows"]))
def test_any_ids_survive_shards(names: list[Any], dtype: str, block: int, kind: str) -> None:
    rows = torch.nn.functional.normalize(torch.arange(1.0, 1 + 3 * len(names)).view(-1, 3).sin() + 2, dim=1)
    column = np.array(names, dtype=np.int64 if isinstance(names[0], int) else np.str_)
    chunk = {"audio": rows, "text": rows, "audio_id": column, "text_id": column}
    folder = Path(tempfile.mkdtemp())
    try:
        write_embedding_shards(
            [chunk], folder / "s", kind=kind, dtype=dtype, rows_per_block=block, rows_per_shard=block
        )
        reader = BlockReader(open_shards(folder / "s"), extras=True)
        found = [reader.read(i).arrays for i in range(len(reader))]
    finally:
        shutil.rmtree(folder)
    key = "audio_id" if isinstance(names[0], int) else "audio_id.str"
    read = {
        name: row
        for part in found
        if "audio" in part
        for name, row in zip(part[key].tolist(), part["audio"], strict=True)
    }
    assert set(read) == set(names)
    for name, row in zip(names, rows, strict=True):
        np.testing.assert_allclose(read[name], row, atol=1e-3)
