"""How cost grows: exponents of time in pairs, steps and dimensions, and memory of a streamed fit against pairs.

An exponent is the slope of log(time) over log(size), by least squares; the time is that of the steps alone, by the
processor's clock. Streamed fits run in processes of their own, which tell their peak memory.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import normalize

BATCH = 512
DIM = 128


def exponent(times: Mapping[float, float]) -> float:
    """Slope of the logarithms."""
    x, y = ([math.log(v) for v in values] for values in (times.keys(), times.values()))
    return float(statistics.linear_regression(x, y).slope)


class Watch(Callback):
    """Processor time of the steps, and the peak memory when they begin and end."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step."""
        self.start, self.before = time.process_time(), peak_mb()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last."""
        self.seconds, self.after = time.process_time() - self.start, peak_mb()


def peak_mb() -> float:
    """The largest resident set so far; `getrusage` would count that of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1e3


def fit(pairs: int, epochs: float = 1.0, dim: int = DIM, stream: bool = False) -> dict[str, float]:
    """What the steps of one fit took."""
    from diffgap_lightning.data import EmbeddingDataModule, EmbeddingTable, WebDatasetDataModule
    from diffgap_lightning.data.shards import write_embedding_shards
    from diffgap_lightning.training.module import DiffGAPModule

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, chunk = Path(name), 1 << 15

        def rows(start: int, count: int, ids: bool = True) -> dict[str, Any]:
            g = torch.Generator().manual_seed(start)
            made: dict[str, Any] = {
                m: normalize(torch.randn(count, dim, generator=g), dim=1) for m in ("audio", "text")
            }
            own = torch.arange(start, start + count)
            return made | {"audio_id": own, "text_id": own} if ids else made

        data: Any
        if stream:
            chunks = (rows(s, min(chunk, pairs - s)) for s in range(0, pairs, chunk))
            write_embedding_shards(({k: v.numpy() for k, v in part.items()} for part in chunks), folder / "train")
            data = WebDatasetDataModule(str(folder / "train"), batch_size=BATCH, num_workers=0)
        else:
            ids = torch.arange(pairs)
            EmbeddingTable(rows(0, pairs, ids=False), {"audio": ids, "text": ids}).write(folder / "table.npz")
            data = EmbeddingDataModule(folder / "table.npz", BATCH, val_fraction=0, test_fraction=0)
        watch = Watch()
        trainer = Trainer(
            max_steps=int(epochs * pairs / BATCH), max_epochs=-1, callbacks=[watch], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(DiffGAPModule(width=64, depth=1, max_rows=4000), datamodule=data)
    return {"seconds": watch.seconds, "peak_mb": watch.after, "before_mb": watch.before}


def streamed_alone(pairs: int) -> dict[str, float]:
    """A streamed fit in a process of its own, whose peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, str(pairs)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(quick: bool) -> dict[str, Any]:
    """Exponents and memory."""
    pairs = [20_000, 40_000, 80_000] if quick else [50_000, 100_000, 200_000, 400_000]
    epochs = [1.0, 2.0, 4.0]
    dims = [64, 128, 256, 512]
    fit(pairs[0], epochs=0.2)  # the first fit imports and allocates
    by_pairs = {n: fit(n) for n in pairs}
    by_steps = {e: fit(pairs[0], epochs=e) for e in epochs}
    by_dim = {d: fit(pairs[0], dim=d) for d in dims}
    streamed = {n: streamed_alone(n) for n in pairs}
    return {
        "pairs": by_pairs, "epochs": by_steps, "dims": by_dim, "streamed": streamed,
        "exponent_pairs": exponent({n: v["seconds"] for n, v in by_pairs.items()}),
        "exponent_steps": exponent({e: v["seconds"] for e, v in by_steps.items()}),
        "exponent_dim": exponent({d: v["seconds"] for d, v in by_dim.items()}),
        "exponent_streamed_pairs": exponent({n: v["seconds"] for n, v in streamed.items()}),
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
