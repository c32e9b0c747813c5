"""The charts of a report, drawn as SVG: numbers in, panels out. Nothing here knows records or tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stfbnn.report.html.content import Estimate, Ranking
from stfbnn.report.html.drawing import (
    Frame,
    Panel,
    Scale,
    dashes_of,
    fit,
    line,
    linear,
    logarithmic,
    marker,
    number,
    polyline,
    rect,
    safe,
    style_of,
    write,
)

# Bold letters are wider.
_TITLE = 13.6
SETS = 4
"""Foreign sets that have a line of their own kind; further ones begin again."""
_SET_DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2 1 2")


@dataclass(frozen=True)
class Curve:
    """One method's line.

    Attributes:
        label: Its name.
        series: Its place among all methods.
        xs: Across.
        ys: Upwards.
        strong: Whether it is drawn stronger.
    """

    label: str
    series: int
    xs: Sequence[float]
    ys: Sequence[float]
    strong: bool = False


@dataclass(frozen=True)
class Point:
    """One method's place in a plane.

    Attributes:
        label: Its name.
        series: Its place among all methods.
        x: Across.
        y: Upwards.
        strong: Whether it is drawn stronger.
    """

    label: str
    series: int
    x: float
    y: float
    strong: bool = False


@dataclass(frozen=True)
class Bins:
    """A reliability diagram's numbers: those of a record, pooled over seeds.

    Attributes:
        edges: Of the bins of confidence, one more than there are bins.
        confidences: Mean confidence in each bin; None where it is empty.
        accuracies: Accuracy in each bin; None where it is empty.
        counts: Examples in each bin.
    """

    edges: Sequence[float]
    confidences: Sequence[float | None]
    accuracies: Sequence[float | None]
    counts: Sequence[float]

    @property
    def gap(self) -> float:
        """Mean confidence minus accuracy over all examples: positive for the overconfident."""
        bins = zip(self.confidences, self.accuracies, self.counts, strict=True)
        gaps = [(sure - right) * count for sure, right, count in bins if sure is not None and right is not None]
        return math.fsum(gaps) / max(math.fsum(self.counts), 1.0)


def reliability_panel(label: str, bins: Bins, note: str, scaled: bool | None) -> Panel:
    """Accuracy against confidence, bin by bin, over the shares of examples in the bins."""
    width, height = 186.0, 226.0
    x, y = Scale(0, 1, 40, width - 8), Scale(0, 1, 152, 36)
    base, strip = 186.0, 24.0
    total, tallest = max(sum(bins.counts), 1.0), max(*bins.counts, 1.0)
    parts = [_head(label, width, note)]
    for value in (0, 0.5, 1):
        parts.append(line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(write(x.start - 5, y(value) + 3.5, f"{value:g}", "tick", "end"))
        parts.append(write(x(value), base + 14, f"{value:g}", "tick", "middle"))
    cells = zip(bins.edges, bins.edges[1:], bins.confidences, bins.accuracies, bins.counts, strict=False)
    for left, right, sure, accuracy, count in cells:
        wide = x(right) - x(left)
        high = strip * count / tallest
        parts.append(rect(x(left) + 0.5, base - high, wide - 1, high, "share"))
        if sure is None or accuracy is None:
            continue
        parts.append(rect(x(left) + 0.5, y(accuracy), wide - 1, y(0) - y(accuracy), "bar"))
        top, bottom = max(sure, accuracy), min(sure, accuracy)
        kind = "gap over" if sure > accuracy else "gap under"
        parts.append(rect(x(left) + 1, y(top), wide - 2, y(bottom) - y(top), kind))
    parts.append(line(x(0), y(0), x(1), y(1), "ideal"))
    parts.append(line(x.start, y(0), x.end, y(0)) + line(x.start, base, x.end, base))
    parts.append(write((x.start + x.end) / 2, base + 28, "confidence", "label", "middle"))
    parts.append(write(9, (y(0) + y(1)) / 2, "accuracy", "label", "middle", turn=True))
    parts.append(write(x.start - 5, base - 8, "share", "tick", "end"))
    most = max(range(len(bins.counts)), key=lambda place: bins.counts[place])
    side = "above" if bins.gap > 0 else "below"
    summary = (
        f"{note}. On average the confidence is {abs(bins.gap):.3f} {side} the accuracy. {bins.counts[most] / total:.0%} of "
        f"the examples are in the bin of confidences {bins.edges[most]:.2f} to {bins.edges[most + 1]:.2f}."
    )
    return Panel(f"Reliability of {label}", summary, width, height, "".join(parts), scaled)


def entropy_panel(
    label: str, edges: Sequence[float], shares: Mapping[str, Sequence[float]], highest: float, scaled: bool | None
) -> Panel:
    """How the entropy is spread over each set, as outlines; the first set is filled. All panels share ``highest``."""
    width, height = 186.0, 176.0
    frame = Frame(Scale(edges[0], edges[-1], 30, width - 8), Scale(0, highest * 1.05 or 1.0, 138, 28))
    parts = [_head(label, width), frame.draw("entropy (nats)", "", about=4)]
    means = []
    for place, (name, heights) in enumerate(shares.items()):
        corners = [(frame.x(edges[0]), frame.y(0))]
        for left, right, high in zip(edges, edges[1:], heights, strict=False):
            corners += [(frame.x(left), frame.y(high)), (frame.x(right), frame.y(high))]
        corners.append((frame.x(edges[-1]), frame.y(0)))
        filled = polyline(corners, "fill") if place == 0 else ""
        parts.append(f'<g class="set s{set_style(place)}">{filled}{polyline(corners, dashes=set_dashes(place))}</g>')
        centre = math.fsum(high * (a + b) / 2 for a, b, high in zip(edges, edges[1:], heights, strict=False))
        means.append(f"{name} {centre:.2f}")
    summary = f"Mean entropy in nats, from the bins: {', '.join(means)}."
    return Panel(f"Entropies of {label}", summary, width, height, "".join(parts), scaled)


def set_style(place: int) -> int:
    """The colour of a set of a histogram: 0 for the test data."""
    return 0 if place == 0 else 1 + (place - 1) % SETS


def set_dashes(place: int) -> str:
    """The dashes of a set of a histogram."""
    return _SET_DASHES[set_style(place)]


def curves_panel(
    title: str,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    all_values: Iterable[float],
    x_bounds: tuple[float, float] = (0.0, 1.0),
    scaled: bool | None = None,
    every_point: bool = False,
    y_ends: Sequence[float] = (),
    log_x: bool = False,
) -> Panel:
    """Lines of several methods over one another.

    Args:
        title: Of the panel.
        curves: The lines.
        x_label: What is across.
        y_label: What is upwards.
        all_values: Values that the vertical axis has room for: those of all panels that are to share it.
        x_bounds: Both ends of the horizontal axis.
        scaled: As for a panel.
        every_point: Whether each point has a mark; else four along the line have.
        y_ends: Values that the vertical axis has to hold without room beyond them.
        log_x: Whether the horizontal axis is logarithmic, a little wider than its bounds.
    """
    width, height = 360.0, 268.0
    across = logarithmic(x_bounds, 54, width - 14) if log_x else Scale(*x_bounds, 54, width - 14)
    frame = Frame(across, linear(all_values, 224, 34, y_ends))
    parts = [_head(title, width), frame.draw(x_label, y_label)]
    # The strong ones below, where the thin ones do not vanish behind them.
    for curve in sorted(curves, key=lambda one: not one.strong):
        places = [(frame.x(x), frame.y(y)) for x, y in zip(curve.xs, curve.ys, strict=True)]
        marks = range(len(places)) if every_point else _spread(places, curve.series)
        drawn = polyline(places, dashes=dashes_of(curve.series, curve.strong))
        drawn += "".join(marker(curve.series, *places[place]) for place in marks)
        parts.append(_group(curve.series, curve.strong, drawn, curve.label))
    said = [f"{curve.label} from {curve.ys[0]:.4g} to {curve.ys[-1]:.4g}" for curve in curves]
    summary = f"{y_label} against {x_label}, from {curves[0].xs[0]:g} to {curves[0].xs[-1]:g}: {'; '.join(said)}."
    return Panel(title, summary, width, height, "".join(parts), scaled)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points to which no other is at least equal in both and better in one; lower is better."""
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
    ]


