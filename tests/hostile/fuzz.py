"""Fuzzing of everything that reads a stranger's file: `python tests/hostile/fuzz.py READER [--minutes M]`.

    shards        block shards, classic and raw tars, manifests: data/shard_index, shard_reader, raw_shards, manifest
    table         `.npz` and `.safetensors` embedding tables: data/table, data/arrays, data/npy
    checkpoint    refiner folders, bridges, PyTorch weight files, Lightning checkpoints

A reader may take an input or refuse it with one of `REFUSALS`; anything else that it raises, memory beyond `--memory`
and more than ten seconds for one input are findings, written to `--findings DIR` with their traceback.

An input is one byte that chooses the format, then the file. With `atheris` (pip install atheris) mutations are steered
by coverage; without it, they are random. In either case half of them know the format: they change a value of a JSON
text, write a tar, zip or `.npy` header that lies, or keep checksums true, because blind changes end at the checksum.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import corpus  # beside this file
import numpy as np
import torch
from mutations import mutate  # beside this file

REFUSALS = (ValueError, FileNotFoundError)  # ShardError is a ValueError
Read = Callable[[bytes, Path], object]

# ---- readers: (bytes of one file, an empty folder) -> whatever, or a refusal


def read_block(data: bytes, folder: Path) -> object:
    """A block shard under an honest manifest without checksums."""
    from diffgap_lightning.data.shard_index import open_shards
    from diffgap_lightning.data.shard_reader import BlockReader

    if not data:
        return None
    return BlockReader(open_shards(corpus.write_block_shard(folder / "s", data)), extras=True).read(0)


def read_manifest(data: bytes, folder: Path) -> object:
    """A manifest beside an honest tar."""
    from diffgap_lightning.data.shard_index import open_shards
    from diffgap_lightning.data.shard_reader import BlockReader

    (folder / "x.tar").write_bytes(corpus.tar(corpus.block_members()))
    (folder / "manifest.json").write_bytes(data)
    reader = BlockReader(open_shards(folder), extras=True)
    return [reader.read(i) for i in range(min(len(reader), 8))]


def read_classic(data: bytes, folder: Path) -> object:
    """A classic WebDataset tar without a manifest."""
    from diffgap_lightning.data.shard_index import open_shards
    from diffgap_lightning.data.shard_reader import BlockReader

    (folder / "x.tar").write_bytes(data)
    reader = BlockReader(open_shards(folder / "x.tar"), extras=True)
    return [reader.read(i) for i in range(len(reader))]


def read_raw(data: bytes, folder: Path) -> object:
    """A tar of raw media; the media are not decoded."""
    from diffgap_lightning.data.raw_shards import iter_raw_clips

    (folder / "x.tar").write_bytes(data)
    return list(iter_raw_clips(str(folder / "x.tar"), "x", max_bytes=1 << 20))


def read_table(data: bytes, folder: Path, suffix: str) -> object:
    """An embedding table."""
    from diffgap_lightning.data.table import EmbeddingTable

    path = folder / f"x{suffix}"
    path.write_bytes(data)
    table = EmbeddingTable.read(path, normalize=len(data) % 2 == 0)
    return table.write(folder / f"again{suffix}")


@functools.cache
def honest() -> Path:
    """A folder with an honest refiner, bridge and checkpoint, made once."""
    from diffgap_lightning.bridges import MLPBridge, RidgeBridge

    folder = Path(tempfile.mkdtemp(prefix="diffgap-fuzz-"))
    corpus.make_refiner().save_pretrained(folder / "refiner")
    x = {m: corpus.rows(32, seed=seed) for seed, m in enumerate(("text", "audio"))}
    for name, bridge in (("ridge", RidgeBridge()), ("mlp", MLPBridge(width=4, max_steps=1))):
        bridge.fit(x, dict.fromkeys(x, torch.arange(32))).save_pretrained(folder / name)
    corpus.make_ckpt(folder / "x.ckpt", folder / "refiner")
    state = {"a": torch.ones(2, 3), "b": torch.arange(4)}
    corpus.torch_file(folder / "zip.pt", {"state_dict": state, "best": np.float64(0.5)})
    corpus.torch_file(folder / "old.pt", state, _use_new_zipfile_serialization=False)
    return folder


def _folder_of(name: str, folder: Path, config: bytes | None, tensors: bytes | None) -> Path:
    """A copy of an honest folder with one of its files replaced, and the digest that goes with it."""
    shutil.copytree(honest() / name, folder / name)
    if config is not None:
        (folder / name / "config.json").write_bytes(config)
    if tensors is not None:
        (folder / name / "model.safetensors").write_bytes(tensors)
        record = json.loads((folder / name / "config.json").read_text())
        record["sha256"] = hashlib.sha256(tensors).hexdigest()
        (folder / name / "config.json").write_text(json.dumps(record))
    return folder / name


def read_refiner(data: bytes, folder: Path, part: str) -> object:
    """A refiner, which is used once if it loads."""
    from diffgap_lightning.refiner import DiffGAPRefiner

    refiner = DiffGAPRefiner.from_pretrained(_folder_of("refiner", folder, **_part(part, data)))
    source, target = refiner.directions[0]
    refiner.refine(corpus.rows(2, refiner.config.dims[source]), source=source, target=target, num_steps=1)
    x = {m: corpus.rows(2, refiner.config.dims[m]) for m in (source, target)}
    return refiner.score(x[source], x[target], source=source, target=target)


def read_bridge(data: bytes, folder: Path, name: str, part: str) -> object:
    """A bridge, which is used once if it loads."""
    from diffgap_lightning.bridges import load_bridge

    bridge = load_bridge(_folder_of(name, folder, **_part(part, data)))
    source, target = bridge._directions[0]
    return bridge.refine(corpus.rows(2, bridge.dims[source]), source=source, target=target)


def _part(part: str, data: bytes) -> dict[str, bytes | None]:
    return {"config": None, "tensors": None} | {part: data}


def read_pt(data: bytes, folder: Path) -> object:
    """A PyTorch weight file of an encoder."""
    from diffgap_lightning.encoders.weights import read_weights, weights_digest

    (folder / "x.pt").write_bytes(data)
    return weights_digest(read_weights(folder / "x.pt"))


def read_ckpt(data: bytes, folder: Path) -> object:
    """A Lightning checkpoint."""
    from diffgap_lightning.training.module import DiffGAPModule

    (folder / "x.ckpt").write_bytes(data)
    return DiffGAPModule.load_from_checkpoint(folder / "x.ckpt", map_location="cpu")


READERS: dict[str, tuple[Read, ...]] = {
    "shards": (read_block, read_manifest, read_classic, read_raw),
    "table": (functools.partial(read_table, suffix=".npz"), functools.partial(read_table, suffix=".safetensors")),
    "checkpoint": (
        functools.partial(read_refiner, part="config"),
        functools.partial(read_refiner, part="tensors"),
        functools.partial(read_bridge, name="ridge", part="config"),
        functools.partial(read_bridge, name="ridge", part="tensors"),
        functools.partial(read_bridge, name="mlp", part="config"),
        read_pt,
        read_ckpt,
    ),
}


def seeds(reader: str) -> list[bytes]:
    """Honest inputs, and what the hostile tests use."""
    if reader == "shards":
        raw = {"a.txt": b"a dog", "a.wav": b"RIFF", "b.json": b'{"text": ["a", "b"]}', "b.flac": b"fLaC"}
        lies = [corpus.member("s0.audio.npy", size) + corpus.npy_claim((6,)) for size in (-512, 0, 10**13)]
        tars = [corpus.tar(corpus.block_members()), corpus.tar(corpus.classic_members()), corpus.tar(raw), *lies]
        with tempfile.TemporaryDirectory() as folder:
            corpus.write_block_shard(Path(folder), tars[0])
            manifest = (Path(folder) / "manifest.json").read_bytes()
        return [b"\1" + manifest] + [bytes([kind]) + data for data in tars for kind in (0, 2, 3)]
    if reader == "table":
        fields = corpus.table_fields()
        names = {f"{name}.npy": corpus.npy(value) for name, value in fields.items()}
        with tempfile.TemporaryDirectory() as folder:
            from diffgap_lightning.data.arrays import write_arrays

            tensors = write_arrays(Path(folder) / "x.safetensors", fields).read_bytes()
        return [b"\0" + corpus.npz(names), b"\0" + corpus.npz(names, zipfile.ZIP_DEFLATED), b"\1" + tensors]
    files = ("refiner/config.json", "refiner/model.safetensors", "ridge/config.json", "ridge/model.safetensors",
             "mlp/config.json", "zip.pt", "x.ckpt")  # fmt: skip
    found = [bytes([kind]) + (honest() / name).read_bytes() for kind, name in enumerate(files)]
    return [*found, b"\5" + (honest() / "old.pt").read_bytes()]


def run_one(reader: str, data: bytes) -> bool:
    """Give an input to its reader; returns whether it was taken.

    Raises:
        Exception: whatever is no refusal.
    """
    kinds = READERS[reader]
    read = kinds[data[0] % len(kinds)] if data else kinds[0]
    folder = Path(tempfile.mkdtemp(prefix="diffgap-fuzz-", dir=_fast_folder()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(data[1:], folder)
    except REFUSALS:
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


# ---- engines


_MODULES = ("data.raw_shards", "data.shard_index", "data.table", "bridges", "encoders.weights", "training.module")


class TooLong(BaseException):
    """One input took longer than its limit."""


def _alarm(signum: int, frame: object) -> None:
    raise TooLong


class Report:
    """Counts executions and keeps one input for each distinct place where something went wrong."""

    def __init__(self, reader: str, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.executions = self.taken = 0
        self.found: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def try_one(self, data: bytes) -> None:
        """Run one input under its time limit."""
        self.executions += 1
        signal.setitimer(signal.ITIMER_REAL, 10)
        try:
            self.taken += run_one(self.reader, data)
        except (Exception, TooLong) as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "diffgap_lightning" in f.filename] or frames
            key = f"{type(error).__name__} {Path(own[-1].filename).name}:{own[-1].lineno}"
            self.found[key] = self.found.get(key, 0) + 1
            if self.found[key] == 1:
                name = re.sub(r"\W+", "-", key)
                (self.folder / f"{self.reader}-{name}.bin").write_bytes(data)
                (self.folder / f"{self.reader}-{name}.txt").write_text("".join(traceback.format_exception(error)))
                print(f"finding: {key}: {str(error)[:200]}", file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __str__(self) -> str:
        """One line, then one for each finding."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        counts = f"{self.executions} executions, {self.taken} taken, {len(self.found)} findings"
        head = f"{self.reader}: {counts}, peak {peak:.0f} MiB"
        return "\n".join([head, *(f"  {count} x {key}" for key, count in self.found.items())])


