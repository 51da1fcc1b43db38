"""`diffgap fit` beside a bare loop of the same arithmetic, in turns within one process.

A callback stops the fit every few steps and lets the bare loop take as many, so that other load on the machine meets
both. What the fit spends between two stops is its own: drawing batches, logging, the progress bar, checkpoints at the
end of an epoch. Validation is left out, the bare loop has none.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from diffgap_lightning.losses import split_batch

EMA = 0.995


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BareLoop:
    """The step written out: draw rows, encode, two losses, backward, clip, AdamW, running average."""

    def __init__(self, module: Any, tables: dict[str, Tensor], batch_size: int, clip: float | None, ema: bool) -> None:
        self.refiner, self.objective = copy.deepcopy(module.refiner).train(), module.objective
        self.tables, self.batch_size, self.clip = tables, batch_size, clip
        self.parameters = [p for p in self.refiner.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.parameters] if ema else []
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.01, fused=True)
        device = self.parameters[0].device
        self.generator = torch.Generator(device).manual_seed(0)
        self.logit_scale = torch.zeros((), device=device)
        self.order = torch.randperm(len(next(iter(tables.values()))), generator=self.generator, device=device)
        self.count = 0

    def step(self) -> Tensor:
        """Take one step; the loss."""
        start = self.count * self.batch_size % (len(self.order) - self.batch_size)
        rows, self.count = self.order[start : start + self.batch_size], self.count + 1
        space = self.refiner.space
        z = {m: (x[rows] - space.mean(m)) @ space.basis(m) / space.scale(m) for m, x in self.tables.items()}
        losses = []
        for (s, t), part in split_batch(self.batch_size, self.refiner.directions, "bst", self.count).items():
            found = self.objective(
                self.refiner.cdm_of(s, t), z[s][part], z[t][part], rows[part], z[t], rows, self.logit_scale,
                self.generator,
            )  # fmt: skip
            losses.append(found["loss"])
        loss = torch.stack(losses).sum()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.mean:
            torch._foreach_lerp_(self.mean, self.parameters, 1 - EMA)
        return loss.detach()


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
        self.loop = BareLoop(module, tables, size, trainer.gradient_clip_val, self.ema)
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
        synchronize(module.device)
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
