"""What a report is about: records grouped by task, figures averaged over seeds, and what others computed from them.

The statistics (which differences are significant, how methods rank over tasks) come in as data: the report draws them and
computes none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from stfbnn.benchmark.records import Kind, Record, Row
from stfbnn.errors import InputError
from stfbnn.report.html.drawing import SCALED
from stfbnn.report.verdicts import Claim

NETWORK = "network"
"""The method that is the trained network itself, to which peak memory is compared."""


@dataclass(frozen=True, order=True)
class MethodRow:
    """A line of the tables: a method as it is, or with a predictive temperature.

    Attributes:
        method: Name of the method.
        scaled: Whether with the temperature.
    """

    method: str
    scaled: bool = False

    @property
    def label(self) -> str:
        """The name as tables and figures show it."""
        return f"{self.method}{SCALED}" if self.scaled else self.method


def temperature_of(scaled: bool, rows: Iterable[MethodRow]) -> bool | None:
    """Whether something is of a predictive temperature; None where no line has one, so that there is no choice to make."""
    return scaled if any(row.scaled for row in rows) else None


@dataclass(frozen=True)
class Ranking:
    """How methods rank over tasks by one metric: what a critical-difference diagram shows (Demšar, 2006).

    Attributes:
        metric: Name of the metric, for a person.
        average_ranks: For each method its rank averaged over tasks, 1 being the best.
        critical_difference: Average ranks that differ by more are significantly different; None where no such difference
            applies.
        cliques: Groups of methods among which no difference is significant.
        tasks: How many tasks the ranks are averaged over.
        note: The test and its level, for a person.

    Raises:
        InputError: There are fewer than two methods, ranks are not finite numbers of at least 1, or a clique names a method
            that has no rank.
    """

    metric: str
    average_ranks: Mapping[str, float]
    critical_difference: float | None
    cliques: Sequence[Collection[str]]
    tasks: int
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.average_ranks) < 2:
            raise InputError(f"a ranking by {self.metric} needs at least two methods, not {len(self.average_ranks)}")
        for method, rank in self.average_ranks.items():
            if not (math.isfinite(rank) and rank >= 1):
                raise InputError(f"the average rank of {method!r} must be a number of at least 1, but it is {rank}")
        strangers = {name for clique in self.cliques for name in clique} - set(self.average_ranks)
        if strangers:
            raise InputError(f"cliques of the ranking by {self.metric} name {sorted(strangers)}, which have no rank")


def no_marks(_task: str, _metric: str) -> frozenset[MethodRow]:
    """Mark nothing: where nobody has tested what is significant."""
    return frozenset()


@dataclass(frozen=True)
class Comparison:
    """What the statistics say, for the report to show.

    Attributes:
        mark: From a task and a metric to the lines that are to be bold. Metrics are named as in the records; those of
            foreign sets are ``ood/SET/SCORE/FIGURE``, such as ``ood/svhn/entropy/auroc``.
        rule: What bold means, in a sentence.
        rankings: Of methods over tasks, one critical-difference diagram each.
    """

    mark: Callable[[str, str], Collection[MethodRow]] = no_marks
    rule: str = ""
    rankings: Sequence[Ranking] = ()


@dataclass(frozen=True)
class Estimate:
    """A figure over seeds.

    Attributes:
        mean: Over seeds.
        error: Standard error of that mean; None with one seed.
        count: Number of seeds.
    """

    mean: float
    error: float | None
    count: int


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Average a figure over seeds.

    Returns:
        Mean and standard error; None where there is no value or one of them is undefined: a mean over the seeds that went
        well would flatter.
    """
    numbers = list(values)
    present = [float(value) for value in numbers if value is not None and math.isfinite(value)]
    if not present or len(present) < len(numbers):
        return None
    mean = math.fsum(present) / len(present)
    if len(present) == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in present) / (len(present) - 1)
    return Estimate(mean, math.sqrt(variance / len(present)), len(present))


