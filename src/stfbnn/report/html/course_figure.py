"""How good a method is after how much time: one line a method, one point a run of its own length."""

from __future__ import annotations

from stfbnn.benchmark.courses import TOLERANCE, converged, course_of, held_out_score
from stfbnn.benchmark.records import Record
from stfbnn.report.html import charts
from stfbnn.report.html.content import Content, Estimate, MethodRow, Task, estimate
from stfbnn.report.html.figure_parts import Figure, curve_of, legend_of
from stfbnn.report.html.measures import Cell, Head, Line, TableData
from stfbnn.report.tables import ABSENT

_TIME = "time of one fit / stage one"


def course_figure(task: Task, content: Content) -> Figure | None:
    """The runs of several lengths, where a task has any."""
    found = {method: _points(task.of_method(method)) for method in task.methods}
    found = {method: points for method, points in found.items() if points}
    if not found:
        return None
    curves = {
        MethodRow(method): curve_of(
            MethodRow(method), content, [x.mean for _, x, _ in points], [y.mean for *_, y in points]
        )
        for method, points in found.items()
    }
    score = "held-out NLL (nats)" if task.kind == "classification" else "− held-out log density (nats)"
    times = [x for curve in curves.values() for x in curve.xs]
    scores = [y for curve in curves.values() for y in curve.ys]
    panel = charts.curves_panel(
        "fits of several lengths",
        list(curves.values()),
        _TIME,
        score,
        scores,
        (min(times), max(times)),
        every_point=True,
        log_x=True,
    )
    lines = []
    for method, points in found.items():
        soonest = _soonest(task.of_method(method))
        text = ABSENT if soonest is None else f"{soonest.mean:.4g}"
        lines += [
            Line(method, (Cell(str(epochs)), Cell(f"{x.mean:.4g}"), Cell(f"{y.mean:.4f}", _spread(y)), Cell(text)))
            for epochs, x, y in points
        ]
    heads = tuple(map(Head, ("epochs", _TIME, score, "converged after")))
    caption = (
        "Each point is a fit of its own length at the temperature that was chosen, scored on the held-out examples with its "
        "best predictive temperature or noise: lower and further left is better. Means over seeds. The table says after how "
        f"much time a fit is within {TOLERANCE} nats of the longest one."
    )
    numbers = TableData("Time and held-out quality", "method", heads, tuple(lines), sortable=False)
    return Figure(
        "courses", "Time to a given quality", caption, (panel,), legend_of(curves, content), (numbers,), ("course",)
    )


def _points(records: list[Record]) -> list[tuple[int, Estimate, Estimate]]:
    """Epochs, time in stage ones, and held-out score of every length that all seeds have."""
    runs = [
        {
            int(one.setting["epochs"]): (one.seconds / record.cost.stage_one_seconds, score)
            for one in record.course
            if (score := held_out_score(one)) is not None
        }
        for record in records
        if record.cost is not None
    ]
    points = []
    for epochs in sorted(set[int]().union(*runs)) if runs else ():
        here = [run[epochs] for run in runs if epochs in run]
        time, quality = estimate(x for x, _ in here), estimate(y for _, y in here)
        if len(here) == len(runs) and time is not None and quality is not None:
            points.append((epochs, time, quality))
    return points


def _soonest(records: list[Record]) -> Estimate | None:
    times = [(record, converged(course_of(record))) for record in records]
    return estimate(
        one.seconds / record.cost.stage_one_seconds
        for record, one in times
        if one is not None and record.cost is not None
    )


def _spread(found: Estimate) -> str:
    return "" if found.error is None else f"{found.error:.4f}"
