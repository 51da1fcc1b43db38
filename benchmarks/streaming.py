"""How fast pairs come from shards: block shards against per-sample tars, memory and a memory map, in one run.

    python benchmarks/streaming.py --json streaming.json                     pairs/s of one reader, and ratios
    python benchmarks/streaming.py --fit --json streaming.json               steps/s of a fit, streamed and in memory
    python benchmarks/streaming.py --memory 1000000 10000000 --json m.json   peak memory of writing and of streaming

Readers are compared in turns: in one process with one thread per second of processor time, which a busy machine changes
little, and through one worker process per second of wall time. Fits are compared per second of wall time, in turns too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WDS_SECURE", "1")

import numpy as np
import torch

from diffgap_lightning.data.batches import PairBatches
from diffgap_lightning.data.losses import LossLedger
from diffgap_lightning.data.plan import TrainPlan
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.stream import TrainStream
from diffgap_lightning.data.stream_loader import TrainLoader
from diffgap_lightning.data.table import EmbeddingTable

BATCH = 4096
Reader = Callable[[], int]


def unit_rows(rows: int, dim: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_table(rows: int, dim: int) -> EmbeddingTable:
    ids = torch.arange(rows)
    embeddings = {m: torch.from_numpy(unit_rows(rows, dim, seed)) for seed, m in enumerate(("audio", "text"))}
    return EmbeddingTable(embeddings, {"audio": ids, "text": ids})


def write_samples(table: EmbeddingTable, path: Path) -> None:
    """A classic WebDataset tar: one key a pair, one `.npy` a modality."""
    with tarfile.open(path, "w") as tar:
        for i in range(len(table.ids["audio"])):
            for modality, rows in table.embeddings.items():
                file = io.BytesIO()
                np.save(file, rows[i].numpy())
                info = tarfile.TarInfo(f"{i:08d}.{modality}.npy")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)


def stream_reader(spec: Path, workers: int = 0) -> Reader:
    """One epoch through the project's own loader, in this process or in a worker."""
    shards = open_shards(spec)
    rows = shards.manifest.block_rows[:, 0]
    ledger = LossLedger("train", int(rows.sum()))
    loader = TrainLoader(TrainStream(shards, TrainPlan(rows, BATCH)), ledger, num_workers=workers)
    return lambda: sum(len(batch["audio"]) for batch in loader)


def webdataset_reader(path: Path, workers: int = 0) -> Reader:
    """WebDataset's usual pipeline over the per-sample tar."""
    import webdataset as wds

    data = wds.WebDataset(str(path), shardshuffle=False, empty_check=False).decode()
    batches = data.to_tuple("audio.npy", "text.npy").batched(BATCH)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(audio) for audio, _ in loader)


def memory_reader(table: EmbeddingTable) -> Reader:
    batches = PairBatches(table.embeddings, table.ids, BATCH)
    return lambda: sum(len(batches[0, step]["audio"]) for step in range(len(batches)))


def memmap_reader(folder: Path, table: EmbeddingTable) -> Reader:
    for modality, rows in table.embeddings.items():
        np.save(folder / f"{modality}.npy", rows.numpy())
    maps = [np.load(folder / f"{m}.npy", mmap_mode="r") for m in table.modalities]

    def read() -> int:
        return sum(
            len([np.array(x[start : start + BATCH]) for x in maps][0]) for start in range(0, len(maps[0]), BATCH)
        )

    return read