@dataclass(frozen=True)
class Task:
    """All that was recorded on one task.

    Attributes:
        name: Of the task.
        kind: What its targets are.
        seeds: Of all its records, in order.
        methods: Its methods, those that failed included.
        records: By method and seed.
    """

    name: str
    kind: Kind
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    records: Mapping[tuple[str, int], Record]

    def of_method(self, method: str) -> list[Record]:
        """The records of a method that have figures, by seed."""
        found = (self.records.get((method, seed)) for seed in self.seeds)
        return [record for record in found if record is not None and record.raw is not None]

    @property
    def rows(self) -> tuple[MethodRow, ...]:
        """The lines of the task's tables."""
        rows: list[MethodRow] = []
        for method in self.methods:
            for scaled in (False, True):
                row = MethodRow(method, scaled)
                if self.results(row):
                    rows.append(row)
        return tuple(rows)

    def results(self, row: MethodRow) -> list[Row]:
        """The figures of a line, by seed."""
        found = (record.scaled if row.scaled else record.raw for record in self.of_method(row.method))
        return [one for one in found if one is not None]

    def metric(self, row: MethodRow, name: str) -> Estimate | None:
        """A figure of a line, over seeds."""
        return estimate(result.metrics.get(name) for result in self.results(row))

    @property
    def failures(self) -> list[Record]:
        """The records without figures, by method and seed."""
        found = (self.records.get((method, seed)) for method in self.methods for seed in self.seeds)
        return [record for record in found if record is not None and record.raw is None]


@dataclass(frozen=True)
class Content:
    """All that a report shows.

    Attributes:
        title: Of the report.
        command: That reproduces it.
        tasks: In the order of the records.
        methods: Of all tasks; a method's place gives it its colour and its mark everywhere.
        claims: With their verdicts.
        comparison: What the statistics say.
        emphasised: Methods to be drawn stronger.
        environments: The distinct values of each entry of the records' environments.
    """

    title: str
    command: str
    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    comparison: Comparison = field(default_factory=Comparison)
    emphasised: frozenset[str] = frozenset()
    environments: Mapping[str, list[Any]] = field(default_factory=dict)

    def style(self, method: str) -> int:
        """The place of a method among all."""
        return self.methods.index(method)

    def command_of(self, *tasks: Task) -> str:
        """The command that makes the figures of tasks: the report's, else the first one in their records."""
        recorded = (record.environment.get("command") for task in tasks for record in task.records.values())
        return self.command or next((str(one) for one in recorded if one), "")


def content_of(
    records: Iterable[Record],
    claims: Iterable[Claim] = (),
    title: str = "Benchmark",
    command: str = "",
    comparison: Comparison | None = None,
    emphasise: Iterable[str] = (),
) -> Content:
    """Group records into the content of a report.

    Args:
        records: Of any tasks, seeds and methods.
        claims: With their verdicts.
        title: Of the report.
        command: That reproduces it; "" for the one in the records.
        comparison: What the statistics say; None marks nothing and ranks nothing.
        emphasise: Methods to be drawn stronger.

    Raises:
        InputError: There are no records, two are of the same task, seed and method, or a task is of two kinds or of an unknown
            one.
    """
    given = list(records)
    if not given:
        raise InputError("a report needs records; none were given (run the benchmark first)")
    compared = comparison or Comparison()
    methods = _network_first(record.method for record in given)
    grouped: dict[str, dict[tuple[str, int], Record]] = {}
    for record in given:
        of_task = grouped.setdefault(record.task, {})
        key = (record.method, record.seed)
        if key in of_task:
            raise InputError(
                f"two records are of task {record.task!r}, seed {record.seed}, method {record.method!r}; keep one"
            )
        of_task[key] = record
    return Content(
        title=title,
        command=command,
        tasks=tuple(_task(name, of_task, methods) for name, of_task in grouped.items()),
        methods=methods,
        claims=tuple(claims),
        # Every line of every table asks, and an answer may take many tests.
        comparison=replace(compared, mark=functools.cache(compared.mark)),
        emphasised=frozenset(emphasise),
        environments=_environments(given),
    )


def _task(name: str, records: Mapping[tuple[str, int], Record], order: Sequence[str]) -> Task:
    kinds = {record.kind for record in records.values()}
    if not kinds <= set(get_args(Kind)):
        raise InputError(
            f"task {name!r} must be one of {', '.join(get_args(Kind))}, but its records say {sorted(kinds)}"
        )
    if len(kinds) > 1:
        raise InputError(f"the records of task {name!r} are of several kinds: {', '.join(sorted(kinds))}; run it again")
    present = {method for method, _ in records}
    return Task(
        name=name,
        kind=kinds.pop(),
        seeds=tuple(sorted({seed for _, seed in records})),
        methods=tuple(method for method in order if method in present),
        records=records,
    )


def _network_first(names: Iterable[str]) -> tuple[str, ...]:
    distinct = list(dict.fromkeys(names))
    return tuple(sorted(distinct, key=lambda name: name != NETWORK))


def _environments(records: Iterable[Record]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in records:
        for key, value in record.environment.items():
            values = found.setdefault(str(key), [])
            if value not in values:
                values.append(value)
    return found
