"""One picture of what `run.py` measured; panels whose section is missing say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, GREY = "#3b6ea8", "#b8bcc2"


def _bars(ax: Axes, values: dict[str, float], limit: float | None, unit: str) -> None:
    ax.barh(list(values), list(values.values()), color=BLUE)
    for i, value in enumerate(values.values()):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of the limit
        ax.annotate(f"{value:.3g}", (value, i), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
    if limit is not None:
        ax.axvline(limit, color="black", linestyle="--", linewidth=1)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel(unit)


def _fit(ax: Axes, found: dict[str, Any]) -> None:
    clock = "processor" if all("processor" in v for v in found.values()) else "wall"
    _bars(ax, {k.replace(", ", "\n"): v[clock]["ratio"] for k, v in found.items()}, 1.1, "diffgap fit / bare loop")


def _steps(ax: Axes, found: dict[str, Any]) -> None:
    ways = ("eager", "recorded", "recorded, compiled")
    _bars(
        ax, {f"{k}\n{w}": v[w]["tflops"] for k, v in found.items() for w in ways if w in v}, None, "TFLOP/s of a step"
    )


def _refine(ax: Axes, found: dict[str, Any]) -> None:
    batches = [k for k in found if k.isdigit()]
    ratios = {f"batch {b}, prepared": found[b]["prepared_over_products"] for b in batches}
    ratios |= {f"batch {b}, refine": found[b]["refine_ms"] / found[b]["products_ms"] for b in batches}
    _bars(ax, dict(sorted(ratios.items())), 2.0, "time / its matrix products alone")


def _retrieval(ax: Axes, found: dict[str, Any]) -> None:
    ratios = {f"{k} rows / bare product": v["ranks_over_product"] for k, v in found.items() if k.isdigit()}
    _bars(ax, ratios, 2.0, "exact ranks both ways / bare product")
    one, three = (found["beside"][f"{name} over ranks"] for name in ("torchmetrics", "torchmetrics at 1, 5, 10"))
    ax.set_title(f"retrieval; torchmetrics: {one:.0f}x for R@1, {three:.0f}x for R@1, 5, 10", fontsize=10)


def _growth(ax: Axes, found: dict[str, Any]) -> None:
    for name, key in (("in memory", "pairs"), ("streamed", "streamed")):
        sizes = [int(n) for n in found[key]]
        exponent = found["exponent_pairs" if key == "pairs" else "exponent_streamed_pairs"]
        times = [v["seconds"] for v in found[key].values()]
        ax.loglog(sizes, times, "o-", label=f"{name}: exponent {exponent:.2f}", color=BLUE if key == "pairs" else GREY)
    ax.set_xlabel("pairs of one epoch")
    ax.set_ylabel("s")
    ax.legend(fontsize=8)


def _memory(ax: Axes, found: dict[str, Any]) -> None:
    _bars(
        ax,
        {f"{int(n):,} pairs": v["peak_mb"] for n, v in found["streamed"].items()},
        None,
        "MB, peak of a streamed fit",
    )


PANELS: dict[str, tuple[str, Callable[[Axes, dict[str, Any]], None]]] = {
    "fit": ("fit", _fit),
    "steps": ("steps", _steps),
    "refining in 10 steps": ("refine", _refine),
    "retrieval": ("retrieval", _retrieval),
    "time of training": ("growth", _growth),
    "memory of training": ("growth", _memory),
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    for ax, (title, (section, draw)) in zip(axes.flat, PANELS.items(), strict=True):
        found = results.get(section)
        ax.set_title(title)
        if found is None or "error" in found:
            ax.text(0.5, 0.5, "not measured" if found is None else "failed", ha="center", transform=ax.transAxes)
            ax.set_axis_off()
            continue
        draw(ax, found)
    figure.suptitle(results["command"], fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
