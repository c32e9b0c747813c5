"""Which figures a task has, with their captions and numbers: from pooled results to panels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from stfbnn.report.html import charts
from stfbnn.report.html.charts import Curve, Point, over
from stfbnn.report.html.content import Content, MethodRow, Ranking, Task, estimate, temperature_of
from stfbnn.report.html.course_figure import course_figure
from stfbnn.report.html.drawing import Key, Panel, line, polyline, rect
from stfbnn.report.html.figure_parts import Figure, curve_of, kind_title, legend_of, pair_of_panels
from stfbnn.report.html.measures import HEADLINE, Cell, Head, Line, TableData, column
from stfbnn.report.html.pooling import mean_risks, pooled_bins, pooled_entropies, shifted
from stfbnn.report.tables import ABSENT

_SHIFT_METRICS = {"classification": ("nll", "accuracy", "ece"), "regression": ("mean_log_density", "rmse")}
_COVERAGES = tuple(step / 10 for step in range(1, 11))


def task_figures(task: Task, content: Content) -> Iterator[Figure]:
    """All figures that the records of a task have the numbers for."""
    for made in (
        _pareto(task, content),
        course_figure(task, content),
        _reliability(task),
        *_selective(task, content),
        _entropies(task),
        _corruptions(task, content),
        _each_corruption(task, content),
        _abstention(task, content),
    ):
        if made is not None:
            yield made


def ranking_figure(ranking: Ranking, place: int) -> Figure:
    """A critical-difference diagram."""
    caption = (
        f"Average rank of each method over {over(ranking.tasks)} by {ranking.metric}; 1 is best. A bar joins methods among "
        f"which no difference is significant. {ranking.note}"
    ).strip()
    lines = tuple(
        Line(name, (Cell(f"{rank:.2f}", value=rank),))
        for name, rank in sorted(ranking.average_ranks.items(), key=_second)
    )
    numbers = TableData("Average ranks", "method", (Head("rank"),), lines, sortable=False)
    panel = charts.critical_difference_panel(ranking)
    return Figure(
        f"ranks-{place}",
        f"Ranks by {ranking.metric}",
        caption,
        (panel,),
        (),
        (numbers,),
        (f"rankings/{place}",),
        "wide",
    )


def _reliability(task: Task) -> Figure | None:
    panels, lines = [], []
    edges: Sequence[float] = ()
    for row in task.rows:
        bins = pooled_bins(task.results(row))
        if bins is None:
            continue
        ece = task.metric(row, "ece")
        panels.append(
            charts.reliability_panel(
                row.label, bins, f"ECE {ece.mean:.4f}" if ece else "", temperature_of(row.scaled, task.rows)
            )
        )
        edges = bins.edges
        for name, values in (("confidence", bins.confidences), ("accuracy", bins.accuracies)):
            shown = [Cell(ABSENT if value is None else f"{value:.3f}") for value in values]
            lines.append(Line(row.label, (Cell(name), *shown), temperature_of(row.scaled, task.rows)))
        lines.append(
            Line(
                row.label,
                (Cell("examples"), *(Cell(f"{count:,.0f}") for count in bins.counts)),
                temperature_of(row.scaled, task.rows),
            )
        )
    if not panels:
        return None
    heads = (Head("of the bin"), *(Head(f"{low:.2f}–{high:.2f}") for low, high in pairwise(edges)))
    numbers = TableData("Bins of confidence, all seeds together", "method", heads, tuple(lines), sortable=False)
    keys = (
        Key("accuracy", rect(2, 0, 24, 12, "bar")),
        Key("overconfident by", rect(2, 1, 24, 10, "gap over")),
        Key("underconfident by", rect(2, 1, 24, 10, "gap under")),
        Key("ideal", line(2, 6, 26, 6, "ideal")),
        Key("share of examples", rect(2, 2, 24, 8, "share")),
    )
    caption = (
        "Accuracy against confidence in bins of equal width, the examples of all seeds together; below, where the examples "
        "are. ECE is the mean over seeds."
    )
    return Figure("reliability", "Reliability", caption, tuple(panels), keys, (numbers,), ("reliability",), "small")


def _selective(task: Task, content: Content) -> Iterator[Figure]:
    found = {row: curve for row in task.rows if (curve := mean_risks(task.results(row))) is not None}
    if not found:
        return
    risk_curves = {row: curve_of(row, content, xs, ys) for row, (xs, ys) in found.items()}
    accuracy_curves = {
        row: curve_of(row, content, [1 - x for x in reversed(xs)], [1 - y for y in reversed(ys)])
        for row, (xs, ys) in found.items()
    }
    for name, heading, caption, curves, labels, end in (
        (
            "risk-coverage",
            "Risk and coverage",
            "Share of wrong answers among those of the least entropy, mean over seeds. Lower is better.",
            risk_curves,
            ("coverage", "risk"),
            0.0,
        ),
        (
            "accuracy-rejection",
            "Accuracy and rejection",
            "Accuracy on what is left when the most uncertain examples are rejected, mean over seeds. Higher is better.",
            accuracy_curves,
            ("share rejected", "accuracy on the rest"),
            1.0,
        ),
    ):
        yield Figure(
            name,
            heading,
            caption,
            tuple(pair_of_panels(curves, *labels, y_ends=(end,))),
            legend_of(curves, content),
            (_curve_numbers(curves, *labels),),
            ("risk_coverage",),
        )


def _entropies(task: Task) -> Figure | None:
    found = {row: pooled for row in task.rows if (pooled := pooled_entropies(task.results(row))) is not None}
    if not found:
        return None
    highest = max(share for _, shares in found.values() for values in shares.values() for share in values)
    panels = [
        charts.entropy_panel(row.label, *pooled, highest, temperature_of(row.scaled, task.rows))
        for row, pooled in found.items()
    ]
    names = list(dict.fromkeys(name for _, shares in found.values() for name in shares))
    edges = next(iter(found.values()))[0]
    lines = tuple(
        Line(
            row.label, (Cell(name), *(Cell(f"{value:.3f}") for value in values)), temperature_of(row.scaled, task.rows)
        )
        for row, (_, shares) in found.items()
        for name, values in shares.items()
    )
    heads = (Head("set"), *(Head(f"{low:.2f}–{high:.2f}") for low, high in pairwise(edges)))
    numbers = TableData("Share of each set's examples by entropy in nats", "method", heads, lines, sortable=False)
    keys = []
    for place, name in enumerate(names):
        drawn = polyline([(2, 3), (26, 3)], dashes=charts.set_dashes(place))
        filled = rect(2, 3, 24, 9, "fill") if place == 0 else ""
        keys.append(Key(name, f'<g class="set s{charts.set_style(place)}">{filled}{drawn}</g>'))
    caption = (
        "Share of examples by predictive entropy: the test data and foreign sets, all seeds together. The less they overlap, "
        "the better foreign examples can be told."
    )
    return Figure(
        "entropies",
        "Entropy in and out of distribution",
        caption,
        tuple(panels),
        tuple(keys),
        (numbers,),
        ("entropies",),
        "small",
    )


def _corruptions(task: Task, content: Content) -> Figure | None:
    names = _corruption_names(task)
    panels: list[Panel] = []
    numbers = []
    shown: dict[MethodRow, Curve] = {}
    for metric in _SHIFT_METRICS[task.kind] if names else ():
        curves = _severity_curves(task, content, None, metric)
        shown |= curves
        panels += pair_of_panels(
            curves, "severity", column(metric).title, (0, 5), every_point=True, title=column(metric).title
        )
        numbers += [_severity_numbers(task, metric, names)]
    if not panels:
        return None
    caption = (
        f"Mean over corruptions ({', '.join(names)}) and seeds, by severity; 0 is the whole test set, without corruption. "
        f"The marks of severities 1 to 5 are of those test examples that were corrupted."
    )
    return Figure(
        "corruption",
        "Under corruption",
        caption,
        tuple(panels),
        legend_of(shown, content),
        tuple(numbers),
        ("metrics", "shift"),
    )


def _each_corruption(task: Task, content: Content) -> Figure | None:
    names, metric = _corruption_names(task), HEADLINE[task.kind]
    if len(names) < 2:
        return None
    panels: list[Panel] = []
    shown: dict[MethodRow, Curve] = {}
    for name in names:
        curves = _severity_curves(task, content, name, metric)
        shown |= curves
        panels += pair_of_panels(curves, "severity", column(metric).title, (0, 5), every_point=True, title=name)
    if not panels:
        return None
    caption = f"{column(metric).head} under each corruption by severity, mean over seeds; 0 is the whole test set."
    legend = legend_of(shown, content)
    numbers = (_severity_numbers(task, metric, names),)
    return Figure(
        "each-corruption", "Each corruption", caption, tuple(panels), legend, numbers, ("metrics", "shift"), extra=True
    )


def _pareto(task: Task, content: Content) -> Figure | None:
    headline = HEADLINE[task.kind]
    sign = -1.0 if headline == "mean_log_density" else 1.0
    points: dict[MethodRow, Point] = {}
    for row in task.rows:
        costs = [record.cost for record in task.of_method(row.method)]
        ratio = estimate(
            cost.search_seconds / cost.stage_one_seconds
            for cost in costs
            if cost is not None and cost.stage_one_seconds > 0
        )
        quality = task.metric(row, headline)
        if ratio is not None and quality is not None:
            strong = row.method in content.emphasised
            points[row] = Point(row.method, content.style(row.method), ratio.mean, sign * quality.mean, strong)
    if not points:
        return None
    labels = ("extra time / stage one, search included", "NLL (nats)" if sign > 0 else "− log density (nats)")
    panels = tuple(
        charts.pareto_panel(
            kind_title(scaled, points), part, *labels, list(points.values()), temperature_of(scaled, points)
        )
        for scaled in (False, True)
        if (part := [point for row, point in points.items() if row.scaled == scaled])
    )
    lines = tuple(
        Line(row.label, (Cell(f"{point.x:.4g}"), Cell(f"{point.y:.4f}")), temperature_of(row.scaled, points))
        for row, point in points.items()
    )
    numbers = TableData("Cost and quality", "method", tuple(map(Head, labels)), lines, sortable=False)
    caption = (
        "What a method costs beyond one trained network, and what it gives: lower and further left is better. A ring and the "
        "stepped line mark the front: nothing else is both cheaper and better. Means over seeds."
    )
    legend = legend_of(points, content)
    return Figure("pareto", "Cost and quality", caption, panels, legend, (numbers,), ("metrics", "cost"))


def _abstention(task: Task, content: Content) -> Figure | None:
    rows = [row for row in task.rows if any(result.abstention for result in task.results(row))]
    if not rows:
        return None
    panels, lines = [], []
    targets: dict[MethodRow, float | None] = {}
    figures: dict[MethodRow, dict[str, list[float | None]]] = {}
    for row in rows:
        found = [result.abstention for result in task.results(row) if result.abstention]
        targets[row] = found[0].get("target_risk")
        # A method that accepts nothing has a coverage of 0 and no risk.
        figures[row] = {
            "risk": [one.get("risk") for one in found if one.get("risk") is not None],
            "coverage": [one.get("coverage") or 0.0 for one in found],
        }
        levels = {one.get("confidence_level") for one in found}
        shown = [
            Cell(ABSENT if (mean := estimate(figures[row][name])) is None else f"{mean.mean:.4f}")
            for name in figures[row]
        ]
        accepted = sum(one.get("threshold") is not None for one in found)
        aims = (_maybe(targets[row]), ", ".join(_maybe(level) for level in levels), f"{accepted} of {len(found)}")
        lines.append(Line(row.label, (*map(Cell, aims), *shown), temperature_of(row.scaled, task.rows)))
    for scaled in (False, True):
        part = [row for row in rows if row.scaled == scaled]
        for name, label in (("risk", "risk reached on the test data"), ("coverage", "share answered")):
            drawn = [(row.method, content.style(row.method), estimate(figures[row][name])) for row in part]
            if not part:
                continue
            aims_drawn = [targets[row] if name == "risk" else None for row in part]
            bounds = (0.0,) if name == "risk" else (0.0, 1.0)
            title = f"{'Risk' if name == 'risk' else 'Coverage'}, {kind_title(scaled, rows)}"
            panels.append(
                charts.abstention_panel(title, drawn, label, aims_drawn, temperature_of(scaled, rows), bounds)
            )
    heads = tuple(map(Head, ("target risk", "confidence level", "seeds with a threshold", "risk", "coverage")))
    numbers = TableData("Abstention", "method", heads, tuple(lines), sortable=False)
    caption = (
        "The threshold of entropy is chosen on held-out data so that, at the stated confidence, the risk among the answered "
        "examples is at most the target (the bar across). Dots are means over seeds of what the test data then give, with "
        "standard errors; risks count the seeds that answer anything."
    )
    keys = (Key("target risk", line(14, 0, 14, 12, "target")),)
    return Figure("abstention", "Abstention", caption, tuple(panels), keys, (numbers,), ("abstention",))


def _curve_numbers(curves: dict[MethodRow, Curve], x_label: str, y_label: str) -> TableData:
    lines = []
    for row, curve in curves.items():
        cells = []
        for wanted in _COVERAGES:
            near = min(range(len(curve.xs)), key=lambda place: abs(curve.xs[place] - wanted))
            close = abs(curve.xs[near] - wanted) < 0.02
            cells.append(Cell(f"{curve.ys[near]:.4f}" if close else ABSENT))
        lines.append(Line(row.label, tuple(cells), temperature_of(row.scaled, curves)))
    heads = tuple(Head(f"{wanted:g}") for wanted in _COVERAGES)
    return TableData(f"{y_label} by {x_label}", "method", heads, tuple(lines), sortable=False)


def _corruption_names(task: Task) -> list[str]:
    return list(dict.fromkeys(name for row in task.rows for result in task.results(row) for name in result.shift))


def _severity_curves(task: Task, content: Content, name: str | None, metric: str) -> dict[MethodRow, Curve]:
    found = {row: shifted(task.results(row), name, metric) for row in task.rows}
    return {
        row: curve_of(row, content, range(6), [one.mean for one in means])
        for row, means in found.items()
        if means is not None
    }


def _severity_numbers(task: Task, metric: str, names: Sequence[str]) -> TableData:
    lines = []
    for row in task.rows:
        for name in (*names, None):
            means = shifted(task.results(row), name, metric)
            if means is not None:
                cells = [Cell(column(metric).show(one.mean)) for one in means]
                lines.append(Line(row.label, (Cell(name or "mean"), *cells), temperature_of(row.scaled, task.rows)))
    heads = (Head("corruption"), *(Head(str(severity)) for severity in range(6)))
    return TableData(f"{column(metric).title} by severity", "method", heads, tuple(lines), sortable=False)


def _maybe(value: float | None) -> str:
    return ABSENT if value is None else f"{value:g}"


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
