"""Whether charts put things where they belong."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import benchmark_records as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfbnn.benchmark.records import Candidate, Record
from stfbnn.report.html.charts import (
    Bins,
    Curve,
    Point,
    critical_difference_panel,
    curves_panel,
    pareto_front,
    pareto_panel,
)
from stfbnn.report.html.charts import reliability_panel as reliability
from stfbnn.report.html.content import Ranking, content_of
from stfbnn.report.html.drawing import SCALED, Panel, Scale, dashes_of, fit, linear, logarithmic, marker, safe, style_of
from stfbnn.report.html.figures import task_figures

COORDINATES = st.integers(0, 4).map(float)


def drawn(panel: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(f"<svg>{panel.body}</svg>")  # noqa: S314 - our own


@given(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=1, max_size=8))
def test_the_front_holds_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    for place, point in enumerate(points):
        assert (place in front) == (not any(beats(other, point) for other in points))
    assert front


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_within_the_scale(low: float, width: float) -> None:
    scale = Scale(low, low + width, 0, 300)
    if scale.high - scale.low < 1e-9 * max(abs(scale.low), 1):
        return
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(scale.low - 1e-6 * width <= tick <= scale.high + 1e-6 * width for tick in ticks)


def test_scales_are_linear_or_logarithmic() -> None:
    assert Scale(0, 10, 100, 200)(2.5) == 125
    assert Scale(0.1, 10, 0, 100, log=True)(1) == pytest.approx(50)
    scale = linear([0.2, 0.7], 0, 100, include=(0.0,))
    assert scale.low == 0
    assert scale.high > 0.7
    assert linear([3.0, 3.0], 0, 1).high > linear([3.0], 0, 1).low
    wide = logarithmic([0.01, 50.0], 0, 100)
    assert {0.1, 1, 10} <= {round(tick, 9) for tick in wide.ticks()}
    narrow = logarithmic([1.0], 0, 100)
    assert narrow.high / narrow.low == pytest.approx(4)


def test_no_two_methods_look_alike() -> None:
    points = {
        (style_of(series), re.sub("[0-9.-]+", "", marker(series, 0, 0)), marker(series, 0, 0)) for series in range(16)
    }
    assert len(points) == 16
    lines = {(style_of(series), dashes_of(series)) for series in range(56)}
    assert len(lines) == 56
    # Without any colour: form, filling and dashes.
    plain = {(marker(series, 0, 0), "hollow" in style_of(series)) for series in range(16)}
    assert len(plain) == 16


def test_texts_are_made_harmless() -> None:
    assert safe("<b a=\"x\" b='y'>&\x00\u202e") == "&lt;b a=&quot;x&quot; b=&#x27;y&#x27;&gt;&amp;\ufffd\ufffd"


def test_a_shortened_name_keeps_the_mark_of_its_temperature() -> None:
    assert fit("short", 100, 11) == "short"
    shortened = fit("a very long name of a method" + SCALED, 100, 11)
    assert shortened.startswith("a very")
    assert shortened.endswith("…" + SCALED)
    assert len(shortened) <= 16


def test_a_curve_runs_through_its_points() -> None:
    panel = curves_panel("title", [Curve("a", 1, [0.0, 0.5, 1.0], [0.0, 1.0, 0.5])], "x", "y", [0, 1], y_ends=(0, 1))
    (line,) = drawn(panel).iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert points == [(54, 224), (200, 34), (346, 129)]
    assert "a from 0 to 0.5" in panel.summary


def test_what_costs_nothing_stands_left_of_the_logarithmic_axis() -> None:
    points = [Point("free", 0, 0.0, 0.4), Point("cheap", 1, 0.1, 0.3), Point("dear", 2, 10.0, 0.35)]
    panel = pareto_panel("title", points, "cost", "NLL", points, None)
    rings = [float(ring.attrib["cx"]) for ring in drawn(panel).iter("circle") if ring.attrib["class"] == "ring"]
    axis = max(
        float(one.attrib["x1"])
        for one in drawn(panel).iter("line")
        if one.attrib["class"] == "axis" and one.attrib["y1"] == one.attrib["y2"]
    )
    assert len(rings) == 2
    assert rings[0] < axis < rings[1]
    assert "free at 0, 0.4000; cheap at 0.1, 0.3000." in panel.summary


def test_a_reliability_diagram_shows_the_gap_between_confidence_and_accuracy() -> None:
    bins = Bins([0, 0.5, 1], [0.4, 0.9], [0.5, 0.6], [10, 30])
    panel = reliability("method", bins, "ECE 0.2500", None)
    rects = {one.attrib["class"]: one.attrib for one in drawn(panel).iter("rect")}
    scale = Scale(0, 1, 152, 36)
    assert float(rects["gap over"]["y"]) == pytest.approx(scale(0.9), abs=0.1)
    assert float(rects["gap over"]["height"]) == pytest.approx(scale(0.6) - scale(0.9), abs=0.1)
    assert float(rects["gap under"]["height"]) == pytest.approx(scale(0.4) - scale(0.5), abs=0.1)
    assert "confidence is 0.200 above the accuracy" in panel.summary
    assert "75%" in panel.summary


def test_a_critical_difference_diagram_joins_the_groups_it_is_given() -> None:
    ranking = Ranking("NLL", {"a": 1.5, "b": 2.0, "c": 4.0}, 1.0, [{"a", "b"}, {"c"}], 6)
    root = drawn(critical_difference_panel(ranking))
    (bar,) = [one.attrib for one in root.iter("line") if one.attrib["class"] == "clique"]
    dots = sorted(float(one.attrib["cx"]) for one in root.iter("circle"))
    assert float(bar["x1"]) < dots[0] < dots[1] < float(bar["x2"]) < dots[2]
    bracket = next(one.attrib for one in root.iter("line") if one.attrib["class"] == "bracket")
    per_rank = (dots[2] - dots[0]) / 2.5
    assert float(bracket["x2"]) - float(bracket["x1"]) == pytest.approx(per_rank, rel=0.01)


def test_all_figures_of_a_task_are_made_of_what_its_records_hold() -> None:
    content = content_of(made.records())
    names = {task.name: [figure.name for figure in task_figures(task, content)] for task in content.tasks}
    everything = [
        "pareto",
        "reliability",
        "risk-coverage",
        "accuracy-rejection",
        "entropies",
        "corruption",
        "each-corruption",
    ]
    assert names == {
        "digits": [*everything, "abstention"],
        "fashion-mlp": [*everything, "abstention"],
        "concrete": ["pareto"],
    }


def test_runs_of_several_lengths_are_a_figure_of_their_own() -> None:
    def with_course(one: Record) -> Record:
        if one.failed is not None or one.cost is None or not one.method.startswith(("stf", "full")):
            return one
        runs = [
            Candidate(
                {"epochs": epochs}, 0.5, 0.3 + 0.1 / epochs + 0.01 * one.seed, 1.2, epochs * one.cost.stage_one_seconds
            )
            for epochs in (1, 2, 50)
        ]
        # A length that not all seeds have is left out.
        return dataclasses.replace(one, course=tuple(runs[: 3 if one.seed else 2]))

    content = content_of([with_course(one) for one in made.records(("digits", "letters"))])
    figure = next(one for one in task_figures(content.tasks[0], content) if one.name == "courses")
    lines = {(line.name, *(cell.whole for cell in line.cells)) for line in figure.numbers[0].lines}
    assert ("stf-bnn", "1", "1", "0.4100 ± 0.0058", "32.65") in lines
    assert {line.name for line in figure.numbers[0].lines} == {"stf-bnn", "stf-bnn mixture", "full-bnn"}
    assert {line.cells[0].text for line in figure.numbers[0].lines} == {"1", "2"}
    marks = [one.attrib for one in drawn(figure.panels[0]).iter() if "points" in one.attrib]
    assert marks
    assert "1 to 2" in figure.panels[0].summary


def test_every_mark_lies_within_its_panel() -> None:
    content = content_of(made.records(("digits",)), comparison=made.comparison(), emphasise=["stf-bnn"])
    for figure, panel in ((one, panel) for one in task_figures(content.tasks[0], content) for panel in one.panels):
        for one in drawn(panel).iter():
            pairs = [tuple(map(float, pair.split(","))) for pair in one.attrib.get("points", "").split()]
            pairs += [
                (float(one.attrib[x]), float(one.attrib[y]))
                for x, y in (("x", "y"), ("cx", "cy"), ("x1", "y1"))
                if x in one.attrib
            ]
            for x, y in pairs:
                assert -1 <= x <= panel.width + 1, (figure.name, one.attrib)
                assert -1 <= y <= panel.height + 1, (figure.name, one.attrib)


def test_both_panels_of_a_pair_share_their_axes() -> None:
    content = content_of(made.records(("digits",)))
    figure = next(one for one in task_figures(content.tasks[0], content) if one.name == "pareto")
    ticks = [
        [(text.text, text.attrib["y"]) for text in drawn(panel).iter("text") if text.attrib["class"] == "tick"]
        for panel in figure.panels
    ]
    assert ticks[0] == ticks[1]
    assert [panel.scaled for panel in figure.panels] == [False, True]


def test_points_of_equal_place_are_all_on_the_front() -> None:
    assert pareto_front([(1, 1), (1, 1), (2, 0), (2, 2)]) == [0, 1, 2]
