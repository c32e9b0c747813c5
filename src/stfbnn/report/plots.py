"""Pictures of calibration and of uncertainty, without a display and without touching matplotlib's global state.

Colours are those of Okabe and Ito, which people with any common colour blindness can tell apart; what differs in
colour differs in form or in lightness too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from stfbnn.errors import InputError
from stfbnn.evaluation.calibration import ReliabilityCurve
from stfbnn.evaluation.checks import ArrayLike, as_finite
from stfbnn.evaluation.ood import auroc
from stfbnn.files import atomic_path

BLUE, SKY, ORANGE, GREY = "#0072B2", "#56B4E9", "#E69F00", "#666666"
_ACROSS = 4
_FORMATS = ("png", "pdf", "svg")


def reliability_diagram(curves: Mapping[str, ReliabilityCurve], title: str = "") -> Figure:
    """Draw the reliability diagrams of several methods side by side, each over the histogram of its confidences.

    Args:
        curves: For each method its curve, from :func:`stfbnn.evaluation.reliability_curve`.
        title: What the whole picture is about.

    Returns:
        A figure of its own, for :func:`save_figure` or for a notebook to show.

    Raises:
        InputError: There are no methods.
    """
    figure, down, across = _canvas(len(curves), height=3.9)
    grid = figure.add_gridspec(2 * down, across, height_ratios=[3, 1] * down)
    tallest = max(max(curve.counts) / sum(curve.counts) for curve in curves.values())
    for place, (method, curve) in enumerate(curves.items()):
        row, column = divmod(place, across)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
        _reliability(upper, curve)
        _histogram(lower, curve, 1.05 * tallest)
        _head(upper, f"{method}\nECE {100 * curve.ece:.2f} %")
        if column == 0:
            upper.set_ylabel("accuracy")
            lower.set_ylabel("share of\nexamples")
    _finish(figure, title)
    return figure


def uncertainty_histogram(
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str = "",
    label: str = "predictive entropy (nats)",
    bins: int = 40,
) -> Figure:
    """Draw how a score is spread over ordinary and over strange examples, one panel a method.

    All panels share their axes, so that methods can be compared by eye.

    Args:
        scores: For each method the scores of in-distribution and of out-of-distribution examples, each one
            dimension and finite; higher means stranger.
        title: What the whole picture is about.
        label: What the score is, with its unit.
        bins: Bins of the histograms, over the range of all scores.

    Returns:
        A figure of its own.

    Raises:
        InputError: There are no methods, or scores are empty, not one-dimensional or not finite.
    """
    figure, down, across = _canvas(len(scores), height=2.8)
    checked = {
        method: (as_finite(inside, f"{method}: scores inside"), as_finite(outside, f"{method}: scores outside"))
        for method, (inside, outside) in scores.items()
    }
    areas = {method: auroc(*pair) for method, pair in checked.items()}
    low = min(float(part.min()) for pair in checked.values() for part in pair)
    high = max(float(part.max()) for pair in checked.values() for part in pair)
    # Scores that are all equal still need a bin with a width.
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = {
        method: [np.histogram(part.numpy(), edges)[0] / len(part) for part in pair] for method, pair in checked.items()
    }
    tallest = max(float(share.max()) for pair in shares.values() for share in pair)
    for place, (method, pair) in enumerate(shares.items()):
        axes = figure.add_subplot(down, across, place + 1)
        styles = ((BLUE, "in-distribution", "-"), (ORANGE, "out-of-distribution", "--"))
        for heights, (colour, name, dashes) in zip(pair, styles, strict=True):
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, linestyle=dashes, label=name)
        _head(axes, f"{method}\nAUROC {areas[method]:.3f}")
        axes.set(xlabel=label, ylim=(0, 1.08 * tallest))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if place % across == 0:
            axes.set_ylabel("share of examples")
        _tidy(axes)
    _finish(figure, title)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure to a file that appears whole or not at all.

    Args:
        figure: The figure.
        path: Where to; its ending says the format: .png, .pdf or .svg.
        dpi: Dots an inch, for .png.

    Raises:
        InputError: The ending is another.
    """
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in _FORMATS:
        raise InputError(f"cannot write a picture to {str(path)!r}: its name must end in .png, .pdf or .svg")
    # Without the date the same figures give the same file.
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=undated)


def _canvas(panels: int, height: float) -> tuple[Figure, int, int]:
    """An empty figure with room for ``panels``, and the rows and columns they take."""
    if not panels:
        raise InputError("a picture needs at least one method; none was given")
    across = min(panels, _ACROSS)
    down = -(-panels // across)
    figure = Figure(figsize=(max(3.0 * across, 4.2), height * down + 0.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, down, across


def _reliability(axes: Axes, curve: ReliabilityCurve) -> None:
    edges = np.asarray(curve.edges)
    accuracies, confidences = np.asarray(curve.accuracies), np.asarray(curve.confidences)
    filled = np.asarray(curve.counts) > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    accuracies, confidences = accuracies[filled], confidences[filled]
    axes.bar(left, accuracies, width, align="edge", color=BLUE, edgecolor="white", linewidth=0.6, label="accuracy")
    for gap, bottom, colour, hatch, name in (
        (confidences - accuracies, accuracies, ORANGE, "///", "overconfident by"),
        (accuracies - confidences, confidences, SKY, "...", "underconfident by"),
    ):
        axes.bar(
            left,
            np.where(gap > 0, gap, np.nan),  # a bar of no height would still draw its edge
            width,
            bottom=bottom,
            align="edge",
            facecolor=_pale(colour),
            edgecolor=colour,
            hatch=hatch,
            linewidth=0.6,
            label=name,
        )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="perfect")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)
    _tidy(axes)


def _histogram(axes: Axes, curve: ReliabilityCurve, top: float) -> None:
    edges, counts = np.asarray(curve.edges), np.asarray(curve.counts)
    shares = counts / counts.sum()
    axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=GREY, edgecolor="white", linewidth=0.6)
    axes.set(xlabel="confidence", ylim=(0, top))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _tidy(axes)


def _pale(colour: str) -> tuple[float, float, float]:
    """The colour mixed half and half with white: opaque, so that what lies below does not change it."""
    red, green, blue = to_rgb(colour)
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2


def _head(axes: Axes, text: str) -> None:
    # A dollar sign in a method's name is no mathematics.
    axes.set_title(text, fontsize=10, parse_math=False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _finish(figure: Figure, title: str) -> None:
    """The title above and one legend below all panels, where it hides nothing."""
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    across = 2 if len(figure.axes) <= 2 else len(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