def measure(readers: dict[str, Reader], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median pairs a second of each reader, in turns; the first round fills the page cache and is not counted."""
    rates: dict[str, list[float]] = {label: [] for label in readers}
    for number in range(rounds + 1):
        for label, read in readers.items():
            start = clock()
            count = read()
            if number:
                rates[label].append(count / (clock() - start))
    return {label: statistics.median(values) for label, values in rates.items()}


def compare_readers(rows: int, dim: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name), random_table(rows, dim)
        few = table.select(range(min(rows, 2 * BATCH)))
        for dtype in ("float16", "float32"):
            write_embedding_shards(table, folder / dtype, dtype=dtype)
        write_samples(few, folder / "samples.tar")
        readers = {
            "block shards, float16": stream_reader(folder / "float16"),
            "block shards, float32": stream_reader(folder / "float32"),
            "per-sample tar, WebDataset": webdataset_reader(folder / "samples.tar"),
            "per-sample tar, this package": stream_reader(folder / "samples.tar"),
            "in memory, indexed": memory_reader(table),
            "memory map, in order": memmap_reader(folder, table),
        }
        with_worker = {
            "block shards, float16": stream_reader(folder / "float16", 1),
            "block shards, float32": stream_reader(folder / "float32", 1),
            "per-sample tar, WebDataset": webdataset_reader(folder / "samples.tar", 1),
        }
        own = measure(readers, rounds, time.process_time)
        worker = measure(with_worker, rounds, time.perf_counter)
    slowest = "per-sample tar, WebDataset"
    return {
        "pairs_per_second": own,
        "times_per_sample_tar": {label: value / own[slowest] for label, value in own.items()},
        "worker_pairs_per_second": worker,
        "worker_times_per_sample_tar": {label: value / worker[slowest] for label, value in worker.items()},
        "rows": rows,
        "dim": dim,
        "rounds": rounds,
    }


def fit_rate(data: Any, steps: int, width: int, depth: int) -> float:
    """Steps a second of a `DiffGAPModule` fit, its first steps (start of the workers) left out."""
    import warnings

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

    from diffgap_lightning.training.module import DiffGAPModule

    warmup, times = 4, []

    class Clock(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            times.append(time.perf_counter())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=steps + warmup,
            max_epochs=-1,
            callbacks=[Clock()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(DiffGAPModule(width=width, depth=depth, rank=64, max_rows=20_000), data)
    return steps / (times[-1] - times[warmup - 1])


def compare_fits(rows: int, dim: int, rounds: int, steps: int, width: int, depth: int, workers: int) -> dict[str, Any]:
    import logging

    from diffgap_lightning.data import EmbeddingDataModule, WebDatasetDataModule

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rates: dict[str, list[float]] = {"in memory": [], "stream": []}
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name), random_table(rows, dim)
        table.write(folder / "table.npz")
        write_embedding_shards(table, folder / "train")
        for _ in range(rounds):
            memory = EmbeddingDataModule(folder / "table.npz", BATCH, val_fraction=0, test_fraction=0)
            rates["in memory"].append(fit_rate(memory, steps, width, depth))
            stream = WebDatasetDataModule(str(folder / "train"), batch_size=BATCH, num_workers=workers)
            rates["stream"].append(fit_rate(stream, steps, width, depth))
    ratios = [stream / memory for memory, stream in zip(rates["in memory"], rates["stream"], strict=True)]
    return {
        "steps_per_second": rates,
        "stream_over_memory": ratios,
        "median": statistics.median(ratios),
        "batch_size": BATCH,
        "rows": rows,
        "dim": dim,
        "width": width,
        "depth": depth,
        "workers": workers,
    }


def synthetic_chunks(rows: int, dim: int, size: int = 1 << 16) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, rows, size):
        count = min(size, rows - start)
        ids = np.arange(start, start + count)
        yield {m: unit_rows(count, dim, start + k) for k, m in enumerate(("audio", "text"))} | {
            "audio_id": ids,
            "text_id": ids,
        }


def peak_mib() -> float:
    """The largest resident set of this process so far, or of a worker that has ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


def memory_child(task: str, rows: int, dim: int, folder: Path, workers: int) -> None:
    """One measurement in a process of its own; prints the peak in MiB, the seconds, and the rows."""
    start = time.perf_counter()
    if task == "write":
        write_embedding_shards(synthetic_chunks(rows, dim), folder / "train")
        seen = rows
    else:
        shards = open_shards(folder / "train")
        plan = TrainPlan(shards.manifest.block_rows[:, 0], BATCH, lanes=max(1, workers))
        loader = TrainLoader(TrainStream(shards, plan), LossLedger("train", rows), num_workers=workers)
        seen = sum(len(batch["audio"]) for batch in loader)
        loader.close()
    print(json.dumps({"peak_mib": peak_mib(), "seconds": time.perf_counter() - start, "rows": seen}))


def measure_memory(sizes: list[int], dim: int, workers: int) -> dict[str, Any]:
    """Peak memory of writing and of streaming, each size in its own processes."""
    found: dict[str, Any] = {"dim": dim, "write": {}, "stream": {}}
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for task in ("write", "stream"):
                command = [sys.executable, __file__, "--child", task, folder, "--rows", str(rows), "--dim", str(dim)]
                result = subprocess.run(
                    [*command, "--workers", str(workers)], check=True, capture_output=True, text=True
                )
                found[task][str(rows)] = json.loads(result.stdout)
    for task in ("write", "stream"):
        peaks = [found[task][str(rows)]["peak_mib"] for rows in sizes]
        found[task]["largest_over_first"] = max(peaks) / peaks[0]
    return found


def report(results: dict[str, Any]) -> None:
    if "readers" in results:
        readers = results["readers"]
        titles = {"": "this process, processor time", "worker_": "one worker process, wall time"}
        for prefix, title in titles.items():
            print(f"\n{title:<32}{'pairs/s':>12}{'x per-sample tar':>20}")
            for label, rate in readers[f"{prefix}pairs_per_second"].items():
                print(f"{label:<32}{rate:>12,.0f}{readers[f'{prefix}times_per_sample_tar'][label]:>20.1f}")
    if "fit" in results:
        fit = results["fit"]
        print(f"\nfit at batch {fit['batch_size']}, stream / in memory: median {fit['median']:.2f}")
        for name, rates in fit["steps_per_second"].items():
            print(f"  {name:<12}" + "  ".join(f"{rate:.2f}" for rate in rates) + " steps/s")
    if "memory" in results:
        memory = results["memory"]
        for task in ("write", "stream"):
            sizes = {k: v for k, v in memory[task].items() if k.isdigit()}
            told = ", ".join(
                f"{int(k):,} pairs {v['peak_mib']:.0f} MiB in {v['seconds']:.0f} s" for k, v in sizes.items()
            )
            print(f"\n{task}: {told}; largest / first {memory[task]['largest_over_first']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--dim", type=int, help="default: 512, and 64 for --memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fit", action="store_true", help="also compare fits")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each fit")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS", help="measure memory for these sizes instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("TASK", "FOLDER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if a.child:
        memory_child(a.child[0], a.rows, a.dim, Path(a.child[1]), a.workers)
        return
    results: dict[str, Any] = {"command": " ".join(["python", "benchmarks/streaming.py", *sys.argv[1:]])}
    if a.memory:
        results["memory"] = measure_memory(a.memory, a.dim or 64, a.workers)
    else:
        results["readers"] = compare_readers(a.rows, a.dim or 512, a.rounds)
        if a.fit:
            results["fit"] = compare_fits(a.rows, a.dim or 512, a.rounds, a.steps, a.width, a.depth, a.workers)
    report(results)
    if a.json:
        a.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
