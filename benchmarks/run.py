"""All of the project's speed in one command: the machine's ceilings first, then everything as a share of them.

    python benchmarks/run.py --quick --out speed          a few minutes on two idle cores: speed.json, speed.png
    python benchmarks/run.py --device cuda --out speed    on a GPU, about ten minutes
    python benchmarks/run.py --only refine retrieval      some sections

Ratios are of runs that took turns within one process (`speed_clock.py`); absolute times hold for the machine that the
file names. Sections that fail are named in the file and do not stop the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from speed_ceilings import ceilings
from speed_growth import growth
from speed_plot import plot
from speed_refine import refining
from speed_retrieval import beside_torchmetrics, memory, ratio_to_product
from speed_steps import step_times

AVERAGE = ["--trainer.callbacks+", "diffgap_lightning.training.callbacks.AverageWeights"]


def fit_section(device: str, quick: bool) -> dict[str, Any]:
    """The whole `diffgap fit` beside the bare loop, with default flags and with averaged weights."""
    from speed_training import Turns, fit_over_bare

    rounds, steps = (4, 10) if quick else (10, 20)
    sizes, found = ((256, 1024) if device == "cuda" else (1024,)), {}
    for size in sizes:
        if device == "cuda":
            steps = 200
        Turns.ema = False
        found[f"batch {size}, default flags"] = fit_over_bare(size, rounds, steps, device)
        Turns.ema = True
        found[f"batch {size}, averaged weights"] = fit_over_bare(size, rounds, steps, device, extra=AVERAGE)
    return found


def steps_section(device: str, quick: bool) -> dict[str, Any]:
    """Eager, recorded and compiled steps, by batch size."""
    shapes = [(256, 512, 3), (1024, 512, 3)]
    if device == "cuda":
        shapes += [(4096, 512, 3), (16384, 512, 3), (16384, 1024, 4)]
    return {f"batch {b}, {d} x {w}": step_times(device, b, w, d, 3 if quick else 10) for b, w, d in shapes}


def refine_section(device: str, quick: bool) -> dict[str, Any]:
    """Refining in 10 steps, and what other priors take for a sample."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batches = (1, 4096) if device == "cuda" else ((1, 64) if quick else (1, 64, 1024))
    return refining(device, batches, 8 if quick else 30, dtype) | {"rivals": rivals(device, quick)}


def rivals(device: str, quick: bool) -> dict[str, Any]:
    """Milliseconds of one sample of the priors that are installed here; see `priors.py`. Seconds each on a CPU."""
    from priors import DALLE2Prior, UnCLIPPrior
    from speed_clock import in_turns, seconds

    found: dict[str, Any] = {}
    rows = torch.nn.functional.normalize(torch.randn(64, 512), dim=1)
    for prior in (DALLE2Prior, UnCLIPPrior):
        try:
            made = prior(512)
            made.measure(rows, rows)
            made, one = made.to(device), rows[:1].to(device)
            sample = partial(made.sample, one)
            found[prior.__name__] = 1e3 * (seconds(sample) if quick else in_turns({"": sample}, 2, device)[""])
        except (ImportError, TypeError) as error:
            found[prior.__name__] = f"not measured: {error}"
    return found


def retrieval_section(device: str, quick: bool) -> dict[str, Any]:
    """Exact ranks beside the bare product, the whole matrix and torchmetrics."""
    sizes = [5000] if quick else [5000, 50_000]
    sizes += [200_000] if device == "cuda" and not quick else []
    found: dict[str, Any] = {str(n): ratio_to_product(n, 512, device, 1 if n > 5000 else 3) for n in sizes}
    found["beside"] = beside_torchmetrics(5000, 512, 2)
    if device == "cpu":
        found["mb_above_embeddings"] = memory(sizes[-1], 512)
    return found


def streaming_section(device: str, quick: bool) -> dict[str, Any]:
    """Steps a second of a fit from shards and from memory."""
    from streaming import compare_fits

    rows, rounds, steps = (16_384, 1, 6) if quick else (65_536, 3, 12)
    return compare_fits(rows, 512, rounds, steps, width=512, depth=3, workers=1)


SECTIONS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "ceilings": lambda device, quick: ceilings(device, 3 if quick else 10),
    "fit": fit_section,
    "steps": steps_section,
    "refine": refine_section,
    "retrieval": retrieval_section,
    "streaming": streaming_section,
    "growth": lambda device, quick: growth(quick),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "diffgap-speed")
    a = parser.parse_args()
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    for name in a.only:
        start = time.perf_counter()
        try:
            results[name] = SECTIONS[name](a.device, a.quick)
        except Exception as error:  # one section's failure is a line of the report
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.perf_counter() - start:.0f} s\n{json.dumps(results[name], indent=1)}", flush=True)
        a.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
