"""Does a long run leak? Memory, open files and threads of a run that does everything, sampled after every epoch.

    python benchmarks/soak.py --minutes 15

A tiny refiner is trained on block shards, streamed by worker processes, with averaged weights, a validation, a
checkpoint and a saved refiner every epoch, so that an hour's worth of epochs, files and checkpoints passes in minutes.
After a third of the epochs as warm-up, the process's own memory is fitted by a line; printed is its slope with a 95 %
interval from blocks of neighbouring epochs (their residuals are correlated), and how files and threads changed.

Own memory is what only the process holds, in memory or swapped out. The resident size would also count pages of the
libraries' files, which the kernel drops and reads again as other programs please. With `TMPDIR=/dev/shm` several times
as many epochs fit, because nothing waits for a disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.data.webdataset_module import WebDatasetDataModule
from diffgap_lightning.training.callbacks import SaveRefiner
from diffgap_lightning.training.module import DiffGAPModule


class Sample(NamedTuple):
    """What the process held at one moment."""

    epoch: int
    seconds: float
    memory: float  # MiB of its own
    files: int
    threads: int


def own_memory() -> float:
    """MiB that this process alone holds, swapped out or not (Linux)."""
    status = Path("/proc/self/status").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", status)) / 2**10


class Meter(Callback):
    """Samples after every epoch and ends the run in time, or when it is full.

    A list of samples would itself grow by 160 bytes an epoch, which shows: all of their memory is taken beforehand.

    Args:
        minutes: When to stop.
        most: Samples that it can hold.
    """

    def __init__(self, minutes: float, most: int = 100_000) -> None:
        self.values, self.count = np.full((most, len(Sample._fields)), np.nan), 0
        self.start, self.end = time.monotonic(), time.monotonic() + 60 * minutes

    @property
    def samples(self) -> list[Sample]:
        """Those taken so far."""
        return [Sample(int(e), s, m, int(f), int(t)) for e, s, m, f, t in self.values[: self.count].tolist()]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample; checkpoints and the refiner of this epoch are written by callbacks before this one."""
        gc.collect()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        now = time.monotonic()
        self.values[self.count] = trainer.current_epoch, now - self.start, own_memory(), files, threads
        self.count += 1
        trainer.should_stop = now > self.end or self.count == len(self.values)


def soak(folder: Path, minutes: float, max_epochs: int = 1_000_000, num_workers: int = 1) -> list[Sample]:
    """Train until the time or the epochs are over.

    Args:
        folder: For shards, checkpoints and the refiner.
        minutes: Time limit.
        max_epochs: Most epochs.
        num_workers: Processes that read shards.
    """
    seed_everything(0, verbose=False)
    world = SyntheticWorld(latent_dim=4, num_concepts=4, dim=12, hidden_dim=16)
    for seed, (split, count) in enumerate((("train", 256), ("val", 48))):
        drawn = world.sample(count, seed)
        ids = torch.arange(count)
        table = EmbeddingTable({"audio": drawn.audio, "text": drawn.text}, {"audio": ids, "text": ids})
        kind = "pairs" if split == "train" else "rows"
        write_embedding_shards(table, folder / split, kind=kind, rows_per_block=64, rows_per_shard=128, overwrite=True)
    data = WebDatasetDataModule(
        train=str(folder / "train"), val=str(folder / "val"), batch_size=64, num_workers=num_workers
    )
    meter = Meter(minutes)
    saves = [ModelCheckpoint(folder / "checkpoints", monitor="val/r1", mode="max", save_top_k=2, save_last=True)]
    trainer = Trainer(
        accelerator="cpu", max_epochs=max_epochs, logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[EMAWeightAveraging(decay=0.9, use_buffers=False), SaveRefiner(), *saves, meter],
    )  # fmt: skip
    trainer.fit(DiffGAPModule(width=16, depth=1, rank=4, num_steps=2), datamodule=data)
    return meter.samples


def slope(x: Sequence[float], y: Sequence[float], blocks: int = 8, draws: int = 4000) -> tuple[float, float, float]:
    """Slope of the least-squares line and a 95 % interval, from a bootstrap of blocks of neighbouring residuals.

    Args:
        x: Where.
        y: What was measured there.
        blocks: Neighbours stay together, because memory moves in steps that last.
        draws: Of the bootstrap.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    centred = x - x.mean()
    value = float(centred @ (y - y.mean()) / (centred @ centred))
    residual = y - y.mean() - value * centred
    rng, size = np.random.default_rng(0), max(1, len(x) // blocks)
    starts = rng.integers(0, len(x) - size + 1, (draws, -(-len(x) // size)))
    index = (starts[:, :, None] + np.arange(size)).reshape(draws, -1)[:, : len(x)]
    noise = residual[index] @ centred / (centred @ centred)
    low, high = np.quantile(value - noise, (0.025, 0.975))
    return value, float(low), float(high)


def main() -> None:
    """Run and print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the samples")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(Path(folder), options.minutes, num_workers=options.num_workers)
    if len(samples) < 20:
        parser.exit(1, f"{len(samples)} epochs are too few for a slope: give more minutes\n")
    steady = samples[len(samples) // 3 :]
    value, low, high = slope([s.epoch for s in steady], [s.memory for s in steady])
    print(f"{len(samples)} epochs in {samples[-1].seconds / 60:.1f} min; own memory {steady[-1].memory:.0f} MiB")
    print(f"memory: {1000 * value:+.2f} MiB in 1000 epochs, 95 % interval {1000 * low:+.2f} to {1000 * high:+.2f}")
    for name in ("files", "threads"):
        counts = [getattr(s, name) for s in steady]
        print(f"{name}: {min(counts)} to {max(counts)}")
    if options.json:
        options.json.write_text(json.dumps([s._asdict() for s in samples]))


if __name__ == "__main__":
    main()
