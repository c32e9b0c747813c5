"""The picture of confidence against distance shows the figures and the limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from stfbnn.errors import InputError
from stfbnn.guarantees.far_field_result import ConfidenceAlong, Direction, FarField
from stfbnn.report import save_figure
from stfbnn.report.far_field_plots import far_field_figure

MEASURED = ConfidenceAlong(
    (0.0, 1.0, 100.0), ((0.4, 0.6, 0.8), (0.4, 0.5, 0.7)), ((0.4, 0.9, 1.0), (0.5, 0.8, 1.0)), 50
)


def limits(count: int = 2) -> FarField:
    data = [Direction("data", (8, 2), 0, 0.95, 0, 0), Direction("data", (7, 3), 0, 0.93, 0, 0)]
    strange = Direction("random", (10, 0), 0, 1.0, 0, 0)
    return FarField((*data[:count], strange), 10, 0.05, 0.9, 0.0, {})


def test_lines_are_means_and_limits() -> None:
    (axes,) = far_field_figure(MEASURED, limits(), title="Far $ away").axes
    trained, averaged, limit, bound = axes.lines
    assert list(trained.get_ydata()) == pytest.approx([0.45, 0.85, 1.0])
    assert list(averaged.get_ydata()) == pytest.approx([0.4, 0.55, 0.75])
    assert list(averaged.get_xdata()) == [0.0, 1.0, 100.0]
    # Of the directions from data alone.
    assert list(limit.get_ydata()) == pytest.approx([0.75, 0.75])
    assert list(bound.get_ydata()) == pytest.approx([0.94, 0.94])
    assert limit.get_color() == averaged.get_color()
    assert axes.get_title() == "Far $ away"
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim() == (0.0, 100.0)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "trained network",
        "averaged over 50 draws",
        "its limit, 0.750",
        "bound of the limit, 0.940",
    ]


def test_bands_are_quantiles_over_directions() -> None:
    (axes,) = far_field_figure(MEASURED, limits()).axes
    heights = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.4)
    assert heights.max() == pytest.approx(0.79)


def test_it_can_be_saved(tmp_path: Path) -> None:
    save_figure(far_field_figure(MEASURED, limits(), title="Far"), tmp_path / "far.png")
    assert (tmp_path / "far.png").stat().st_size > 1000


def test_other_directions_are_refused() -> None:
    with pytest.raises(InputError, match="limits of 1 directions and confidences along 2"):
        far_field_figure(MEASURED, limits(1))
