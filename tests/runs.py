"""A process that has imported everything and runs `diffgap` in forks of itself, so that a test pays for no import.

    python runs.py        reads a job a line, answers with a line

A job is a dict: `argv` of `diffgap`, or of the function that `call` names as [FILE, FUNCTION]; where wanted `world`
(that many gloo ranks), `env`, `probe` (see `Probe`); and `log`: FOLDER/NAME, where rank r writes what it saw to
`NAME.r.jsonl` and its output to `NAME.r.out`. The answer is the list of the ranks' exit statuses as `subprocess` counts
them: negative for a signal.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

TIMEOUT_S = 240
Job = dict[str, Any]


class Probe(Callback):
    """Writes down steps and validations, and injects the job's fault: `[what, when, epoch, batch]`.

    What: "SIGKILL" and other signals to this process, "disk" (no file beyond 4 kB from then on), "remove:PATH".
    When: "train" or "val", at the start of that batch, None any; "save", before the checkpoint `batch` is put in place
    for the epoch-th time. `rank` in the job restricts it to one rank.
    """

    def __init__(self) -> None:
        self.job: Job = json.loads(os.environ["RUNS_JOB"])
        self.rank = int(os.environ.get("RANK", 0))
        self.seen = Path(f"{self.job['log']}.{self.rank}.jsonl").open("a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.fault = self.job.get("probe")
        if self.fault and self.rank != self.job.get("rank", self.rank):
            self.fault = None
        self.saves = 0
        if self.fault and self.fault[1] == "save":
            sys.addaudithook(self.on_call)

    def on_call(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(os.fsdecode(args[1])).name == self.fault[3]:
            self.saves += 1
            if self.saves == self.fault[2]:
                os.kill(os.getpid(), signal.SIGKILL)

    def reached(self, *place: Any) -> None:
        if self.fault and all(want in (got, None) for got, want in zip(place, self.fault[1:], strict=True)):
            what = self.fault[0]
            if what == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            elif what.startswith("remove:"):
                shutil.rmtree(what.removeprefix("remove:"))
            else:
                os.kill(os.getpid(), getattr(signal, what))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.reached("train", trainer.current_epoch, index)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int, loader: int = 0) -> None:
        self.reached("val", trainer.current_epoch, index)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        ids = batch["text_id"].tolist()
        loss = float(trainer.callback_metrics.get("train/loss", outputs["loss"]))
        self.seen.write(json.dumps(["step", trainer.current_epoch, index, loss, ids]) + "\n")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        found = {k: float(v) for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val/")}
        self.seen.write(json.dumps(["val", trainer.current_epoch, found]) + "\n")


class Runs:
    """The other end: starts the process at the first job, from a test."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env, self._process = env, None

    def __call__(self, log: Path, *argv: str, **job: Any) -> list[int]:
        """Run one job; the ranks' exit statuses."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.env}, encoding="utf-8",
            )  # fmt: skip
        self._process.stdin.write(json.dumps({"argv": argv, "log": str(log), **job}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    @staticmethod
    def seen(log: Path, rank: int = 0) -> list[list[Any]]:
        """What the probe of a rank wrote, in order."""
        path = Path(f"{log}.{rank}.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @staticmethod
    def said(log: Path, rank: int = 0) -> str:
        """What a rank printed."""
        return Path(f"{log}.{rank}.out").read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def serve() -> None:
    """Import, then answer jobs until the input ends."""
    import diffgap_lightning.cli.trainer
    import diffgap_lightning.data.datamodules
    import diffgap_lightning.data.webdataset_module  # noqa: F401

    sys.modules["runs"] = sys.modules["__main__"]  # configurations name runs.Probe
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: Job) -> list[int]:
    """All ranks of a job; their exit statuses."""
    world, port = job.get("world", 1), str(free_port())
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**job.get("env", {}), **({k: str(v) for k, v in place.items()} if world > 1 else {})}
        ranks.append(fork(job, rank, env))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]


def fork(job: Job, rank: int, env: dict[str, str]) -> int:
    """Start one rank; its process number."""
    child = os.fork()
    if child:
        return child
    signal.alarm(TIMEOUT_S)  # ends a rank that waits for ever
    os.environ.update(env, RUNS_JOB=json.dumps(job))
    out = os.open(f"{job['log']}.{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    status = 1
    try:
        from diffgap_lightning.cli.main import main

        rank_zero_only.rank = rank  # set once when Lightning was imported
        if "call" in job:
            runpy.run_path(job["call"][0])[job["call"][1]](*job["argv"])
        else:
            main(job["argv"])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