def run_random(report: Report, minutes: float, seed: int) -> None:
    """Mutate seeds and what was taken, without looking at coverage."""
    rng = random.Random(seed)
    pool = seeds(report.reader)
    end = time.monotonic() + 60 * minutes
    for data in pool:
        report.try_one(data)
    while time.monotonic() < end:
        before, data = report.taken, mutate(rng.choice(pool), rng)
        report.try_one(data)
        if report.taken > before and len(pool) < 400:
            pool.append(data)


def run_atheris(report: Report, minutes: float, seed: int) -> None:
    """Let libFuzzer choose which inputs to mutate, by the lines of Python that they reach."""
    import atheris

    def custom(data: bytes, max_size: int, number: int) -> bytes:
        out = mutate(data, random.Random(number)) if number % 4 else atheris.Mutate(data, max_size)
        return bytes(out[:max_size])

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds(report.reader)):
            (Path(folder) / f"{number:03d}").write_bytes(data)
        flags = [f"-seed={seed}", "-max_len=200000", "-rss_limit_mb=0", "-timeout=60", "-len_control=0"]
        end = time.monotonic() + 60 * minutes

        def one(data: bytes) -> None:
            report.try_one(data)
            if time.monotonic() > end:
                raise KeyboardInterrupt  # libFuzzer would end the process before anything is reported

        atheris.Setup([sys.argv[0], *flags, folder], one, custom_mutator=custom)
        atheris.Fuzz()


def main() -> None:
    """Fuzz one reader and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of address space beyond what the imports take")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--engine", choices=("atheris", "random"), default="atheris")
    options = parser.parse_args()
    if options.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["diffgap_lightning", "tarfile", "zipfile"]):
            for name in ("tarfile", "zipfile"):  # imported above, without instruments
                importlib.reload(sys.modules[name])
            for name in _MODULES:
                importlib.import_module(f"diffgap_lightning.{name}")
    report = Report(options.reader, options.findings)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(*REFUSALS):
        run_one(options.reader, seeds(options.reader)[0])  # what is imported late counts as import
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) << 10  # type: ignore[union-attr]
    limit = used + int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _alarm)
    try:
        (run_atheris if options.engine == "atheris" else run_random)(report, options.minutes, options.seed)
    finally:
        print(report, flush=True)


if __name__ == "__main__":
    main()