def pareto_panel(
    title: str, points: Sequence[Point], x_label: str, y_label: str, all_points: Sequence[Point], scaled: bool | None
) -> Panel:
    """Cost against quality, lower is better for both; the front is joined and named.

    The horizontal axis is logarithmic; what costs nothing stands in a strip of its own at its left.

    Args:
        title: Of the panel.
        points: One a method.
        x_label: The cost.
        y_label: The quality.
        all_points: Those of all panels that are to share the axes.
        scaled: As for a panel.
    """
    width, height = 360.0, 290.0
    left, free = 54.0, any(point.x <= 0 for point in all_points)
    start = left + 44 if free else left
    x = logarithmic((point.x for point in all_points if point.x > 0), start, width - 14)
    frame = Frame(x, linear((point.y for point in all_points), 246, 34), left)

    def place(point: Point) -> tuple[float, float]:
        return (x(point.x) if point.x > 0 else left + 18, frame.y(point.y))

    parts = [_head(title, width), frame.draw(x_label, y_label)]
    if free:
        parts.append(line(left, 246, left + 36, 246) + write(left + 18, 261, "0", "tick", "middle"))
        parts.append(line(left + 40, 34, left + 40, 246, "break"))
    front = sorted((points[index] for index in pareto_front([(one.x, one.y) for one in points])), key=lambda one: one.x)
    steps: list[tuple[float, float]] = []
    for point in front:
        across, up = place(point)
        steps += [(across, steps[-1][1]), (across, up)] if steps else [(across, up)]
    parts.append(polyline(steps, "front"))
    for point in sorted(points, key=lambda one: one.strong):
        across, up = place(point)
        ring = f'<circle class="ring" cx="{number(across)}" cy="{number(up)}" r="8"/>' if point in front else ""
        text = f"{point.label}: {point.x:.3g}, {point.y:.4f}"
        parts.append(_group(point.series, point.strong, ring + marker(point.series, across, up, 4.4), text))
    others = sorted((point for point in points if point not in front), key=lambda one: not one.strong)
    named_points = [*front, *others]
    parts.append(_names([point.label for point in named_points], [place(point) for point in named_points], width))
    named = "; ".join(f"{point.label} at {point.x:.3g}, {point.y:.4f}" for point in front)
    summary = f"{y_label} against {x_label}. On the front, where nothing is both cheaper and better: {named}."
    return Panel(title, summary, width, height, "".join(parts), scaled)


