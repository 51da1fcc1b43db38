"""Keeps `last.ckpt` a place from which a run goes on exactly: every n steps, and when a signal tells it to stop.

    SIGTERM    a scheduler wants the machine back     save, exit with status 143
    SIGUSR1    SLURM: the time limit is near          save, put the job back into the queue, exit with status 138

Not every moment will do. Within a step or a validation there is no state to go on from, among accumulated batches it
lacks their gradients, and before a validation that is due Lightning goes on without it. So a handler only notes the
signal, and what is due is done at the next good place: after an optimizer step that no validation follows, after a
validation, or at the end of an epoch. With several ranks a signal to one is a signal to all.

Lightning's own handlers are replaced: they save within the handler, wherever that strikes, and end with status 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = ("SIGTERM", "SIGUSR1")
REQUEUE_SIGNAL = "SIGUSR1"


class StoppedBySignal(SIGTERMException):
    """Ends a process with the status that shells give to a signal, 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class SaveLast(Checkpoint):
    """Write `last.ckpt`, beside what the trainer's first `ModelCheckpoint` writes.

    Put it last in the trainer's list: at an epoch's end the other checkpoints are to be written before a run stops.

    Args:
        every_n_steps: Optimizer steps between two writings; None writes on a signal alone.
        signals: Names of the signals that stop the run.
        agree_every_n_steps: With several ranks, how often they tell each other of signals, at the cost of a small
            collective.
        requeue: Under SLURM, call `scontrol requeue` after SIGUSR1.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        signals: Sequence[str] = SIGNALS,
        agree_every_n_steps: int = 10,
        requeue: bool = True,
    ) -> None:
        super().__init__()
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f"signals: got {', '.join(unknown)}, expected names such as {', '.join(SIGNALS)}")
        for name, number in (("every_n_steps", every_n_steps), ("agree_every_n_steps", agree_every_n_steps)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        self.signals = tuple(getattr(signal, name) for name in signals)
        self.every_n_steps, self.agree_every_n_steps, self.requeue = every_n_steps, agree_every_n_steps, requeue
        self._received, self._saved_step = 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handlers; Lightning puts the process's own back when the run ends."""
        self._received, self._saved_step = 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act after an optimizer step, unless a validation or the end of the epoch follows."""
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        if loop.batch_progress.is_last_batch or loop._should_accumulate() or loop._should_check_val_fx(fetcher):  # type: ignore[arg-type]
            return
        self._act(trainer, trainer.world_size == 1 or trainer.global_step % self.agree_every_n_steps == 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act after a validation in mid-epoch."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._act(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act at the end of an epoch."""
        self._act(trainer)

    def path(self, trainer: Trainer) -> Path:
        """The checkpoint that is written."""
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return Path(folders[0] if folders else Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    def _act(self, trainer: Trainer, agree: bool = True) -> None:
        """Save if that is due; stop if a signal came."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        number = self._agree(trainer) if agree else 0
        due = self.every_n_steps is not None and trainer.global_step - self._saved_step >= self.every_n_steps
        if number or due:
            trainer.save_checkpoint(self.path(trainer))
            self._saved_step = trainer.global_step
        if number:
            name = signal.Signals(number).name
            rank_zero_info(f"stopped by {name} after step {trainer.global_step}; go on from {self.path(trainer)}")
            if name == REQUEUE_SIGNAL and trainer.is_global_zero:
                self._requeue()
            raise StoppedBySignal(number)

    def _agree(self, trainer: Trainer) -> int:
        """The signal that any rank received, or 0."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return self._received
        number = torch.tensor(self._received, device=trainer.strategy.root_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def _requeue(self) -> None:
        """Put this SLURM job, or this task of its array, back into the queue."""
        job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
        if not self.requeue or job is None:
            return
        if array is not None:
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        except FileNotFoundError:
            rank_zero_info(f"job {job} was not requeued: there is no scontrol here; submit it again")
            return
        rank_zero_info(f"job {job} is requeued" if done.returncode == 0 else f"job {job}: {done.stderr.strip()}")
