"""The short form of the soak, `benchmarks/soak.py`: nothing grows from one epoch to the next."""

from __future__ import annotations

import importlib.util
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
EPOCHS = 9
MOST = 0.25  # MiB an epoch; a leaked batch of a real run is more, what an allocator still learns in 9 epochs is less


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


@pytest.mark.slow
def test_files_threads_and_memory_stay_as_they_are(soak: ModuleType, tmp_path: Path) -> None:
    samples = soak.soak(tmp_path, minutes=5, max_epochs=EPOCHS, num_workers=0)
    assert len(samples) == EPOCHS
    steady = samples[EPOCHS // 3 :]
    assert len({(s.files, s.threads) for s in steady}) == 1
    _, low, _ = soak.slope([s.epoch for s in steady], [s.memory for s in steady])
    assert low < MOST, f"memory grows by at least {low:.3f} MiB an epoch"


@pytest.mark.slow
def test_a_leak_is_seen(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One open file and some MiB an epoch are what the soak exists to see."""
    held: list[object] = []

    class Leak(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            # Pages of its own: an allocator may have an array's at hand, from tests before this one.
            pages = mmap.mmap(-1, 40 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.write(b"1" * len(pages))
            held.extend((os.open(os.devnull, os.O_RDONLY), pages))

    monkeypatch.setattr(soak, "SaveRefiner", Leak)
    try:
        samples = soak.soak(tmp_path, minutes=5, max_epochs=5, num_workers=0)
    finally:
        for descriptor in held[::2]:
            os.close(descriptor)
    assert [b.files - a.files for a, b in zip(samples, samples[1:], strict=False)] == [1] * 4
    assert soak.slope([s.epoch for s in samples[1:]], [s.memory for s in samples[1:]])[0] > 20


def test_the_interval_of_a_slope_covers_what_is_there(soak: ModuleType) -> None:
    rng, x = np.random.default_rng(0), np.arange(400.0)
    walk = np.repeat(rng.normal(size=40), 10)  # steps that last, as memory has them
    for truth in (0.0, 0.02):
        value, low, high = soak.slope(x, 5 + truth * x + 0.3 * walk)
        assert low < truth < high
        assert low < value < high
        assert high - low < 0.01