def abstention_panel(
    title: str,
    rows: Sequence[tuple[str, int, Estimate | None]],
    x_label: str,
    targets: Sequence[float | None],
    scaled: bool | None,
    bounds: tuple[float, ...],
) -> Panel:
    """One dot a method with its standard error, and the target as a bar across where there is one.

    Args:
        title: Of the panel.
        rows: Label, place among all methods and figure of each method; None where it has none.
        x_label: The figure.
        targets: What each was to stay below; None for no such thing.
        scaled: As for a panel.
        bounds: Values that the axis has to hold without room beyond them.
    """
    width, step, top = 360.0, 20.0, 34.0
    base = top + step * len(rows) + 4
    values = [value for _, _, found in rows if found for value in _reach(found)] + [
        one for one in targets if one is not None
    ]
    x = linear(values, 140, width - 16, include=bounds)
    parts = [_head(title, width)]
    for value in x.ticks(4):
        parts.append(line(x(value), top, x(value), base, "grid"))
        parts.append(write(x(value), base + 15, f"{value:g}", "tick", "middle"))
    said = []
    for place, ((label, series, found), target) in enumerate(zip(rows, targets, strict=True)):
        middle = top + step * (place + 0.5)
        parts.append(write(128, middle + 4, fit(label, 124, 11), "name", "end"))
        if target is not None:
            parts.append(line(x(target), middle - step / 2, x(target), middle + step / 2, "target"))
        if found is None:
            parts.append(write(148, middle + 4, "no valid threshold", "tick"))
            said.append(f"{label} none")
            continue
        low, high = _reach(found)
        drawn = line(x(low), middle, x(high), middle, "line") + marker(series, x(found.mean), middle, 4.2)
        parts.append(_group(series, False, drawn, f"{label}: {found.mean:.4f}"))
        said.append(f"{label} {found.mean:.4f}")
    parts.append(line(x.start, base, x.end, base) + write((x.start + x.end) / 2, base + 31, x_label, "label", "middle"))
    aims = sorted({one for one in targets if one is not None})
    goal = f" The target is {', '.join(f'{one:g}' for one in aims)}." if aims else ""
    return Panel(title, f"{x_label}: {'; '.join(said)}.{goal}", width, base + 40, "".join(parts), scaled)


