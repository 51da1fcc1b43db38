"""Files that a stranger might send, made on the spot: honest ones to start from, and payloads that would leave a trace.

A `Canary` is a pickle whose loading creates a file. Every test that plants one also asserts that the file is absent,
and `test_pickles.py` shows once that the canary sings when it is really unpickled.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

DIM = 6


class Canary:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(canary: Path) -> bytes:
    """A plain pickle."""
    return pickle.dumps(Canary(canary))


def object_npy(canary: Path) -> bytes:
    """A `.npy` file of one Python object."""
    file = io.BytesIO()
    np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return file.getvalue()


def torch_file(path: Path, content: object, **options: Any) -> Path:
    """What `torch.save` writes, canaries included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def npy(array: np.ndarray) -> bytes:
    """An honest `.npy` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_claim(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """A `.npy` header that claims `shape`, and no data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar header with a true checksum that may claim anything; sizes beyond octal digits are written in base 256."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:])
    if 0 <= size < 8**11:
        header[124:136] = b"%011o\0" % size
    else:
        header[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar(members: dict[str, bytes]) -> bytes:
    """An honest tar; its last 1024 bytes are the end mark."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset  # type: ignore[attr-defined]
    return file.getvalue()[:end] + bytes(1024)


def rows(count: int, dim: int = DIM, seed: int = 0) -> Tensor:
    """`(count, dim)` unit rows away from the origin."""
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=g) + 2, dim=1)


def classic_members(samples: int = 3) -> dict[str, bytes]:
    """Members of a classic WebDataset tar: `s0.audio.npy`, `s0.text.npy`, ..."""
    x = {name: rows(samples, seed=seed).numpy() for seed, name in enumerate(("audio", "text"))}
    return {f"s{i}.{m}.npy": npy(x[m][i]) for i in range(samples) for m in x}


def block_members(count: int = 4, stem: str = "000000") -> dict[str, bytes]:
    """Members of one block of a block shard."""
    members = {}
    for seed, name in enumerate(("audio", "text")):
        members[f"{stem}.{name}.npy"] = npy(rows(count, seed=seed).numpy())
        members[f"{stem}.{name}_id.npy"] = npy(np.arange(count))
    return members


def write_block_shard(folder: Path, data: bytes, count: int = 4) -> Path:
    """A folder whose manifest says that `data` is one block of `count` pairs, without checksums."""
    from diffgap_lightning.data.manifest import Block, Manifest, Shard, write_manifest

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.tar").write_bytes(data)
    shard = Shard("x.tar", len(data), (Block(0, len(data), (count, count)),))
    write_manifest(folder, Manifest("pairs", {"audio": DIM, "text": DIM}, (shard,), "float32"))
    return folder


def table_fields(count: int = 4) -> dict[str, np.ndarray]:
    """The fields of an honest embedding table."""
    ids = np.arange(count)
    return {
        "audio": rows(count).numpy(),
        "audio_id": ids,
        "text": rows(count, seed=1).numpy(),
        "text_id": ids,
        "text_caption": np.array([f"caption {i}" for i in range(count)]),
        "encoder": np.array("someone's"),
    }


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of named `.npy` files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def zip_bomb(size: int, name: str = "audio.npy", head: bytes = b"") -> bytes:
    """An archive of one member that unpacks to `size` bytes of zeros after `head`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as out:
        out.write(head)
        block = bytes(1 << 20)
        for at in range(len(head), size, len(block)):
            out.write(block[: size - at])
    return file.getvalue()


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header may be anything, and may claim any length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def make_refiner(count: int = 48) -> Any:
    """A tiny refiner from text to audio, measured on `count` pairs."""
    from diffgap_lightning.refiner import DiffGAPRefiner

    g = torch.Generator().manual_seed(0)
    latent = torch.randn(count, 3, generator=g)
    x = {m: normalize(latent @ torch.randn(3, DIM, generator=g) + 2, dim=1) for m in ("text", "audio")}
    x = {m: normalize(v + 0.1 * torch.randn(v.shape, generator=g), dim=1) for m, v in x.items()}
    return DiffGAPRefiner.measure(x, dict.fromkeys(x, torch.arange(count)), width=8, depth=1, rank=3, few_pairs=0)


def make_ckpt(path: Path, folder: Path) -> Path:
    """A Lightning checkpoint of a module around the refiner in `folder`, as `fit` would write it."""
    from lightning.pytorch import Trainer

    from diffgap_lightning.training.module import DiffGAPModule

    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", default_root_dir=str(path.parent))  # fmt: skip
    trainer.strategy.connect(DiffGAPModule(refiner=str(folder)))
    trainer.save_checkpoint(path)
    return path
