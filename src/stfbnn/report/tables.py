"""Methods side by side: rows are methods, columns are figures, the best of each column is marked.

One table, three forms: for a terminal, for a document, for a file that another program reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from stfbnn.errors import InputError

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
        key: The figure's name in the data.
        title: What the column's head says; an arrow or a target is added to it.
        best: "higher", "lower", a number that the best value is nearest to, or None to mark none.
        digits: Decimal places; 0 for counts.

    Raises:
        InputError: ``best`` is another word.
    """

    key: str
    title: str
    best: str | float | None = None
    digits: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.best, str) and self.best not in ("higher", "lower"):
            raise InputError(f"best must be 'higher', 'lower', a number or None, but it is {self.best!r}")

    @property
    def head(self) -> str:
        """The title with what is good: an arrow up or down, or the target."""
        if self.best is None:
            return self.title
        if isinstance(self.best, str):
            return f"{self.title} {'↑' if self.best == 'higher' else '↓'}"
        return f"{self.title} → {self.best:g}"

    def show(self, value: float | None) -> str:
        """Write a value with the column's decimal places; an absent or undefined one as a dash."""
        if value is None or math.isnan(value):
            return ABSENT
        return f"{value:,.{self.digits}f}"

    def distance(self, value: float) -> float:
        """How far a value is from the best possible, in an order where lower is better; for a column with one."""
        if isinstance(self.best, int | float):
            return abs(value - self.best)
        return -value if self.best == "higher" else value


_KNOWN = {
    column.key: column
    for column in (
        Column("count", "examples", None, 0),
        Column("accuracy", "accuracy", "higher"),
        Column("nll", "NLL", "lower"),
        Column("brier", "Brier", "lower"),
        Column("ece", "ECE", "lower"),
        Column("adaptive_ece", "adaptive ECE", "lower"),
        Column("classwise_ece", "classwise ECE", "lower"),
        Column("rmse", "RMSE", "lower"),
        Column("mean_log_density", "log density", "higher"),
        Column("crps", "CRPS", "lower"),
        Column("sharpness", "sharpness"),
        Column("coverage_50", "coverage 50 %", 0.5, 3),
        Column("coverage_90", "coverage 90 %", 0.9, 3),
        Column("coverage_95", "coverage 95 %", 0.95, 3),
        Column("auroc", "AUROC", "higher"),
        Column("aupr", "AUPR", "higher"),
        Column("fpr_at_95_tpr", "FPR at 95 % TPR", "lower"),
    )
}


@dataclass(frozen=True)
class Comparison:
    """Figures of several methods, made by :func:`compare`.

    Attributes:
        title: What the table is about; may be empty.
        columns: The figures, in order.
        rows: For each method its figures by name; one that a method lacks is absent or None.
    """

    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[str, float | None]]

    def best(self, column: Column) -> frozenset[str]:
        """The methods that are best in a column.

        Values that look equal in the table are all marked. Nothing is marked in a column without an order, or
        where fewer than two methods have a value.

        Args:
            column: One of ``columns``.
        """
        values = {method: figures.get(column.key) for method, figures in self.rows.items()}
        present = {method: value for method, value in values.items() if value is not None and not math.isnan(value)}
        if column.best is None or len(present) < 2:
            return frozenset()
        shown = {
            method: column.distance(round(value, column.digits) if math.isfinite(value) else value)
            for method, value in present.items()
        }
        least = min(shown.values())
        # Rounded distances of equal values may differ in their last bit.
        return frozenset(
            method
            for method, distance in shown.items()
            if distance == least or math.isclose(distance, least, rel_tol=0, abs_tol=1e-12)
        )

    def table(self) -> Table:
        """The table for a terminal; the best of a column is bold and starred, as not every terminal shows bold."""
        starred = any(self.best(column) for column in self.columns)
        table = Table(
            title=Text(self.title) if self.title else None, caption="* best in its column" if starred else None
        )
        table.add_column("method", no_wrap=True)
        for column in self.columns:
            table.add_column(column.head, justify="right")
        best = [self.best(column) for column in self.columns]
        for method, figures in self.rows.items():
            cells = [
                Text(f"{column.show(figures.get(column.key))}*", style="bold")
                if method in marked
                # The blank keeps the decimal points of a column below each other.
                else Text(f"{column.show(figures.get(column.key))} ")
                for column, marked in zip(self.columns, best, strict=True)
            ]
            # Text and not str, so that a name in brackets is not read as markup.
            table.add_row(Text(method), *cells)
        return table

    def markdown(self) -> str:
        """The table as GitHub markdown, the best of a column in bold, ending with a line break."""
        heads = ["method", *(column.head for column in self.columns)]
        best = [self.best(column) for column in self.columns]
        lines = [f"**{_plain(self.title)}**", ""] if self.title else []
        lines += [_line(heads), _line(["---", *("---:" for _ in self.columns)])]
        for method, figures in self.rows.items():
            cells = [
                f"**{column.show(figures.get(column.key))}**"
                if method in marked
                else column.show(figures.get(column.key))
                for column, marked in zip(self.columns, best, strict=True)
            ]
            lines.append(_line([method, *cells]))
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The unrounded figures for JSON, which has no NaN and no infinity: such values are given as text."""
        return {
            "title": self.title,
            "columns": [asdict(column) for column in self.columns],
            "rows": {
                method: {column.key: _json_number(figures.get(column.key)) for column in self.columns}
                for method, figures in self.rows.items()
            },
            "best": {column.key: sorted(self.best(column)) for column in self.columns},
        }


def compare(rows: Mapping[str, Any], columns: tuple[Column, ...] | None = None, title: str = "") -> Comparison:
    """Put the figures of several methods into one table.

    Args:
        rows: For each method its figures: one of the metrics dataclasses of :mod:`stfbnn.evaluation`, or a mapping
            of names to numbers (None where a method has no such figure).
        columns: Which figures, in which order; None for all, in the order met. Known figures have their usual
            titles and directions, others are shown under their own name and without a mark.
        title: What the table is about.

    Returns:
        The table.

    Raises:
        InputError: There are no methods, figures are not numbers, or no method has a named column.
    """
    if not rows:
        raise InputError("a table needs at least one method; rows is empty")
    figures = {str(method): _figures(str(method), value) for method, value in rows.items()}
    met = list(dict.fromkeys(key for row in figures.values() for key in row))
    if columns is None:
        columns = tuple(_KNOWN.get(key, Column(key, key.replace("_", " "))) for key in met)
    for column in columns:
        if column.key not in met:
            raise InputError(f"no method has the figure {column.key!r}; those given have {', '.join(met) or 'none'}")
    return Comparison(title, columns, figures)


def known_column(key: str) -> Column:
    """The usual column of a figure of :mod:`stfbnn.evaluation`, for a table with chosen columns.

    Args:
        key: The figure's name, such as "ece".

    Raises:
        InputError: The figure is not known.
    """
    if key not in _KNOWN:
        raise InputError(f"unknown figure {key!r}; known are {', '.join(_KNOWN)}")
    return _KNOWN[key]


def _figures(method: str, value: Any) -> dict[str, float | None]:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if not isinstance(value, Mapping):
        raise InputError(
            f"the figures of {method!r} must be a metrics dataclass or a mapping, but are a {type(value).__name__}"
        )
    figures: dict[str, float | None] = {}
    for key, figure in value.items():
        try:
            figures[str(key)] = None if figure is None else float(figure)
        except (TypeError, ValueError) as error:
            raise InputError(f"figure {key!r} of {method!r} must be a number or None, but is {figure!r}") from error
    return figures


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
