from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.arrays import read_arrays, write_arrays


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def npy_claiming(shape: tuple[int, ...], dtype: str = "<f4", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def archive(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def refuse(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_arrays(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_numbers_and_strings_come_back(tmp_path: Path, suffix: str) -> None:
    arrays = {
        "x": np.arange(6.0).reshape(2, 3),
        "file": np.array([True, False]),
        "s": np.array(["", "π", 'a "b"\n']),
        "one": np.array("encoder"),
        "none": np.zeros((0, 4), np.float32),
    }
    again = read_arrays(write_arrays(tmp_path / f"a{suffix}", arrays))
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        assert np.array_equal(again[name], array)
        assert again[name].shape == array.shape


def test_compressed_archives_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(5), fold=np.zeros(50_000, int))
    assert read_arrays(tmp_path / "a.npz")["x"].tolist() == list(range(5))


def test_the_same_arrays_make_the_same_bytes(tmp_path: Path) -> None:
    for suffix in (".npz", ".safetensors"):
        files = [write_arrays(tmp_path / f"{i}{suffix}", {"x": np.eye(3), "s": np.array(["a"])}) for i in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    for suffix in (".npz", ".safetensors"):
        path = write_arrays(tmp_path / f"a{suffix}", {"x": np.eye(2)})
        before = path.read_bytes()
        with pytest.raises(ValueError, match="y: got dtype object"):
            write_arrays(path, {"x": np.eye(3), "y": np.array([None])})
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_write_removes_its_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_arrays(tmp_path / "a.npz", {"x": np.eye(2)})
    before = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_arrays(path, {"x": np.eye(3)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_too_many_strings_for_a_header_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgap_lightning.data.arrays.MAX_METADATA", 100)
    with pytest.raises(ValueError, match="s: .* bytes of strings, a .safetensors header holds 100"):
        write_arrays(tmp_path / "a.safetensors", {"s": np.array(["x" * 200])})


def test_a_missing_file_a_folder_and_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a.npz: not found"):
        read_arrays(tmp_path / "a.npz")
    (tmp_path / "b.npz").mkdir()
    with pytest.raises(FileNotFoundError, match=r"b.npz: a folder"):
        read_arrays(tmp_path / "b.npz")
    for call in (read_arrays, lambda path: write_arrays(path, {})):
        with pytest.raises(ValueError, match=r"a.pt: unknown suffix '.pt', expected .npz or .safetensors"):
            call(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_empty_truncated_and_foreign_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    refuse(path, r"the file is empty \(0 bytes\)")
    write_arrays(path, {"x": np.random.default_rng(0).random((40, 30)), "y": np.arange(3)})
    whole = path.read_bytes()
    for size in (1, 7, 30, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse(path, "not a readable")
    path.write_bytes(b"PK\x03\x04 and then something else entirely" * 10)
    refuse(path, "not a readable")


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.npz", {"x": np.ones(1000)})
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    refuse(path, "not a readable .npz file .*CRC")


def test_a_garbled_name_in_an_archive_is_noticed(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.npz", {"é": np.ones(3)})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    refuse(path, "not a readable .npz file")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    objects = np.array([Bomb(executed)], dtype=object)
    np.savez(tmp_path / "a.npz", x=objects)
    refuse(tmp_path / "a.npz", "x: holds Python objects, which are never unpickled")
    archive(tmp_path / "b.npz", [("x.npy", npy(np.arange(2))), ("y.pkl", pickle.dumps(Bomb(executed)))])
    refuse(tmp_path / "b.npz", "y.pkl: not an array")
    archive(tmp_path / "c.npz", [("x.npy", pickle.dumps(Bomb(executed)))])
    refuse(tmp_path / "c.npz", "x: not a readable .npy header")
    assert not executed.exists()


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy_claiming((10**12, 3)), r"x: the header claims shape \(1000000000000, 3\) of float32"),
        (npy_claiming((4,), data=b"\0" * 15), "x: the header claims .*16 bytes.*, 15 are stored"),
        (npy_claiming((2,), data=b"\0" * 9), "x: the header claims"),
        (npy_claiming((-1, 4)), "x: "),
        (npy_claiming((2,), "<c8", b"\0" * 16), "x: got shape .* of complex64"),
        (npy_claiming((2,), "|V8", b"\0" * 16), "x: got shape"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"__import__('os')", "x: not a readable .npy header"),
        (b"", "x: not a readable .npy header"),
    ],
)
def test_npy_headers_that_claim_what_is_not_there_are_refused(tmp_path: Path, member: bytes, words: str) -> None:
    refuse(archive(tmp_path / "a.npz", [("x.npy", member)]), words)


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(tmp_path / "a.npz", [("x_id.npy", npy(np.arange(2))), ("x_id.npy", npy(np.arange(3)))])
    refuse(tmp_path / "a.npz", "x_id: stored twice")
    header = b'{"s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"strings":"{\\"s\\": [\\"a\\"]}"}}'
    refuse(safetensors(tmp_path / "a.safetensors", header, b"\0" * 4), "s: stored twice")


def test_an_archive_that_unpacks_absurdly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgap_lightning.data.arrays.FREE_EXPANSION", 1 << 16)
    path = archive(tmp_path / "a.npz", [("x.npy", npy(np.zeros(10**6)))], zipfile.ZIP_DEFLATED)
    refuse(path, "x: [0-9]+ bytes claim to unpack to 8000128")


def test_a_directory_that_claims_ten_terabytes_allocates_nothing(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", [("x.npy", npy(np.arange(2)))])
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    claim = struct.pack("<I", 0xFFFFFFFE)
    path.write_bytes(data[: start + 24] + claim + data[start + 28 :])
    refuse(path, "claim to unpack to 4294967294")


def test_a_directory_and_a_header_that_agree_on_bytes_that_are_not_there(tmp_path: Path) -> None:
    member = npy_claiming((3,), "<i8", b"\1" * 16)
    data = archive(tmp_path / "a.npz", [("x.npy", member)]).read_bytes()
    start = data.index(b"PK\x01\x02") + 24
    (tmp_path / "a.npz").write_bytes(data[:start] + struct.pack("<I", len(member) + 8) + data[start + 4 :])
    refuse(tmp_path / "a.npz", f"x.npy has {len(member)} of {len(member) + 8} bytes")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"x": {"dtype": "F32", "shape": [10**12, 3], "data_offsets": [0, 12 * 10**12]}}, b"\0" * 16),
        ({"x": {"dtype": "F32", "shape": [10**12, 3], "data_offsets": [0, 16]}}, b"\0" * 16),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, b"\0" * 16),
        ({"x": {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        ([], b""),
    ],
)
def test_safetensors_headers_that_lie_are_refused(tmp_path: Path, header: object, data: bytes) -> None:
    refuse(safetensors(tmp_path / "a.safetensors", json.dumps(header).encode(), data), "not a readable .safetensors")


def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 10**13) + b"{}")
    refuse(tmp_path / "a.safetensors", "not a readable .safetensors")


@pytest.mark.parametrize("text", ["[1]", '{"s": [1]}', '{"s": {"a": "b"}}', "nonsense", "[" * 100_000])
def test_strings_that_are_no_strings_are_refused(tmp_path: Path, text: str) -> None:
    header = json.dumps({"__metadata__": {"strings": text}}).encode()
    refuse(safetensors(tmp_path / "a.safetensors", header), "metadata 'strings': expected JSON")


def test_types_that_numpy_lacks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    assert read_arrays(tmp_path / "a.safetensors")["x"].dtype == torch.bfloat16
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    refuse(tmp_path / "b.safetensors", "not a readable")
