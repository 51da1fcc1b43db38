"""How cost grows: exponents of time in pairs, steps and dimensions, and memory of a streamed fit against pairs.

An exponent is the slope of log(time) over log(size), by least squares. The clock is the processor's and runs from the
end of the first steps, which import, allocate and fill the stream's buffer once in any fit, to the end of training;
size counts what the clock saw. Each time is the least of a few, taken in turns. Streamed fits run in processes of their
own, which tell their peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import normalize

from speed_memory import peak_mb

BATCH = 512
DIM = 128
WARMUP = 8
CHUNK = 1 << 13  # rows that are made at once: less than training needs, so that its peak is not that of writing
Fits = dict[float, dict[str, float]]


def exponent(times: Mapping[float, float]) -> float:
    """Slope of the logarithms."""
    x, y = ([math.log(v) for v in values] for values in (times.keys(), times.values()))
    return float(statistics.linear_regression(x, y).slope)


class Watch(Callback):
    """Processor time and peak memory from the end of the first steps to that of training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step."""
        self.begun = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After the first steps."""
        if trainer.global_step == WARMUP:
            self.start, self.before = time.process_time(), peak_mb()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last."""
        self.seconds, self.after = time.process_time() - self.start, peak_mb()


def fit(pairs: int, epochs: float = 1.0, dim: int = DIM, stream: bool = False) -> dict[str, float]:
    """What the steps of one fit took."""
    from diffgap_lightning.data import EmbeddingDataModule, EmbeddingTable, WebDatasetDataModule
    from diffgap_lightning.data.shards import write_embedding_shards
    from diffgap_lightning.training.module import DiffGAPModule

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)

        def rows(start: int, count: int, ids: bool = True) -> dict[str, Any]:
            g = torch.Generator().manual_seed(start)
            made: dict[str, Any] = {
                m: normalize(torch.randn(count, dim, generator=g), dim=1) for m in ("audio", "text")
            }
            own = torch.arange(start, start + count)
            return made | {"audio_id": own, "text_id": own} if ids else made

        data: Any
        if stream:
            chunks = (rows(s, min(CHUNK, pairs - s)) for s in range(0, pairs, CHUNK))
            write_embedding_shards(({k: v.numpy() for k, v in part.items()} for part in chunks), folder / "train")
            data = WebDatasetDataModule(str(folder / "train"), batch_size=BATCH, num_workers=0)
        else:
            ids = torch.arange(pairs)
            EmbeddingTable(rows(0, pairs, ids=False), {"audio": ids, "text": ids}).write(folder / "table.npz")
            data = EmbeddingDataModule(folder / "table.npz", BATCH, val_fraction=0, test_fraction=0)
        watch = Watch()
        steps = int(epochs * pairs / BATCH)
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, callbacks=[watch], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(DiffGAPModule(width=64, depth=1, max_rows=4000), datamodule=data)
    found = {"steps": steps - WARMUP, "seconds": watch.seconds, "first_steps_seconds": watch.start - watch.begun}
    if stream:  # the only fit of its process, so that the peak is its own
        found |= {"peak_mb": watch.after, "first_steps_peak_mb": watch.before}
    return found


def streamed_alone(pairs: int) -> dict[str, float]:
    """A streamed fit in a process of its own, whose peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, str(pairs)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_turns(sizes: list[float], measure: Callable[[Any], dict[str, float]], rounds: int) -> Fits:
    """The fastest fit of each size."""
    found = [{size: measure(size) for size in sizes} for _ in range(rounds)]
    return {size: min((fits[size] for fits in found), key=lambda f: f["seconds"]) for size in sizes}


def in_steps(fits: Fits) -> float:
    """Exponent of time in the steps that were timed."""
    return exponent({f["steps"]: f["seconds"] for f in fits.values()})


def growth(quick: bool) -> dict[str, Any]:
    """Exponents and memory."""
    pairs: list[float] = [40_000, 80_000, 160_000] if quick else [50_000, 100_000, 200_000, 400_000]
    first, rounds = int(pairs[0]), 2 if quick else 3
    fit(first, epochs=0.2)  # the first fit imports and allocates
    by_pairs = in_turns(pairs, fit, rounds)
    by_steps = in_turns([1.0, 2.0, 4.0], lambda epochs: fit(first, epochs=epochs), rounds)
    by_dim = in_turns([64, 128, 256, 512], lambda dim: fit(first, dim=dim), rounds)
    streamed = in_turns(pairs, streamed_alone, rounds)
    return {
        "pairs": by_pairs, "epochs": by_steps, "dims": by_dim, "streamed": streamed,
        "exponent_pairs": in_steps(by_pairs),
        "exponent_steps": in_steps(by_steps),
        "exponent_dim": exponent({d: v["seconds"] for d, v in by_dim.items()}),
        "exponent_streamed_pairs": in_steps(streamed),
        "streamed_peak_mb": [v["peak_mb"] for v in streamed.values()],
        "streamed_peak_ratio": streamed[pairs[-1]]["peak_mb"] / streamed[pairs[0]]["peak_mb"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=int, nargs="?", default=0, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    if a.pairs:
        print(json.dumps(fit(a.pairs, stream=True)))
    else:
        print(json.dumps(growth(a.quick), indent=1))


if __name__ == "__main__":
    main()
