"""The picture of confidence against the distance from the data, with its limit as a line."""

from __future__ import annotations

import statistics

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stfbnn.errors import InputError
from stfbnn.guarantees.far_field_result import ConfidenceAlong, FarField
from stfbnn.report.plots import BLUE, GREY, ORANGE


def far_field_figure(measured: ConfidenceAlong, limits: FarField, title: str = "") -> Figure:
    """Draw measured confidence against distance, for the averaged predictive and for the trained network.

    Lines are means over the directions, bands go from their 10 % to their 90 % quantile. The dashed line is the mean of the
    limits of the same directions, the dotted one the mean of their bounds.

    Args:
        measured: From ``confidence_along``.
        limits: From ``far_field`` with the same directions; random ones among them are left out.
        title: What the picture is about.

    Returns:
        A figure of its own, for ``save_figure`` or for a notebook to show.

    Raises:
        InputError: They are not of as many directions.
    """
    directions = limits.of("data")
    if len(directions) != len(measured.averaged):
        raise InputError(
            f"there are limits of {len(directions)} directions and confidences along {len(measured.averaged)}; give the same "
            f"directions to far_field and to confidence_along"
        )
    figure = Figure(figsize=(6.0, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _curve(axes, measured.distances, measured.trained, ORANGE, "s", "trained network")
    _curve(axes, measured.distances, measured.averaged, BLUE, "o", f"averaged over {measured.samples} draws")
    limit = statistics.fmean(one.limit for one in directions)
    bound = statistics.fmean(one.bound for one in directions)
    axes.axhline(limit, color=BLUE, linestyle="--", linewidth=1.2, label=f"its limit, {limit:.3f}")
    axes.axhline(bound, color=GREY, linestyle=":", linewidth=1.2, label=f"bound of the limit, {bound:.3f}")
    positive = [distance for distance in measured.distances if distance > 0]
    if positive:
        # Linear up to the first distance, so that the origin has a place.
        axes.set_xscale("symlog", linthresh=positive[0])
    if len(measured.distances) > 1:
        # Distances are not negative, as matplotlib would think of this scale.
        axes.set_xlim(measured.distances[0], measured.distances[-1])
    axes.set(xlabel="distance (Euclidean, of normalised inputs)", ylabel="confidence", ylim=(0, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if title:
        axes.set_title(title, fontsize=12, parse_math=False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _curve(
    axes: Axes,
    distances: tuple[float, ...],
    confidences: tuple[tuple[float, ...], ...],
    colour: str,
    mark: str,
    label: str,
) -> None:
    values = np.asarray(confidences, dtype=np.float64)
    low, high = np.quantile(values, (0.1, 0.9), axis=0)
    axes.fill_between(distances, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(distances, values.mean(axis=0), color=colour, marker=mark, markersize=4, linewidth=1.5, label=label)
