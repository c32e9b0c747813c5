"""From a task to the tables of a report, as data: the page and the Markdown write the same tables in their own ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from stfbnn.benchmark.records import Cost, Kind, Record
from stfbnn.errors import InputError
from stfbnn.report.html.content import NETWORK, Comparison, Content, Estimate, MethodRow, Task, estimate, temperature_of
from stfbnn.report.tables import ABSENT, Column, known_column

Direction = Literal["ascending", "descending"]

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "nll", "brier", "ece", "adaptive_ece", "classwise_ece", "aurc"),
    "regression": ("mean_log_density", "rmse", "crps", "sharpness", "coverage_50", "coverage_90", "coverage_95"),
}
"""The columns of the main tables; what else the records hold follows them."""

HEADLINE: dict[Kind, str] = {"classification": "nll", "regression": "mean_log_density"}
"""The metric that tables are sorted by at first."""

SCORES = ("entropy", "epistemic", "confidence")
FIGURES = ("auroc", "aupr", "fpr_at_95_tpr")

_OWN = {
    "aurc": Column("aurc", "AURC", "lower"),
    "fpr_at_95_tpr": Column("fpr_at_95_tpr", "FPR95", "lower"),
    "sharpness": Column("sharpness", "sharpness", None),
}
_LEFT_OUT = frozenset({"count"})


@dataclass(frozen=True)
class Head:
    """The head of a column.

    Attributes:
        title: What it says.
        group: What it says above that, over all neighbours of the same group; "" for nothing.
        first: The direction of the first sorting, the one that puts the best on top.
    """

    title: str
    group: str = ""
    first: Direction = "ascending"


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        text: What it says.
        spread: The standard error, shown smaller; "" for none.
        value: What it is sorted by; None goes last.
        marked: Whether it is bold.
    """

    text: str
    spread: str = ""
    value: float | None = None
    marked: bool = False

    @property
    def whole(self) -> str:
        """The text with its standard error."""
        return f"{self.text} ± {self.spread}" if self.spread else self.text


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        name: Its head.
        cells: The rest.
        scaled: Whether it is of a predictive temperature; None where that is no question.
        note: Beside the name, smaller.
        emphasised: Whether it is of a method that the report is about.
    """

    name: str
    cells: tuple[Cell, ...]
    scaled: bool | None = None
    note: str = ""
    emphasised: bool = False


@dataclass(frozen=True)
class TableData:
    """A table.

    Attributes:
        caption: What it shows.
        first: The head of the first column.
        heads: Those of the others.
        lines: In the order to show.
        sorted_by: The place of the head that they are sorted by, and how; None where they are not.
        sortable: Whether a reader may want to sort it.
    """

    caption: str
    first: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    sorted_by: tuple[int, Direction] | None = None
    sortable: bool = True


def column(key: str) -> Column:
    """How a metric is called and shown."""
    if key in _OWN:
        return _OWN[key]
    try:
        return known_column(key)
    except InputError:
        return Column(key, key.replace("_", " "))


def metric_names(task: Task) -> tuple[str, ...]:
    """The metrics of a task: the usual ones that it has, then its others."""
    present = dict.fromkeys(name for row in task.rows for result in task.results(row) for name in result.metrics)
    usual = [name for name in METRICS[task.kind] if name in present]
    return (*usual, *(name for name in present if name not in usual and name not in _LEFT_OUT))


def prediction_table(task: Task, content: Content) -> TableData:
    """How well each method predicts the test data."""
    names = metric_names(task)
    columns = [column(name) for name in names]

    def cells(row: MethodRow) -> list[Cell]:
        return [
            _metric_cell(task.metric(row, name), shown, row in content.comparison.mark(task.name, name))
            for name, shown in zip(names, columns, strict=True)
        ]

    heads = tuple(Head(shown.head, first=_best_first(shown)) for shown in columns)
    headline = HEADLINE[task.kind]
    by = names.index(headline) if headline in names else None
    return _sorted(TableData(f"Test data: {_over_seeds(task)}", "method", heads, _lines(task, content, cells)), by)


def foreign_tables(task: Task, content: Content) -> list[TableData]:
    """How well each method tells the test data from each foreign set."""
    found = dict.fromkeys(name for row in task.rows for result in task.results(row) for name in result.ood)
    return [_foreign_table(task, content, name) for name in found]


def cost_table(task: Task, content: Content) -> TableData:
    """What each method takes."""
    heads = (
        Head("chosen setting", "extra training time / stage one"),
        Head("search included", "extra training time / stage one"),
        Head("ratio to network", "prediction time"),
        Head("s for 1,000 inputs", "prediction time"),
        Head("peak memory / network"),
        Head("trainable parameters"),
        Head("artifact bytes"),
    )
    peaks = {
        record.seed: record.cost.peak_bytes
        for record in task.of_method(NETWORK)
        if record.cost is not None and record.cost.peak_bytes
    }

    def of_costs(method: str, take: Callable[[Cost, int], float | None]) -> Estimate | None:
        return estimate(take(record.cost, record.seed) for record in task.of_method(method) if record.cost is not None)

    def peak_ratio(cost: Cost, seed: int) -> float | None:
        return None if cost.peak_bytes is None or seed not in peaks else cost.peak_bytes / peaks[seed]

    def cells(row: MethodRow) -> list[Cell]:
        taken: list[tuple[Callable[[Cost, int], float | None], Callable[[float, float], str]]] = [
            (lambda cost, _: _ratio(cost.seconds, cost.stage_one_seconds), _significant),
            (lambda cost, _: _ratio(cost.search_seconds, cost.stage_one_seconds), _significant),
            (lambda cost, _: cost.predict_ratio, _significant),
            (lambda cost, _: cost.predict_seconds, _significant),
            (peak_ratio, _significant),
            (lambda cost, _: cost.trainable_parameters, _whole),
            (lambda cost, _: cost.artifact_bytes, _whole),
        ]
        return [_cost_cell(of_costs(row.method, take), show) for take, show in taken]

    # A predictive temperature is found on held-out data in a moment: its lines would say the same again.
    lines = tuple(replace(_line(row, cells(row), task, content), scaled=None) for row in task.rows if not row.scaled)
    return _sorted(TableData(f"Cost: {_over_seeds(task)}", "method", heads, lines), 1)


def choice_table(task: Task) -> TableData:
    """Which hyper-parameters were tried and taken."""
    lines = []
    for method in task.methods:
        taken: dict[tuple[str, str, str], list[Record]] = {}
        for record in task.of_method(method):
            chosen, scaled = record.chosen or (None, None)
            settings = (_setting(record.candidates, chosen), _setting(record.candidates, scaled))
            taken.setdefault((str(len(record.candidates)), *settings), []).append(record)
        for key, records in taken.items():
            seeds = ", ".join(str(record.seed) for record in records)
            taus = [record.scaled.tau for record in records if record.scaled is not None]
            shown = ", ".join(f"{tau:.3f}" for tau in taus if tau is not None)
            lines.append(Line(method, (Cell(seeds), *map(Cell, key), Cell(shown or ABSENT))))
    heads = (Head("seeds"), Head("settings tried"), Head("chosen"), Head("chosen for + τ"), Head("τ by seed"))
    return TableData("Hyper-parameters, chosen on held-out data", "method", heads, tuple(lines), sortable=False)


def failure_table(content: Content) -> TableData | None:
    """What has no figures, and why; None where all went well."""
    lines = []
    for task in content.tasks:
        by_reason: dict[tuple[str, str], list[int]] = {}
        for record in task.failures:
            by_reason.setdefault((record.method, record.failed or "no reason was recorded"), []).append(record.seed)
        for (method, reason), seeds in by_reason.items():
            lines.append(Line(task.name, (Cell(method), Cell(", ".join(map(str, seeds))), Cell(reason))))
    if not lines:
        return None
    heads = (Head("method"), Head("seeds"), Head("reason"))
    return TableData("Methods without figures", "task", heads, tuple(lines), sortable=False)


def best_table(content: Content) -> TableData:
    """The best mean of each task by its main metrics, bold only where it is marked as significant."""
    lines = []
    for task in content.tasks:
        names = ("nll", "accuracy", "ece") if task.kind == "classification" else ("mean_log_density", "rmse", "crps")
        for name in names:
            shown = column(name)
            cells = []
            for scaled in (False, True):
                best = _best(((row, task.metric(row, name)) for row in task.rows if row.scaled == scaled), shown)
                if best is None:
                    cells += [Cell(ABSENT), Cell(ABSENT)]
                    continue
                row, found = best
                marked = row in content.comparison.mark(task.name, name)
                value = _metric_cell(found, shown, marked)
                cells += [Cell(row.method, marked=marked), value]
            lines.append(Line(task.name, (Cell(shown.head), *cells)))
    heads = (
        Head("metric"),
        Head("method", "as it is"),
        Head("mean ± s.e.", "as it is"),
        Head("method", "+ τ"),
        Head("mean ± s.e.", "+ τ"),
    )
    return TableData("Best mean of each task", "task", heads, tuple(lines), sortable=False)


def ranking_table(content: Content) -> TableData | None:
    """Average ranks over tasks; None where nobody computed any."""
    rankings = content.comparison.rankings
    if not rankings:
        return None
    methods = sorted(
        dict.fromkeys(method for ranking in rankings for method in ranking.average_ranks),
        key=lambda method: rankings[0].average_ranks.get(method, math.inf),
    )
    found = [[ranking.average_ranks.get(method) for ranking in rankings] for method in methods]
    lines = [
        Line(method, tuple(Cell(ABSENT if rank is None else f"{rank:.2f}", value=rank) for rank in ranks))
        for method, ranks in zip(methods, found, strict=True)
    ]
    return TableData(
        "Average rank over tasks, 1 is best", "method", tuple(Head(one.metric) for one in rankings), tuple(lines)
    )


def bold_rule(comparison: Comparison) -> str:
    """What bold means in the tables."""
    return comparison.rule or "Nothing is bold: no test of significance was handed to this report."


def _foreign_table(task: Task, content: Content, foreign: str) -> TableData:
    rows = [row for row in task.rows if any(foreign in result.ood for result in task.results(row))]
    present = dict.fromkeys(
        score for row in rows for result in task.results(row) for score in result.ood.get(foreign, {})
    )
    scores = (*(one for one in SCORES if one in present), *(one for one in present if one not in SCORES))
    names = [(score, figure) for score in scores for figure in FIGURES]

    def cells(row: MethodRow) -> list[Cell]:
        made = []
        for score, figure in names:
            values = [result.ood.get(foreign, {}).get(score, {}).get(figure) for result in task.results(row)]
            marked = row in content.comparison.mark(task.name, f"ood/{foreign}/{score}/{figure}")
            made.append(_metric_cell(estimate(values), column(figure), marked))
        return made

    heads = tuple(Head(column(figure).head, f"by {score}", _best_first(column(figure))) for score, figure in names)
    caption = f"Test data against {foreign}: {_over_seeds(task)}"
    return _sorted(TableData(caption, "method", heads, _lines(task, content, cells, rows)), 0 if heads else None)


def _lines(
    task: Task, content: Content, cells: Callable[[MethodRow], Sequence[Cell]], rows: Iterable[MethodRow] | None = None
) -> tuple[Line, ...]:
    return tuple(_line(row, cells(row), task, content) for row in (task.rows if rows is None else rows))


def _line(row: MethodRow, cells: Sequence[Cell], task: Task, content: Content) -> Line:
    done, asked = len(task.results(row)), len(task.seeds)
    note = "" if done == asked else f"{done} of {asked} seeds"
    scaled = temperature_of(row.scaled, task.rows)
    return Line(row.label, tuple(cells), scaled, note, row.method in content.emphasised)


def _sorted(table: TableData, by: int | None) -> TableData:
    if by is None:
        return table
    direction = table.heads[by].first
    sign = 1 if direction == "ascending" else -1

    def key(line: Line) -> float:
        value = line.cells[by].value
        return math.inf if value is None else sign * value

    return replace(table, lines=tuple(sorted(table.lines, key=key)), sorted_by=(by, direction))


def _best(found: Iterable[tuple[MethodRow, Estimate | None]], shown: Column) -> tuple[MethodRow, Estimate] | None:
    present = [(row, value) for row, value in found if value is not None]
    return min(present, key=lambda one: shown.distance(one[1].mean), default=None)


def _best_first(shown: Column) -> Direction:
    return "descending" if shown.best == "higher" else "ascending"


def _metric_cell(found: Estimate | None, shown: Column, marked: bool) -> Cell:
    if found is None:
        return Cell(ABSENT)
    spread = "" if found.error is None else shown.show(found.error)
    return Cell(shown.show(found.mean), spread, found.mean, marked)


def _cost_cell(found: Estimate | None, show: Callable[[float, float], str]) -> Cell:
    if found is None:
        return Cell(ABSENT)
    # A standard error of 0 is that of a count, which says nothing.
    spread = show(found.error, found.mean) if found.error else ""
    return Cell(show(found.mean, found.mean), spread, found.mean)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _significant(value: float, like: float) -> str:
    """A value with the decimal places that ``like`` has with three significant digits, and never an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(like))))
    return f"{value:,.{min(digits, 6)}f}"


def _whole(value: float, _like: float) -> str:
    return f"{value:,.0f}"


def _setting(candidates: Sequence[Any], place: int | None) -> str:
    if place is None or not 0 <= place < len(candidates):
        return ABSENT
    setting = candidates[place].setting
    return ", ".join(f"{key} = {_plain(value)}" for key, value in setting.items()) or "as it comes"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _over_seeds(task: Task) -> str:
    count = len(task.seeds)
    return f"mean ± standard error over {count} seeds" if count > 1 else "one seed, so no standard error"
