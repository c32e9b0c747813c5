"""ROC curves on logarithmic axes show rates that some threshold gives, and nothing between them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stfbnn.errors import InputError
from stfbnn.privacy.figures import MembershipFigures, membership_figures
from stfbnn.report import save_figure
from stfbnn.report.privacy_plots import roc_figure

MEMBER = np.arange(900) < 400


def scores(distance: float, seed: int = 0) -> np.ndarray:
    # Rounded, so that some scores are equal.
    return (np.random.default_rng(seed).standard_normal(900) + distance * MEMBER).round(2)


def figures(distance: float) -> MembershipFigures:
    return membership_figures(scores(distance), MEMBER, bootstrap=100)


def curve(figure: Figure, start: str) -> Line2D:
    [found] = [line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith(start)]
    return found


@pytest.mark.parametrize("distance", [0.0, 1.0, 4.0])
def test_every_corner_is_what_some_threshold_gives(distance: float) -> None:
    drawn = curve(roc_figure({"loss": figures(distance)}), "loss")
    values = scores(distance)
    attained: dict[float, float] = {}
    for threshold in [*np.unique(values), math.inf]:
        false, true = ((values[side] >= threshold).mean() for side in (~MEMBER, MEMBER))
        attained[false] = max(true, attained.get(false, 0.0))
    edge = 0.5 / 500
    horizontal, vertical = drawn.get_data()
    assert drawn.get_drawstyle() == "steps-post"
    assert len(horizontal) > 50
    for false, true in zip(horizontal, vertical, strict=True):
        expected = attained[0.0 if false == edge else false]
        assert true == expected or (math.isnan(true) and expected == 0)
    assert (horizontal[0], horizontal[-1], vertical[-1]) == (edge, 1, 1)
    assert bool((np.diff(horizontal) > 0).all())


def test_axes_are_logarithmic_with_the_diagonal_and_a_name_for_each_curve() -> None:
    shown = {f"attack {number} $": figures(number / 2) for number in range(3)}
    figure = roc_figure(shown, title="Fashion-MNIST")
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim() == (0.001, 1)
    chance = curve(figure, "chance")
    assert np.array_equal(*chance.get_data())
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["chance", *(f"{name}, AUC {one.auc.value:.3f}" for name, one in shown.items())]
    assert axes.get_title() == "Fashion-MNIST"
    lines = [curve(figure, name) for name in shown]
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() for line in lines}) == 3


def test_few_curves_have_bands_around_them_and_many_have_none() -> None:
    few, many = (roc_figure({str(number): figures(1) for number in range(count)}) for count in (4, 5))
    assert len(few.axes[0].collections) == 4
    assert not many.axes[0].collections
    [path] = few.axes[0].collections[0].get_paths()
    low, high = path.vertices[:, 1].min(), path.vertices[:, 1].max()
    assert low >= 0.001
    assert high == 1
    horizontal, vertical = curve(few, "0").get_data()
    middle = len(horizontal) // 2
    inside = path.contains_point((math.sqrt(horizontal[middle] * horizontal[middle + 1]), vertical[middle]))
    assert inside


def test_curves_of_scores_that_say_nothing_or_everything_can_be_saved(tmp_path: Path) -> None:
    extremes = {
        "nothing": membership_figures(np.zeros(900), MEMBER, bootstrap=100),
        "everything": membership_figures(MEMBER.astype(float), MEMBER, bootstrap=100),
        "wrong": membership_figures(-MEMBER.astype(float), MEMBER, bootstrap=100),
    }
    figure = roc_figure(extremes)
    save_figure(figure, tmp_path / "roc.png")
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert curve(figure, "everything").get_ydata().tolist() == [1, 1]


def test_no_curves_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        roc_figure({})
