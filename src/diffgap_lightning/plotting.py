"""Pictures of an embedding space before and after refinement.

Rows are projected on two principal axes. The first two panels share the axes of source and target rows together, where
the modality gap is the first thing to see; the third is a close-up on the axes of the target rows alone, where a
refiner that shrinks towards the mean shows as a small blot inside the target's cloud.

Matplotlib's figure is built directly, without pyplot: no global state, style or backend is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffgap_lightning.functional.pairs import frame_rows, pair_indices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "bright" colours, apart for the colour-blind: one a modality, and one for what was refined.
MODALITIES, REFINED = ("#4477AA", "#EE6677", "#AA3377", "#CCBB44", "#66CCEE"), "#228833"


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and two principal axes `(D, 2)` of the rows `(N, D)`; the largest entry of an axis is positive."""
    mean = x.mean(0)
    centred = (x - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    axes = torch.nn.functional.pad(axes, (0, 2 - axes.shape[1]))
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return mean, (axes * torch.where(largest < 0, -1.0, 1.0)).to(x.dtype)


@dataclass(frozen=True)
class SpaceView:
    """One direction of a space: rows before and after refinement, and which belong together.

    Attributes:
        source_name: Modality of the source rows.
        target_name: Modality of the target rows.
        source: `(N, D)`.
        target: `(M, D')`.
        refined: `(N, D')`, the source rows refined.
        pairs: `(i, j)`, both `(P,)`: source row i and target row j are a positive pair.
    """

    source_name: str
    target_name: str
    source: Tensor
    target: Tensor
    refined: Tensor
    pairs: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        refiner: Any,
        embeddings: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        source: str,
        target: str,
        seed: int,
    ) -> SpaceView:
        """Refine all rows of a table with anything that has `refine`; the frames of sequences are drawn as rows."""
        generator = torch.Generator().manual_seed(seed)
        before, after = embeddings[source], embeddings[target]
        refined = refiner.refine(before, source=source, target=target, generator=generator)
        x, y, z = (rows.detach().float().cpu().flatten(0, -2) for rows in (before, after, refined))
        own = frame_rows({source: before, target: after}, {m: ids[m].cpu() for m in (source, target)})[1]
        return cls(source, target, x, y, z, pair_indices(own[source], own[target]))

    def figures(self, refined: bool) -> dict[str, float]:
        """`cosine` of the positive pairs and `distance` between the two centroids, before or after refinement."""
        x, (i, j) = (self.refined if refined else self.source), self.pairs
        if x.shape[1] != self.target.shape[1]:
            return {}
        return {
            "cosine": float(torch.cosine_similarity(x[i], self.target[j]).mean()),
            "distance": float((x.mean(0) - self.target.mean(0)).norm()),
        }


def space_figure(
    views: Sequence[SpaceView], *, title: str | None = None, max_points: int = 1000, max_lines: int = 40
) -> Figure:
    """Draw one row of panels a direction.

    Args:
        views: What to draw.
        title: Over the whole figure.
        max_points: At most so many rows of each kind are drawn, evenly spaced.
        max_lines: So many pairs are joined by a line.

    Returns:
        The figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.7 * len(views)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=13)
    grid = figure.subplots(len(views), 3, squeeze=False)
    names = dict.fromkeys(name for view in views for name in (view.source_name, view.target_name))
    colours = dict(zip(names, cycle(MODALITIES), strict=False))
    for axes, view in zip(grid, views, strict=True):
        _draw_direction(axes, view, colours, max_points, max_lines)
    return figure


def _draw_direction(axes: Any, view: SpaceView, colours: Mapping[str, str], max_points: int, max_lines: int) -> None:
    a, b = view.source_name, view.target_name
    before, after, close = axes
    if view.source.shape[1] == view.target.shape[1]:
        mean, basis = principal_axes(torch.cat((view.source, view.target)))
        source, target, refined = ((x - mean) @ basis for x in (view.source, view.target, view.refined))
        _panel(before, f"before: {a} and {b}", _note(view.figures(refined=False)))
        _scatter(before, [(target, colours[b], b), (source, colours[a], a)], max_points)
        _join(before, source, target, view.pairs, max_lines)
        _panel(after, f"after: {a} refined to {b}", _note(view.figures(refined=True)))
        _scatter(after, [(target, colours[b], b), (refined, REFINED, f"refined {a}")], max_points)
        _join(after, refined, target, view.pairs, max_lines)
        _frame([before, after], [source, target, refined])
    else:
        for panel in (before, after):
            panel.set_axis_off()
        sizes = f"{a} has {view.source.shape[1]} and {b} {view.target.shape[1]} dimensions"
        before.text(0.5, 0.5, f"{sizes}:\nno common axes before refinement", ha="center")
    mean, basis = principal_axes(view.target)
    target, refined = ((x - mean) @ basis for x in (view.target, view.refined))
    _panel(close, f"close-up on the axes of {b}", "does the refined cloud fill the target's?")
    _scatter(close, [(target, colours[b], b), (refined, REFINED, f"refined {a}")], max_points)
    _join(close, refined, target, view.pairs, max_lines)
    _frame([close], [target, refined])


def _note(figures: Mapping[str, float]) -> str:
    return f"pair cosine {figures['cosine']:.3f}, centroids {figures['distance']:.3f} apart"


def _panel(axes: Axes, title: str, note: str) -> None:
    axes.set_title(f"{title}\n{note}", fontsize=10)
    axes.tick_params(labelsize=7, color="0.6", labelcolor="0.4")
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color("0.8")


def _scatter(axes: Axes, clouds: list[tuple[Tensor, str, str]], max_points: int) -> None:
    for points, colour, label in clouds:
        keep = points[:: max(1, -(-len(points) // max_points))]
        size = 22 if len(keep) < 200 else 9
        axes.scatter(keep[:, 0], keep[:, 1], s=size, c=colour, alpha=0.55, linewidths=0, label=label)
    axes.legend(fontsize=8, frameon=False, loc="best")


def _join(axes: Axes, x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor], max_lines: int) -> None:
    i, j = (index[:: max(1, -(-len(index) // max(max_lines, 1)))] for index in pairs)
    ends = torch.stack((x[i.cpu()], y[j.cpu()]))
    axes.plot(ends[..., 0].numpy(), ends[..., 1].numpy(), color="0.35", linewidth=0.5, alpha=0.5, zorder=1.5)


def _frame(panels: list[Axes], clouds: list[Tensor]) -> None:
    """The same square around all the clouds in every panel, so that lengths compare between them."""
    points = torch.cat(clouds)
    low, high = points.amin(0), points.amax(0)
    middle, half = (low + high) / 2, 0.53 * float((high - low).max().clamp(min=1e-6))
    for panel in panels:
        panel.set_xlim(float(middle[0]) - half, float(middle[0]) + half)
        panel.set_ylim(float(middle[1]) - half, float(middle[1]) + half)
        panel.set_aspect("equal", adjustable="box")
