"""How memory is measured: by processes of their own, which read their own peak."""

from __future__ import annotations

from pathlib import Path


def peak_mb() -> float:
    """The largest resident set so far; `getrusage` would count that of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / 1e6
