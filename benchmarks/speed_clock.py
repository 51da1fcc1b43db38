"""How seconds are measured: rivals in turns, so that other load on the machine meets all, and medians.

One thread on a CPU is timed by the processor's clock, which does not run while others have the processor; everything
else by the clock on the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def wait(device: str) -> None:
    """Until all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str = "cpu", calls: int = 1) -> float:
    """Time of a call."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait(device)
    start = clock()
    for _ in range(calls):
        call()
    wait(device)
    return (clock() - start) / calls


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each call; a call of less than 10 ms is made several times a turn."""
    for call in calls.values():  # the first call allocates, compiles, records
        call()
    repeats = {name: max(1, min(200, int(0.01 / max(seconds(call, device), 1e-6)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}
