"""The picture of robustness shows the figures of the results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from stfbnn.errors import InputError
from stfbnn.report import save_figure
from stfbnn.report.robustness_plots import robustness_figure
from stfbnn.robustness.result import DrawsCurve, Finding, Outcome, Robustness


def outcome(fooled: int, epsilon: float, name: str = "PGD-20") -> Outcome:
    return Outcome(name, "many steps", epsilon, tuple(index < fooled for index in range(20)), 1.0)


def result(*fooled: int, draws: tuple[int, ...] = (), wrong: int = 1) -> Robustness:
    epsilons = tuple(0.1 * (place + 1) for place in range(len(fooled)))
    outcomes = tuple(outcome(*pair) for pair in zip(fooled, epsilons, strict=True))
    counts = tuple(2**power for power in range(len(draws)))
    curve = DrawsCurve(0.1, counts, tuple(outcome(count, 0.1, "PGD-20, n fresh draws") for count in draws), None)
    clean = tuple(index < wrong for index in range(20))
    return Robustness("linf", epsilons, clean, outcomes, curve if draws else None, (), {}, 0.0)


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for container in axes.containers:
        line = container[0]
        found[container.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def test_both_panels_show_the_figures() -> None:
    figure = robustness_figure({"MAP $1": result(4, 10), "ours": result(3, 6, draws=(1, 2, 3))}, title="Attacks $")
    left, right = figure.axes
    assert lines(left)["MAP $1"] == ([0.0, 0.1, 0.2], [0.95, 0.8, 0.5])
    assert lines(left)["ours"] == ([0.0, 0.1, 0.2], [0.95, 0.85, 0.7])
    assert list(lines(right)) == ["ours"]
    assert lines(right)["ours"] == ([1, 2, 4], [0.95, 0.9, 0.85])
    assert left.get_xlabel() == "ε (linf)"
    assert [text.get_text() for text in left.get_xticklabels()] == ["0", "0.1", "0.2"]
    assert "PGD-20 at ε = 0.1" in right.get_title()
    assert figure.get_suptitle() == "Attacks $"
    # A method has one colour in both panels.
    assert left.containers[1][0].get_color() == right.containers[0][0].get_color()


def test_bars_are_the_intervals() -> None:
    found = result(4, 10)
    (container,) = robustness_figure({"MAP": found}).axes[0].containers
    (bars,) = container[2]
    drawn = [(float(low), float(high)) for (_, low), (_, high) in bars.get_segments()]
    shares = [found.clean, found.worst(0.1), found.worst(0.2)]
    assert drawn == [pytest.approx((share.low, share.high)) for share in shares]


def test_there_is_one_panel_where_nothing_is_drawn_at_random() -> None:
    assert len(robustness_figure({"MAP": result(4)}).axes) == 1


def test_methods_that_cannot_be_compared_are_marked() -> None:
    failed = dataclasses.replace(result(4), findings=(Finding("no-gradients", False, {}, "none"),))
    figure = robustness_figure({"MAP": result(4), "worse": result(4, wrong=3), "masked": failed})
    assert list(lines(figure.axes[0])) == ["MAP", "worse †", "masked †"]


def test_many_methods_all_have_a_line() -> None:
    figure = robustness_figure({str(number): result(number % 20) for number in range(25)})
    assert len(figure.axes[0].containers) == 25
    styles = {
        (line.get_color(), line.get_linestyle(), line.get_marker())
        for line in (container[0] for container in figure.axes[0].containers[:21])
    }
    assert len(styles) == 21


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "robustness.png"
    save_figure(robustness_figure({"MAP": result(4), "50 $% of $": result(20, draws=(0, 20))}), path, dpi=60)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least one method"):
        robustness_figure({})
    with pytest.raises(InputError, match="cannot be compared"):
        robustness_figure({"a": result(4), "b": result(4, 5)})
