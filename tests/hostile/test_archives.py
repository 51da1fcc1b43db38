"""Archives and headers that lie: paths that lead out, links, devices, bombs, sizes that nothing could hold.

Memory is bounded by what the process may claim, not by what it touches, so a header that is believed fails at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffgap_lightning.data.arrays import read_arrays
from diffgap_lightning.data.raw_shards import Skip, iter_raw_clips
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_reader import BlockReader
from diffgap_lightning.data.tar import iter_headers, iter_members
from diffgap_lightning.encoders.weights import read_weights
from diffgap_lightning.refiner import DiffGAPRefiner

MEGABYTES = 64
KINDS = {
    "symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE,
}  # fmt: skip


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../../s0.audio.npy", "/etc/s0.audio.npy", "a/../../s0.audio.npy"])
def test_paths_that_lead_out_are_only_keys(name: str, corpus: ModuleType, tmp_path: Path) -> None:
    text = name.replace("audio", "text")
    row = corpus.npy(corpus.rows(1)[0].numpy())
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(corpus.tar({name: row, text: row, name.replace(".audio.npy", ".txt"): b"a dog"}))
    before = files(tmp_path)
    data = BlockReader(open_shards(path), extras=True).read(0)
    assert data.arrays["audio_id.str"].tolist() == [name.replace(".audio.npy", "")]
    assert [clip.texts for clip in iter_raw_clips(str(path), "x")] == [("a dog",)]
    assert files(tmp_path) == before
    assert not list(tmp_path.parent.glob("s0*"))


@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices_are_passed_over(kind: str, corpus: ModuleType, tmp_path: Path) -> None:
    secret = tmp_path / "secret.npy"
    secret.write_bytes(corpus.npy(corpus.rows(1)[0].numpy()))
    evil = corpus.member("s0.audio.npy", 0, KINDS[kind], str(secret))
    data = evil + corpus.tar(corpus.classic_members() | {"t.txt": b"a dog"})
    (tmp_path / "x.tar").write_bytes(data)
    assert "s0.audio.npy" in dict(iter_members(np.frombuffer(data, np.uint8)))  # the honest one, once
    assert open_shards(tmp_path / "x.tar").manifest.num_rows == {"audio": 3, "text": 3}
    clips = list(iter_raw_clips(str(tmp_path / "x.tar"), "x"))
    assert [clip.id for clip in clips if not isinstance(clip, Skip)] == ["x/t"]


@pytest.mark.parametrize("size", [-(2**40), -512, -1, 10**13, 2**62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_sizes_in_tar_headers_are_not_believed(
    size: int, kind: bytes, corpus: ModuleType, tmp_path: Path, bounded
) -> None:
    """A negative size sends Python's own reader back to the same header for ever."""
    body = corpus.member("s0.audio.npy", size, kind) + b"30 size=-512\n".ljust(512, b"\0")
    data = corpus.tar(corpus.classic_members())[:-1024] + body + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    with bounded(MEGABYTES):
        with pytest.raises(tarfile.TarError):
            list(iter_members(np.frombuffer(data, np.uint8)))
        found = open_shards(tmp_path / "x.tar")
        assert found.manifest.num_rows["audio"] in (2, 3)  # what lies before the lie; the last sample may lack its end
        assert "damaged" in str(found.losses[0]) or found.manifest.num_rows["audio"] == 3
        assert "damaged tar" in list(iter_raw_clips(str(tmp_path / "x.tar"), "x"))[-1].reason


def test_nested_long_names_end(corpus: ModuleType) -> None:
    """Python's reader calls itself for every header that belongs to the next one."""
    data = corpus.member("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000 + bytes(1024)
    with pytest.raises(tarfile.TarError, match="RecursionError"):
        list(iter_members(np.frombuffer(data, np.uint8)))


def test_a_tar_must_move_forward_and_may_be_read_between_headers(corpus: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(corpus.tar({"a": b"1" * 700, "b": b"2"}))
    with (tmp_path / "x.tar").open("rb") as file:
        found = []
        for member in iter_headers(file, whole=True):
            file.seek(member.offset_data)
            found.append((member.name, file.read(member.size)))
    assert found == [("a", b"1" * 700), ("b", b"2")]


def zip_of_ten_gigabytes() -> bytes:
    """A member `audio.npy` that unpacks to 10 GB: a megabyte of zeros, deflated on its own, ten thousand times."""
    deflate = zlib.compressobj(9, wbits=-15)
    block = deflate.compress(bytes(10**6)) + deflate.flush(zlib.Z_FULL_FLUSH)
    data = block * 10_000 + deflate.flush()
    size, name = 10**10, b"audio.npy"
    extra = struct.pack("<HHQQ", 1, 16, size, len(data))
    fields = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra))
    local = b"PK\3\4" + fields + name + extra
    central = b"PK\1\2" + struct.pack("<H", 45) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + extra
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    return local + data + central + end