def critical_difference_panel(ranking: Ranking) -> Panel:
    """Average ranks on an axis; bars join methods among which no difference is significant (Demšar, 2006)."""
    ordered = sorted(ranking.average_ranks.items(), key=lambda one: one[1])
    half = math.ceil(len(ordered) / 2)
    width, left, right = 700.0, 206.0, 494.0
    x = Scale(1, max(math.ceil(ordered[-1][1]), 2), left, right)
    axis = 66.0
    # A clique of one joins nothing.
    ranks = [sorted(ranking.average_ranks[name] for name in clique) for clique in ranking.cliques if len(clique) > 1]
    bars = sorted((found[0], found[-1]) for found in ranks)
    first = axis + 20 + 8 * len(bars)
    parts = [_head(f"Average rank by {ranking.metric}", width), line(left, axis, right, axis)]
    for rank in map(float, range(1, int(x.high) + 1)):
        parts.append(line(x(rank), axis - 5, x(rank), axis))
        parts.append(write(x(rank), axis - 9, f"{rank:g}", "tick", "middle"))
    if ranking.critical_difference is not None:
        end, furthest = x(1 + ranking.critical_difference), width - 10
        parts.append(line(left, 36, min(end, furthest), 36, "bracket") + line(left, 32, left, 40, "bracket"))
        # One that is longer than the drawing has no end.
        parts.append(line(end, 32, end, 40, "bracket") if end <= furthest else "")
        parts.append(write(left - 10, 40, f"critical difference {ranking.critical_difference:.2f}", "tick", "end"))
    for place, (low, high) in enumerate(bars):
        parts.append(line(x(low) - 4, axis + 10 + 8 * place, x(high) + 4, axis + 10 + 8 * place, "clique"))
    for place, (name, rank) in enumerate(ordered):
        at_left = place < half
        depth = first + 20 * (place if at_left else len(ordered) - 1 - place)
        side = left - 14 if at_left else right + 14
        corner = [(x(rank), axis), (x(rank), depth), (side, depth)]
        parts.append(
            polyline(corner, "elbow") + f'<circle class="dot" cx="{number(x(rank))}" cy="{number(axis)}" r="3"/>'
        )
        text = f"{fit(name, 155, 11)}  {rank:.2f}"
        parts.append(write(side - 5 if at_left else side + 5, depth + 4, text, "name", "end" if at_left else "start"))
    said = "; ".join(f"{name} {rank:.2f}" for name, rank in ordered)
    joined = "; ".join(", ".join(sorted(clique)) for clique in ranking.cliques if len(clique) > 1) or "none"
    summary = f"Average ranks over {over(ranking.tasks)}: {said}. Groups without a significant difference: {joined}."
    return Panel(f"Average rank by {ranking.metric}", summary, width, first + 20 * half, "".join(parts))


def over(tasks: int) -> str:
    """How many tasks something is averaged over."""
    return f"{tasks} task{'' if tasks == 1 else 's'}"


def _head(text: str, width: float, note: str = "") -> str:
    below = write(4, 28, note, "tick") if note else ""
    return write(4, 14, fit(text, width - 6, _TITLE), "title") + below


def _group(series: int, strong: bool, drawn: str, label: str) -> str:
    return f'<g class="{style_of(series, strong)}" data-series="{series}"><title>{safe(label)}</title>{drawn}</g>'


def _spread(places: Sequence[object], series: int) -> list[int]:
    """Four places along a line, elsewhere for each method, so that marks of near lines do not hide one another."""
    count = len(places)
    return sorted({min(count - 1, int(count * (quarter + (0.2 + 0.11 * series) % 1) / 4)) for quarter in range(4)})


def _reach(found: Estimate) -> tuple[float, float]:
    error = found.error or 0.0
    return found.mean - error, found.mean + error


def _names(labels: Sequence[str], places: Sequence[tuple[float, float]], width: float) -> str:
    """The names of points, each beside its own.

    A name is left out where it would lie on others, or could be taken for that of a near point; the legend has them all.
    """
    taken = [(across - 8, across + 8, up + 4, 12.0) for across, up in places]
    parts = []
    for label, (across, up) in zip(labels, places, strict=True):
        if sum(math.hypot(across - a, up - b) < 16 for a, b in places) > 1:
            continue
        text = fit(label, 130, 11)
        wide = 6.2 * len(text)
        # Starts of the text, with the anchors that lead there.
        sides = ((across + 11, across + 11, "start"), (across - 11 - wide, across - 11, "end"))
        spots = [(*side, up + drop) for drop in (4, -9, 17) for side in sides]
        for start, x, anchor, level in spots:
            inside = start > 2 and start + wide < width and 44 <= level <= 242
            if inside and all(
                start + wide < a or start > b or abs(level - other) > reach for a, b, other, reach in taken
            ):
                taken.append((start, start + wide, level, 12.0))
                parts.append(write(x, level, text, "name", anchor))
                break
    return "".join(parts)
