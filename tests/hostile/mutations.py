"""Mutations that know the formats: JSON, tar, zip, `.npy`, safetensors and pickles, checksums kept true.

Blind changes of a file end at its first checksum; these end up in the code behind it.
"""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import corpus  # beside this file
import numpy as np

_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**12, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "text",
    "../x", "audio\0", "x" * 300, [], [[]], {}, {"": None}, [1, "a"], ["text", "audio"], {"text": 6},
)  # fmt: skip
_SIZES = (-1, -512, 0, 1, 511, 512, 10**6, 8**11 - 1, 2**62, 2**64)
_TYPES = (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"S", b"x", b"g", b"X", b"\0", b"D")
_DESCRS = ("<f4", ">f4", "<f2", "<f8", "|O", "<U3", "<i8", "|b1", "<c8", "<M8[s]", "|V8", "[('a', '<f4')]", "|S4")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One or a few changes."""
    kind, body = data[:1] or b"\0", data[1:]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        body = rng.choice((_mutate_bytes, _mutate_known, _mutate_known))(body, rng)
    return kind + body


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(5)
        if what == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 512)))
        elif what == 2:
            del out[at : at + rng.choice((1, 2, 8, 512, len(out)))]
        elif what == 3:
            out[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x7f", b"\xff" * 4 + b"\0" * 4))
        else:
            size, other = rng.choice((1, 8, 64, 512, 1024)), rng.randrange(len(out) + 1)
            out[at:at] = out[other : other + size]
    return bytes(out)


def _mutate_known(data: bytes, rng: random.Random) -> bytes:
    head = data[:8]
    if data[:1] in b"{[" and data:
        return _mutate_json(data, rng)
    if data[257:262] == b"ustar":
        return _mutate_tar(data, rng)
    if head[:4] == b"PK\x03\x04":
        return _mutate_zip(data, rng)
    if data[8:9] == b"{" and len(data) >= 8 + int.from_bytes(head, "little"):
        size = int.from_bytes(head, "little")
        text = _mutate_json(data[8 : 8 + size], rng)
        length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**63, 2**64 - 1, 10**12))
        return length.to_bytes(8, "little") + text + data[8 + size :]
    return _mutate_bytes(data, rng)


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return _mutate_bytes(data, rng)
    places = [([root], 0), *_places(root)]
    holder, key = rng.choice(places)
    what = rng.randrange(6)
    if what == 0 and isinstance(holder, dict) and key in holder:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "text", "audio", "video", str(key) + "2"))] = holder[key]
    elif what == 2:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    elif what == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 10**9 if abs(holder[key]) < 1e18 else 0))
    else:
        holder[key] = rng.choice(_VALUES)
    return json.dumps(places[0][0][0]).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def _mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """Lie in one header, checksum kept true; or put a header of another type, or a lying `.npy`, into the archive."""
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return _mutate_bytes(data, rng)
    at = rng.choice(starts)
    out = bytearray(data)
    what = rng.randrange(5)
    if what == 0:
        name = out[at : at + 100].split(b"\0")[0].decode("utf-8", "replace")[:90]
        out[at : at + 512] = corpus.member(name, rng.choice(_SIZES), rng.choice(_TYPES))
    elif what == 1:
        pax = rng.choice(("size=-512", "size=99999999999999999999", "GNU.sparse.major=1", "GNU.sparse.map=0,1",
                          "GNU.sparse.size=9999999999", "path=../../x", "hdrcharset=BINARY", "mtime=nan"))  # fmt: skip
        record = f" {pax}\n"
        text = f"{len(record) + len(str(len(record) + 2))}{record}".encode()
        head = corpus.member("pax", rng.choice((len(text), *_SIZES)), rng.choice((b"x", b"g", b"L", b"X")))
        out[at:at] = head + text.ljust(512, b"\0")
    elif what == 2:
        out[at : at + 512] = _resum(_mutate_bytes(bytes(out[at : at + 512]), rng)[:512].ljust(512, b"\0"))
    elif what == 3:
        size = rng.choice(_SIZES[2:8])
        shape = rng.choice(((6,), (4, 6), (10**13,), (2**40, 2**40), (0, 6), (-1,), (4, 6, 1), ()))
        head = corpus.npy_claim(shape, rng.choice(_DESCRS))
        out[at + 512 : at + 512 + len(head)] = head
        if rng.random() < 0.3:
            out[at : at + 512] = corpus.member("s0.audio.npy", size)
    else:
        other = rng.choice(starts)
        out[at:at] = data[other : other + 1024]
    return bytes(out)


def _resum(header: bytes) -> bytes:
    return header[:148] + b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:])) + header[156:]


def _mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Pack the archive again with one member changed, or lie in its directory."""
    if rng.random() < 0.4:
        marks = [m.start() for m in re.finditer(rb"PK\x01\x02|PK\x05\x06|PK\x03\x04", data)]
        out = bytearray(data)
        at = rng.choice(marks or [0]) + rng.randrange(4, 46)
        out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", rng.randbytes(4)))
        return bytes(out)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 1 << 20}
    except Exception:  # a damaged archive is mutated as bytes
        return _mutate_bytes(data, rng)
    if not members:
        return data
    name = rng.choice(list(members))
    what = rng.randrange(6)
    if what == 0:
        members[name] = _mutate_bytes(members[name], rng)
    elif what == 1:
        members[rng.choice(("audio_id.npy", "../x.npy", "x.npy", "audio.npy", "video.npy", "encoder.npy"))] = members[
            name
        ]
    elif what == 2:
        del members[name]
    elif what == 3:
        head = corpus.npy_claim(rng.choice(((4, 6), (10**13,), (4,), (), (2, 2, 6))), rng.choice(_DESCRS))
        members[name] = head + members[name][128 if rng.random() < 0.8 else 0 :]
    elif what == 4:
        members[name] = _mutate_pickle(members[name], rng)
    else:
        values = rng.choice(((np.nan,), (0.0,), (np.inf,), (2.0,), ("\0",), ("é" * 40,)))
        members[name] = corpus.npy(np.array(values * 4))
    return corpus.npz(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Change numbers and names in a pickle without moving its opcodes."""
    out = bytearray(data)
    found = [m.start() + 1 for m in re.finditer(rb"[KMJ]", data)]
    if found and rng.random() < 0.6:
        at = rng.choice(found)
        out[at : at + 1] = rng.choice((b"\0", b"\x01", b"\xff", b"\x7f"))
        return bytes(out)
    for old, new in (
        (b"FloatStorage", b"LongStorage "),
        (b"collections", b"subprocess "),
        (b"OrderedDict", b"check_output"),
    ):
        if rng.random() < 0.3:
            return data.replace(old, new[: len(old)])
    return _mutate_bytes(data, rng)