def test_a_bomb_is_not_unpacked(tmp_path: Path, bounded) -> None:
    data = zip_of_ten_gigabytes()
    assert len(data) < 12_000_000
    (tmp_path / "x.npz").write_bytes(data)
    with bounded(MEGABYTES), pytest.raises(ValueError, match=r"audio: \d+ bytes claim to unpack to 10000000000"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(10**13,), (2**40, 2**40), (1 << 62,)])
def test_ten_terabytes_in_an_npy_header_cost_nothing(shape, corpus: ModuleType, tmp_path: Path, bounded) -> None:
    head = corpus.npy_claim(shape)
    (tmp_path / "x.npz").write_bytes(corpus.npz({"audio.npy": head}))
    (tmp_path / "x.tar").write_bytes(corpus.tar({"s0.audio.npy": head, "s0.text.npy": head}))
    with bounded(MEGABYTES):
        with pytest.raises(ValueError, match="audio: the header claims shape .*, 0 are stored"):
            read_arrays(tmp_path / "x.npz")
        with pytest.raises(ValueError, match="no shard has a readable sample"):
            open_shards(tmp_path / "x.tar")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 10])
def test_absurd_safetensors_headers(length: int, corpus: ModuleType, honest: Path, tmp_path: Path, bounded) -> None:
    claim = {"audio": {"dtype": "F32", "shape": [10**12, 4], "data_offsets": [0, 16 * 10**12]}}
    for data in (corpus.safetensors(claim, length=length), corpus.safetensors(claim)):
        (tmp_path / "x.safetensors").write_bytes(data)
        folder = shutil.copytree(honest / "refiner", tmp_path / hashlib.sha256(data).hexdigest()[:8])
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(record | {"sha256": hashlib.sha256(data).hexdigest()}))
        (folder / "model.safetensors").write_bytes(data)
        with bounded(MEGABYTES):
            for read, path in (
                (read_arrays, tmp_path / "x.safetensors"),
                (read_weights, tmp_path / "x.safetensors"),
                (DiffGAPRefiner.from_pretrained, folder),
            ):
                with pytest.raises(ValueError, match=r"not a readable .*safetensors file"):
                    read(path)


@pytest.mark.parametrize(
    "claim",
    [{"width": 10**6}, {"width": 40_000}, {"dims": {"text": 10**9, "audio": 6}}, {"depth": 10**9}, {"frames": 10**9}],
    ids=str,
)
def test_a_configuration_s_sizes_are_compared_before_anything_is_built(claim, honest, tmp_path: Path, bounded) -> None:
    folder = shutil.copytree(honest / "refiner", tmp_path / "refiner")
    record = json.loads((folder / "config.json").read_text())
    record["config"] |= claim
    (folder / "config.json").write_text(json.dumps(record))
    with bounded(MEGABYTES), pytest.raises(ValueError, match="the tensors do not fit the configuration"):
        DiffGAPRefiner.from_pretrained(folder)


def test_a_bridge_s_directions_must_be_of_its_modalities(honest: Path, tmp_path: Path) -> None:
    from diffgap_lightning.bridges import load_bridge

    for change in (
        {"dims": {"text": 6}},
        {"directions": []},
        {"directions": [["text", "text"]]},
        {"dims": {"text": 1e999}},
    ):
        folder = shutil.copytree(honest / "ridge", tmp_path / str(len(list(tmp_path.iterdir()))))
        record = json.loads((folder / "config.json").read_text())
        record["config"] |= change
        (folder / "config.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="RidgeBridge"):
            load_bridge(folder)


def test_not_finite_weights_are_refused(honest: Path, tmp_path: Path) -> None:
    refiner = DiffGAPRefiner.from_pretrained(honest / "refiner")
    next(refiner.cdm.parameters()).data[0] = float("nan")
    folder = refiner.save_pretrained(tmp_path / "refiner")
    with pytest.raises(ValueError, match=r"refiner: cdm\..* holds NaN or infinite values"):
        DiffGAPRefiner.from_pretrained(folder)
    assert torch.isfinite(refiner.space.mean("audio")).all()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": ' + "1" * 5000 + "}"], ids=["nested", "digits"])
def test_json_without_end_is_one_error(text: str, honest: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(honest / "refiner", tmp_path / "refiner")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        DiffGAPRefiner.from_pretrained(folder)
