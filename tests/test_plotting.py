from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import normalize

from diffgap_lightning.plotting import SpaceView, principal_axes, space_figure


class Shift:
    """Refines by adding the difference of the means, plus a little noise from the generator."""

    def refine(self, embedding, *, source, target, generator):
        return embedding + torch.tensor([0.0, 0.0, -2.0]) + 1e-3 * torch.randn(embedding.shape, generator=generator)


@pytest.fixture
def view() -> SpaceView:
    g = torch.Generator().manual_seed(0)
    audio = torch.randn(50, 3, generator=g) * torch.tensor([1.0, 0.5, 0.1])
    ids = torch.arange(50)
    rows = {"audio": audio, "text": audio + torch.tensor([0.0, 0.0, 2.0])}
    return SpaceView.of(Shift(), rows, {"audio": ids, "text": ids}, "text", "audio", seed=0)


def test_principal_axes_find_the_wide_directions() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=g) * torch.tensor([0.1, 3.0, 0.1, 1.0]) + 5
    mean, axes = principal_axes(x)
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(axes.T @ axes, torch.eye(2), atol=1e-5)
    assert axes[1, 0] > 0.99
    assert axes[3, 1] > 0.99


def test_one_dimensional_rows_have_a_second_axis_of_zeros() -> None:
    _, axes = principal_axes(torch.randn(5, 1))
    assert axes.shape == (1, 2)


def test_figures_before_and_after(view: SpaceView) -> None:
    assert view.figures(refined=False)["distance"] == pytest.approx(2.0, abs=1e-4)
    assert view.figures(refined=True)["distance"] == pytest.approx(0.0, abs=1e-3)
    assert view.figures(refined=True)["cosine"] == pytest.approx(1.0, abs=1e-3)
    assert view.figures(refined=False)["cosine"] < 0.9


def test_the_figure_shows_the_gap_close(view: SpaceView) -> None:
    figure = space_figure([view])
    before, after, _ = figure.axes
    centre = {
        (panel, dots.get_label()): dots.get_offsets().mean(0)
        for panel, axes in (("before", before), ("after", after))
        for dots in axes.collections
    }
    gap = centre["before", "text"] - centre["before", "audio"]
    closed = centre["after", "refined text"] - centre["after", "audio"]
    assert float((gap**2).sum() ** 0.5) == pytest.approx(2.0, rel=0.05)
    assert float((closed**2).sum() ** 0.5) < 0.01
    assert before.get_xlim() == after.get_xlim()


def test_at_most_so_many_points_are_drawn(view: SpaceView) -> None:
    figure = space_figure([view, view], max_points=20, max_lines=10)
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert all(len(dots.get_offsets()) <= 20 for dots in axes.collections)
        assert len(axes.lines) <= 10


def test_spaces_of_different_dimension_have_the_close_up_only(view: SpaceView) -> None:
    other = SpaceView("text", "audio", torch.randn(50, 7), view.target, view.refined, view.pairs)
    assert other.figures(refined=False) == {}
    before, after, close = space_figure([other]).axes
    assert not before.collections
    assert not after.collections
    assert close.collections


def test_nothing_global_is_touched(view: SpaceView, tmp_path) -> None:
    import matplotlib

    settings, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    path = tmp_path / "s.png"
    space_figure([view]).savefig(path)
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_are_left_as_they_are(view: SpaceView) -> None:
    rows = {"audio": normalize(torch.randn(4, 3), dim=1), "text": normalize(torch.randn(4, 3), dim=1)}
    kept = {k: v.clone() for k, v in rows.items()}
    SpaceView.of(Shift(), rows, dict.fromkeys(rows, torch.arange(4)), "text", "audio", seed=0)
    assert all(torch.equal(kept[k], rows[k]) for k in rows)
