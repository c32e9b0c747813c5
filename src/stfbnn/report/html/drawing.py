"""The small pieces that charts are drawn of: safe text, scales, axes, markers, panels.

Colours are classes and never values: ``palette.css`` gives them for light and for dark pages. What differs in colour differs
in marker and in dashes too.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COLOURS = 8
SCALED = " +\u00a0τ"
"""What the name of a method with a predictive temperature ends with; the sign and the letter stay on one line."""

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2", "12 4", "1 2")
# Characters that no XML may hold, and those that turn the direction of what follows them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
# Mean width of a character of the page's font, in its size.
_CHARACTER = 0.56


@dataclass(frozen=True)
class Panel:
    """A drawing with axes of its own.

    Attributes:
        title: Said of it to those who do not see it, and shown above it.
        summary: What is to be seen, in words.
        width: In units of the drawing.
        height: In the same.
        body: The marks, as SVG.
        scaled: Whether it is of predictive temperatures; None where that is no question.
    """

    title: str
    summary: str
    width: float
    height: float
    body: str
    scaled: bool | None = None


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        label: What it says.
        swatch: The drawing before it, as SVG of 28 by 12 units.
        series: The place of the method that it stands for, which picking it brings out; None for none.
    """

    label: str
    swatch: str
    series: int | None = None


@dataclass(frozen=True)
class Scale:
    """From values to places on a drawing.

    Attributes:
        low: The value at ``start``.
        high: The value at ``end``.
        start: In units of the drawing.
        end: The same; smaller than ``start`` where values grow upwards.
        log: Whether equal ratios take equal lengths.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values to write at the axis."""
        return _log_ticks(self.low, self.high, about) if self.log else _ticks(self.low, self.high, about)


def linear(values: Iterable[float], start: float, end: float, include: Sequence[float] = ()) -> Scale:
    """A linear scale with a little room around the values; ``include`` are bounds that need none."""
    found = [*values, *include] or [0.0, 1.0]
    low, high = min(found), max(found)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    if low == high and low in include:
        # All at one bound, such as the risks of a classifier without errors: room on the side where values can be.
        return Scale(low, low + room, start, end) if low <= 0 else Scale(high - room, high, start, end)
    return Scale(low if low in include else low - room, high if high in include else high + room, start, end)


def logarithmic(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic scale of at least a factor of four, for positive values."""
    found = list(values) or [1.0]
    low, high = min(found) / 1.3, max(found) * 1.3
    widen = max(1.0, math.sqrt(4 * low / high))
    return Scale(low / widen, high * widen, start, end, log=True)


def safe(text: object) -> str:
    """Text for HTML and SVG, attributes included: markup is shown and not obeyed, forbidden characters are replaced."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)), quote=True)


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def fit(text: str, width: float, size: float) -> str:
    """Shorten a text to a width, in units of the drawing, but for the mark of a predictive temperature; not escaped yet."""
    room = max(1, int(width / (size * _CHARACTER)))
    if len(text) <= room:
        return text
    ending = SCALED if text.endswith(SCALED) else ""
    return f"{text[: max(1, room - 1 - len(ending))]}…{ending}"


def write(x: float, y: float, text: str, kind: str = "label", anchor: str = "start", turn: bool = False) -> str:
    """A text; ``kind`` is its class, ``turn`` lets it run upwards."""
    turned = f' transform="rotate(-90 {number(x)} {number(y)})"' if turn else ""
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{turned}>{safe(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    """A straight line of a class."""
    return f'<line class="{kind}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle of a class."""
    return (
        f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" '
        f'height="{number(max(height, 0))}"/>'
    )


def polyline(points: Sequence[tuple[float, float]], kind: str = "line", dashes: str = "") -> str:
    """A line through points."""
    drawn = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline class="{kind}"{dashed} points="{drawn}"/>'


def marker(series: int, x: float, y: float, size: float = 3.6, kind: str = "mark") -> str:
    """The mark of a method, one of eight forms."""
    r = size
    if series % COLOURS == 0:
        return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(r)}"/>'
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -1.25 * r), (1.15 * r, 0.9 * r), (-1.15 * r, 0.9 * r)],
        3: [(0, -1.35 * r), (1.35 * r, 0), (0, 1.35 * r), (-1.35 * r, 0)],
        4: [(0, 1.25 * r), (1.15 * r, -0.9 * r), (-1.15 * r, -0.9 * r)],
        5: _star(r, 4, 0.42),
        6: [(-1.25 * r, 0), (0.9 * r, -1.15 * r), (0.9 * r, 1.15 * r)],
        7: _star(r, 5, 0.5),
    }[series % COLOURS]
    drawn = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners)
    return f'<polygon class="{kind}" points="{drawn}"/>'


def style_of(series: int, strong: bool = False) -> str:
    """The classes of a method's group; every second eight have hollow marks."""
    hollow = " hollow" if series // COLOURS % 2 else ""
    return f"series c{series % COLOURS}{hollow}{' strong' if strong else ''}"


def dashes_of(series: int, strong: bool = False) -> str:
    """The dashes of a method's lines; a strong line is whole. With the marks, no two of the first 56 methods are alike."""
    return "" if strong else _DASHES[series % len(_DASHES)]


def swatch(series: int, strong: bool = False) -> str:
    """A method's line and mark, for a legend."""
    drawn = polyline([(1, 6), (27, 6)], dashes=dashes_of(series, strong)) + marker(series, 14, 6)
    return f'<g class="{style_of(series, strong)}">{drawn}</g>'


@dataclass(frozen=True)
class Frame:
    """Two axes.

    Attributes:
        x: Values to places across.
        y: Values to places upwards.
        left: Where the grid begins; None for where the horizontal scale does.
    """

    x: Scale
    y: Scale
    left: float | None = None

    def draw(self, x_label: str, y_label: str, about: int = 5) -> str:
        """The axes, their grid, ticks and labels."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        edge = left if self.left is None else self.left
        parts = []
        for value in self.y.ticks(about):
            parts.append(line(edge, self.y(value), right, self.y(value), "grid"))
            parts.append(write(edge - 5, self.y(value) + 3.5, f"{value:g}", "tick", "end"))
        for value in self.x.ticks(about):
            parts.append(line(self.x(value), bottom, self.x(value), bottom + 4))
            parts.append(write(self.x(value), bottom + 15, f"{value:g}", "tick", "middle"))
        parts.append(line(left, bottom, right, bottom))
        parts.append(write((left + right) / 2, bottom + 30, x_label, "label", "middle"))
        if y_label:
            parts.append(write(12, (bottom + top) / 2, y_label, "label", "middle", turn=True))
        return "".join(parts)


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, for a third step of 0.1 is 0.30000000000000004.
    return [round(place * step, 12) for place in range(first, last + 1)]


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [
            factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high
        ]
        if len(found) >= 3:
            break
    every = max(1, math.ceil(len(found) / (about + 1)))
    return found[::every]


def _star(size: float, points: int, waist: float) -> list[tuple[float, float]]:
    reach = [1.45 * size * (1.0 if turn % 2 == 0 else waist) for turn in range(2 * points)]
    return [
        (radius * math.sin(math.pi * turn / points), -radius * math.cos(math.pi * turn / points))
        for turn, radius in enumerate(reach)
    ]
