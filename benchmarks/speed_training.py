"""`diffgap fit` beside a bare loop of the same arithmetic, in turns within one process.

A callback stops the fit every few steps and lets the bare loop take as many, so that other load on the machine meets
both. What the fit spends between two stops is its own: drawing batches, logging, the progress bar, checkpoints at the
end of an epoch. Validation is left out, the bare loop has none. On a GPU the bare loop's steps are recorded too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from diffgap_lightning.training.module import DiffGAPModule
from speed_clock import wait
from speed_steps import BareLoop


class Turns(Callback):
    """Lets a fit and a bare loop take turns, and notes the seconds of both."""

    steps = 20
    ema = False

    def __init__(self) -> None:
        self.fit: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self.loop: BareLoop | None = None
        self.now = (0.0, 0.0)
        Turns.last = self  # type: ignore[attr-defined]  # the command line builds it, the benchmark reads it

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Build the bare loop on the fit's own rows and first weights."""
        table = trainer.datamodule.rows("train")  # type: ignore[attr-defined]
        order = {m: table.ids[m].argsort() for m in module.refiner.space.modalities}  # type: ignore[union-attr]
        tables = {m: table.embeddings[m][order[m]].to(module.device) for m in order}
        size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        half, record = trainer.precision == "bf16-mixed", module.device.type == "cuda"
        assert isinstance(module, DiffGAPModule)
        self.loop = BareLoop(module, tables, size, trainer.gradient_clip_val, self.ema, record, half)
        self.now = self._clock(module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """After every few steps, let the bare loop take as many."""
        assert self.loop is not None
        if trainer.global_step % self.steps == 0:
            self.fit.append(self._since(module))
            self.now = self._clock(module)
            for _ in range(self.steps):
                self.loop.step()
            self.bare.append(self._since(module))
            self.now = self._clock(module)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock."""
        self._validation = self._clock(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Go on."""
        end = self._clock(module)
        self.now = tuple(n + e - s for n, s, e in zip(self.now, self._validation, end, strict=True))

    def _since(self, module: LightningModule) -> tuple[float, float]:
        end = self._clock(module)
        return end[0] - self.now[0], end[1] - self.now[1]

    @staticmethod
    def _clock(module: LightningModule) -> Any:
        wait(module.device.type)
        return time.perf_counter(), time.process_time()


def fit_over_bare(
    batch_size: int, rounds: int, steps: int, device: str, pairs: int = 50_000, extra: list[str] | None = None
) -> dict[str, Any]:
    """Seconds of `diffgap fit` with its default flags over those of the bare loop: medians over the rounds."""
    from diffgap_lightning.cli.main import main as diffgap

    Turns.steps = steps
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffgap([
            "fit", "--data", "diffgap_lightning.data.SyntheticDataModule", "--data.num_pairs", str(pairs),
            "--data.batch_size", str(batch_size), "--data.num_val", "500", "--data.num_test", "500",
            "--model.max_rows", "9000", "--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps * (rounds + 1)),
            "--trainer.default_root_dir", folder, "--trainer.accelerator", device,
            "--trainer.callbacks+", f"{Turns.__module__}.Turns", *(extra or []),
        ])  # fmt: skip
    turns: Turns = Turns.last  # type: ignore[attr-defined]
    found: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "steps": steps}
    for k, clock in enumerate(("wall", "processor")):
        fit, bare = ([t[k] / steps for t in times[1:]] for times in (turns.fit, turns.bare))
        found[clock] = {
            "fit_ms": 1e3 * statistics.median(fit),
            "bare_ms": 1e3 * statistics.median(bare),
            "ratio": statistics.median(a / b for a, b in zip(fit, bare, strict=True)),
            "sum_ratio": sum(fit) / sum(bare),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    a, extra = parser.parse_known_args()
    import speed_training  # under its own name, for the command line to find

    print(speed_training.fit_over_bare(a.batch_size, a.rounds, a.steps, a.device, extra=extra))


if __name__ == "__main__":
    main()
