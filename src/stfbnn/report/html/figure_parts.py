"""What the figures of a report have in common: their form, pairs of panels without and with temperatures, legends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stfbnn.report.html import charts
from stfbnn.report.html.charts import Curve
from stfbnn.report.html.content import Content, MethodRow, temperature_of
from stfbnn.report.html.drawing import Key, Panel, swatch
from stfbnn.report.html.measures import TableData


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: Short, for addresses and files.
        heading: What it is about.
        caption: How to read it.
        panels: The drawings.
        keys: The legend.
        numbers: What is drawn, as tables.
        parts: The fields of a record that it is drawn from.
        size: How wide its panels are shown: "small", "medium" or "wide".
        extra: Whether it is a detail that a reader asks for.
    """

    name: str
    heading: str
    caption: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...]
    numbers: tuple[TableData, ...]
    parts: tuple[str, ...]
    size: str = "medium"
    extra: bool = False


def curve_of(row: MethodRow, content: Content, xs: Sequence[float], ys: Sequence[float]) -> Curve:
    """A line as its method looks everywhere."""
    return Curve(row.method, content.style(row.method), xs, ys, row.method in content.emphasised)


def pair_of_panels(
    curves: Mapping[MethodRow, Curve],
    x_label: str,
    y_label: str,
    bounds: tuple[float, float] = (0.0, 1.0),
    every_point: bool = False,
    title: str = "",
    y_ends: Sequence[float] = (),
) -> Iterator[Panel]:
    """One panel of the methods as they are, and one of them with a predictive temperature, on the same axes."""
    values = [value for curve in curves.values() for value in curve.ys]
    for scaled in (False, True):
        part = [curve for row, curve in curves.items() if row.scaled == scaled]
        if part:
            kind = kind_title(scaled, curves)
            head = f"{title}, {kind}" if title and len({row.scaled for row in curves}) > 1 else title or kind
            yield charts.curves_panel(
                head, part, x_label, y_label, values, bounds, temperature_of(scaled, curves), every_point, y_ends
            )


def kind_title(scaled: bool, rows: Collection[MethodRow]) -> str:
    """What a panel says that it shows."""
    if not any(row.scaled for row in rows):
        return "all methods"
    return "with predictive temperature (+ τ)" if scaled else "as they are"


def legend_of(rows: Collection[MethodRow], content: Content) -> tuple[Key, ...]:
    """The legend of all methods that have a line or a point."""
    shown = {row.method for row in rows}
    methods = [method for method in content.methods if method in shown]
    return tuple(
        Key(method, swatch(content.style(method), method in content.emphasised), content.style(method))
        for method in methods
    )
