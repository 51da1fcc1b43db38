from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap_lightning.data.npy import decode_npy, decode_npy_header, npy_header


def saved(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.arange(6, dtype=np.int64),
        np.array(["a", "bcd", "é"]),
        np.empty((0, 5), np.float32),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f4"),
    ],
)
def test_what_numpy_saves_is_decoded(array: np.ndarray) -> None:
    decoded = decode_npy(memoryview(saved(array)), "x")
    assert decoded.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(decoded, array)


def test_decoding_shares_memory_and_the_header_is_numpys_own() -> None:
    array = np.arange(20, dtype=np.float32).reshape(4, 5)
    buffer = np.frombuffer(bytearray(saved(array)), np.uint8)
    assert np.shares_memory(decode_npy(buffer.data, "x"), buffer)
    assert npy_header(array) + array.tobytes() == saved(array)


def test_objects_are_refused_in_both_directions() -> None:
    with pytest.raises(ValueError, match=r"x.npy: holds Python objects, which are never unpickled"):
        decode_npy(saved(np.array([{1}, 2], dtype=object), allow_pickle=True), "x.npy")
    with pytest.raises(ValueError, match="never pickled"):
        npy_header(np.array([{}], dtype=object))


@pytest.mark.parametrize("shape", [(10**13,), (1 << 40, 1 << 40), (3, 5), (-1, 4), (4,)])
def test_a_claim_that_does_not_fit_the_bytes_is_refused(shape: tuple[int, ...]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with pytest.raises(ValueError, match=r"claims|expected an array"):
        decode_npy(header.getvalue() + bytes(12), "x")


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_garbage_raises_nothing_but_value_errors(data: bytes, magic: bool) -> None:
    with suppress(ValueError):
        decode_npy((b"\x93NUMPY\x01\x00" if magic else b"") + data, "x")


def test_header_of_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((7, 3), np.float16))
    shape, dtype, start = decode_npy_header(tmp_path / "a.npy")
    assert (shape, dtype) == ((7, 3), np.float16)
    assert start + 42 == (tmp_path / "a.npy").stat().st_size
    np.save(tmp_path / "f.npy", np.asfortranarray(np.zeros((7, 3))))
    with pytest.raises(ValueError, match="C-ordered"):
        decode_npy_header(tmp_path / "f.npy")
