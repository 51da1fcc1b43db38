"""Loaders over the data sets of `data/stream.py`: batches in order, losses counted, and a position to resume from.

    for batch in loader:           {"audio": (B, D) float32, "audio_id": (B,) int64, "text": ...}
    loader.state_dict()            {"epoch": 3, "position": 120, "plan": {...}}: the same on every rank

The position is the number of batches handed out, however many the workers have prepared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from diffgap_lightning.data.losses import LossLedger
from diffgap_lightning.data.stream import Batch, EvalStream, TrainStream


class _Requests:
    """The sampler of the inner loader: whatever was put in it last."""

    def __init__(self) -> None:
        self.items: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _same(item: Any) -> Any:
    return item


class StreamLoader:
    """Hands out a stream's batches in order, counts its losses, and keeps its workers between epochs.

    Args:
        stream: A `TrainStream` or `EvalStream`.
        ledger: Counts what is lost and refuses more than its budget.
        num_workers: Worker processes; 0 reads in this one.
        multiprocessing_context: `"fork"`, `"spawn"` or `"forkserver"`; None is the platform's.
        pin_memory: Copy batches to page-locked memory.
        prefetch_factor: Batches that each worker prepares ahead.
        timeout: Seconds to wait for a worker before the run is stopped with an error.
    """

    def __init__(
        self,
        stream: TrainStream | EvalStream,
        ledger: LossLedger,
        *,
        num_workers: int = 0,
        multiprocessing_context: str | None = None,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        timeout: float = 900.0,
    ) -> None:
        self.stream, self.ledger, self.num_workers = stream, ledger, num_workers
        self._requests = _Requests()
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:
            self._options |= {
                "multiprocessing_context": multiprocessing_context,
                "prefetch_factor": prefetch_factor,
                "persistent_workers": True,
                "timeout": timeout,
            }
        self._loader: DataLoader[Any] | None = None

    def _run(self, requests: Iterable[Any]) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                self.stream, batch_size=None, sampler=self._requests, collate_fn=_same, **self._options
            )
        self._requests.items = requests
        for batch, losses in self._loader:
            self.ledger.add(losses)
            yield batch

    def close(self) -> None:
        """Let the workers end."""
        self._loader = None


class EvalLoader(StreamLoader):
    """Every row of a split once over all ranks; the same number of batches on each."""

    stream: EvalStream

    def __len__(self) -> int:
        """Batches of this rank."""
        return self.stream.plan.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Start from the first batch."""
        order = self.stream.plan.order(self.num_workers)
        for done, batch in enumerate(self._run(order), start=1):
            if done == len(order):
                self.ledger.tell("all rows read")
            yield batch


class TrainLoader(StreamLoader):
    """The batches of one epoch an iteration, resumable at any of them.

    Lightning saves and restores its state by itself (`state_dict`, `load_state_dict`); it is the same on every rank,
    because a plan and a position say all. Without Lightning, iterating again goes on with the next epoch.

    Args:
        stream: What to read.
        ledger: Counts losses.
        epoch: Tells the epoch when an iteration starts; by default the loader counts by itself.
        **options: Those of `StreamLoader`.
    """

    stream: TrainStream

    def __init__(
        self, stream: TrainStream, ledger: LossLedger, *, epoch: Callable[[], int] | None = None, **options: Any
    ) -> None:
        super().__init__(stream, ledger, **options)
        self._tell_epoch = epoch
        self.epoch, self.position = 0, 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches an epoch on each rank."""
        return self.stream.plan.num_steps

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, from the position loaded last or from its start; nothing is read before the first batch."""
        epoch = self.epoch if self._tell_epoch is None else self._tell_epoch()
        start = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        self._resume = None
        self.epoch, self.position = epoch, start
        for batch in self._run([(epoch, step) for step in range(start, len(self))]):
            self.position += 1
            if self.position == len(self):
                self.ledger.tell(f"end of epoch {epoch}")
                self.epoch, self.position = epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of its batches handed out so far, and the plan they belong to."""
        return {"epoch": self.epoch, "position": self.position, "plan": self._describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader over the same shards stopped, with any number of workers.

        The other's number of lanes is taken over, so that the order stays the same. Another batch size, number of
        ranks, seed or data set make another plan: then it warns that rows of this epoch may repeat or be left out.
        """
        lanes = int(state["plan"]["lanes"])
        if lanes != self.stream.plan.lanes:
            self.close()
            self.stream.plan = replace(self.stream.plan, lanes=lanes)
        saved, own = state["plan"], self._describe()
        changed = [f"{name} {saved.get(name)} -> {value}" for name, value in own.items() if saved.get(name) != value]
        if changed:
            warnings.warn(
                f"the checkpoint's stream differs ({', '.join(changed)}): epoch {state['epoch']} goes on at step "
                f"{state['position']} of another order, in which rows may repeat or be left out until the epoch ends",
                stacklevel=2,
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._resume = self.epoch, self.position

    def _describe(self) -> dict[str, Any]:
        plan = self.stream.plan
        return {
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "world": plan.world,
            "lanes": plan.lanes,
            "steps": plan.num_steps,
            "window": plan.window_batches,
            "data": self.stream.reader.shards.fingerprint,
        }
