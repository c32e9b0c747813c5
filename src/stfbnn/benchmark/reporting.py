"""From records to a report: the statistics of the comparison, the claims, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from stfbnn.benchmark.claims import claims_of
from stfbnn.benchmark.ranking import average_ranks, cliques, critical_difference, friedman, task_means
from stfbnn.benchmark.records import Record, Row
from stfbnn.benchmark.statistics import standing, summary
from stfbnn.errors import InputError
from stfbnn.report.html.content import Comparison, MethodRow, Ranking
from stfbnn.report.html.page import write_report
from stfbnn.report.verdicts import Claim

ALPHA = 0.05
RULE = (
    "Bold: the best, and all that cannot be told from it, where at least one method is significantly worse (paired t tests "
    f"over seeds, Holm's correction over all pairs, α = {ALPHA}); with few seeds such a test has little power."
)
LOWER = frozenset({"nll", "brier", "ece", "adaptive_ece", "classwise_ece", "aurc", "rmse", "crps", "fpr_at_95_tpr"})
# What fits a terminal of 80 characters; the rest is in the report.
_CLASSES, _NUMBERS = ("accuracy", "nll", "ece"), ("rmse", "mean_log_density")
HIGHER = frozenset({"accuracy", "mean_log_density", "auroc", "aupr"})


@dataclass(frozen=True)
class Written:
    """What was made of the records.

    Attributes:
        files: The report's files.
        tables: For a terminal.
        claims: With their verdicts.
    """

    files: tuple[Path, ...]
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]


def write_benchmark_report(folder: Path, records: Sequence[Record], command: str, title: str) -> Written:
    """Compare the records and write ``report.html`` and ``report.md`` with its figures.

    Args:
        folder: Where to.
        records: Of one suite.
        command: That reproduces them.
        title: Of the report.
    """
    claims = tuple(claims_of(records))
    comparison = Comparison(mark=marks(records), rule=RULE, rankings=rankings(records))
    emphasised = [name for name in dict.fromkeys(record.method for record in records) if name.startswith("stf-bnn")]
    page = write_report(
        folder, records, claims=claims, title=title, command=command, comparison=comparison, emphasise=emphasised
    )
    return Written((page, folder / "report.md"), (*_tables(records), _claims_table(claims)), claims)


def marks(records: Sequence[Record]) -> Callable[[str, str], frozenset[MethodRow]]:
    """What may be bold: from a task and a metric, named as in the report, to its lines.

    Lines as they are, and lines with a predictive temperature, are two families of their own: a comparison of each method with
    itself would take power from all others.
    """

    def mark(task: str, metric: str) -> frozenset[MethodRow]:
        name = metric.rsplit("/", 1)[-1]
        if name not in LOWER | HIGHER:
            return frozenset()
        here = [record for record in records if record.task == task]
        table, found = values_of(here, metric), set[MethodRow]()
        for scaled in (False, True):
            family = {row.method: values for row, values in table.items() if row.scaled == scaled}
            place = standing(family, lower_is_better=name in LOWER, alpha=ALPHA, test_to_train=_redrawn(here))
            found |= {MethodRow(method, scaled) for method in place.bold}
        return frozenset(found)

    return mark


def _redrawn(records: Sequence[Record]) -> float:
    """Test examples for each training example where every seed draws the test set anew from one table; else 0."""
    source = str(records[0].settings.get("task", {}).get("source", ""))
    return 1 / 9 if source == "diabetes" or source.startswith("uci-gal-splits/") else 0.0


def values_of(records: Sequence[Record], metric: str) -> dict[MethodRow, dict[int, float]]:
    """One figure of every line of a task, by seed; where it is defined."""
    table: dict[MethodRow, dict[int, float]] = {}
    for record in records:
        for scaled, row in ((False, record.raw), (True, record.scaled)):
            value = None if row is None else figure_of(row, metric)
            if value is not None:
                table.setdefault(MethodRow(record.method, scaled), {})[record.seed] = value
    return table


def figure_of(row: Row, metric: str) -> float | None:
    """A figure by its name in the report: ``nll``, or ``ood/SET/SCORE/FIGURE``."""
    if metric.startswith("ood/"):
        _, rest = metric.split("/", 1)
        foreign, score, figure = rest.rsplit("/", 2)
        return row.ood.get(foreign, {}).get(score, {}).get(figure)
    return row.metrics.get(metric)


def rankings(records: Sequence[Record]) -> tuple[Ranking, ...]:
    """How the methods rank over the tasks: by NLL (for numbers, the negative log density), each with its temperature."""
    table: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        row = record.scaled or record.raw
        if row is None:
            continue
        density = row.metrics.get("mean_log_density")
        value = row.metrics.get("nll") if density is None else -density
        if value is not None:
            table.setdefault(record.task, {}).setdefault(record.method, {})[record.seed] = value
    try:
        ranks = average_ranks(task_means(table), lower_is_better=True)
    except InputError:
        # No task has two methods.
        return ()
    difference = critical_difference(len(ranks.average), len(ranks.ranks), ALPHA)
    enough = len(ranks.average) > 2 and len(ranks.ranks) > 1
    test = f"Friedman's test p = {friedman(ranks).p_value:.3g}; " if enough else ""
    methods = dict.fromkeys(method for values in table.values() for method in values)
    absent = (*(name for name in methods if name not in ranks.average), *ranks.left_out_tasks)
    left = f"; incomplete and left out: {', '.join(absent)}" if absent else ""
    return (
        Ranking(
            metric="NLL",
            average_ranks=ranks.average,
            critical_difference=difference,
            cliques=cliques(ranks.average, difference),
            tasks=len(ranks.ranks),
            note=f"{test}Nemenyi's critical difference at α = {ALPHA}{left}",
        ),
    )


def _tables(records: Sequence[Record]) -> list[Table]:
    """One table a task, of what fits a terminal."""
    tables = []
    for task in dict.fromkeys(record.task for record in records):
        here = [record for record in records if record.task == task]
        names = _CLASSES if here[0].kind == "classification" else _NUMBERS
        table = Table(title=f"{task}: mean ± standard error over seeds; time in stage ones")
        table.add_column("method", no_wrap=True)
        for name in (*names, "time"):
            table.add_column(name.replace("_", " "), justify="right")
        columns = [values_of(here, name) for name in names]
        for row in columns[0]:
            cells = [_cell(column.get(row, {})) for column in columns]
            table.add_row(row.label.replace("\xa0", " "), *cells, _time(here, row.method))
        tables.append(table)
    return tables


def _cell(values: dict[int, float]) -> str:
    if not values:
        return "–"
    found = summary(list(values.values()))
    return f"{found.mean:.4f}" if found.standard_error is None else f"{found.mean:.4f} ± {found.standard_error:.4f}"


def _time(records: Sequence[Record], method: str) -> str:
    costs = [record.cost for record in records if record.method == method and record.cost is not None]
    if not costs:
        return "–"
    return f"{summary([cost.seconds / max(cost.stage_one_seconds, 1e-9) for cost in costs]).mean:.2f}"


def _claims_table(claims: Sequence[Claim]) -> Table:
    table = Table("claim", "verdict", "evidence", title="The paper's claims", show_lines=True)
    for claim in claims:
        table.add_row(claim.text, claim.verdict, "; ".join(part for part in (claim.evidence, claim.why) if part))
    return table
