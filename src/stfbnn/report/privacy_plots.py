"""ROC curves of membership inference on logarithmic axes, where an attacker who must not raise false alarms looks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stfbnn.errors import InputError
from stfbnn.privacy.figures import RESOLVING, MembershipFigures
from stfbnn.privacy.intervals import Floats, rate
from stfbnn.report.plots import BLUE, GREY, ORANGE, SKY

_COLOURS = (BLUE, ORANGE, "#009E73", "#D55E00", "#CC79A7", SKY, "#000000")
_DASHES = ("-", "--", "-.", ":")
_POINTS = 400
_BANDS_UP_TO = 4


def roc_figure(curves: Mapping[str, MembershipFigures], title: str = "") -> Figure:
    """Draw the ROC curves of several attacks, or of one attack on several methods, on log-log axes with the diagonal.

    Every corner is a pair of rates that some threshold gives, and between two of them the curve stays at the lower one: nothing
    is interpolated. A curve starts at the left edge with what it finds without any false alarm. Up to four curves have a
    pointwise band, Clopper and Pearson's given the threshold. Where a rate would be fewer than ten false alarms the ground
    is grey.

    Args:
        curves: For each name its figures, from ``stfbnn.privacy.membership_figures``.
        title: What the picture is about.

    Returns:
        A figure of its own, for ``save_figure`` or for a notebook to show.

    Raises:
        InputError: There are no curves.
    """
    if not curves:
        raise InputError("a picture of ROC curves needs at least one; none was given")
    figure = Figure(figsize=(5.6, 5.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edge = 0.5 / max(one.non_members for one in curves.values())
    unresolved = min(1.0, RESOLVING / min(one.non_members for one in curves.values()))
    axes.axvspan(edge, unresolved, color=GREY, alpha=0.08, linewidth=0)
    axes.plot([edge, 1], [edge, 1], color=GREY, linestyle=(0, (1, 2)), linewidth=1.2, label="chance")
    for number, (name, one) in enumerate(curves.items()):
        colour, dashes = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
        label = f"{name}, AUC {one.auc.value:.3f}"
        if len(curves) <= _BANDS_UP_TO:
            _band(axes, one, edge, colour)
        axes.plot(
            *_steps(one, edge), drawstyle="steps-post", linewidth=1.5, color=colour, linestyle=dashes, label=label
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(edge, 1),
        ylim=(edge, 1.05),
        xlabel="false-positive rate",
        ylabel="true-positive rate",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if title:
        axes.set_title(title, fontsize=12, parse_math=False)
    legend = axes.legend(fontsize=8, frameon=False, loc="lower right")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _steps(one: MembershipFigures, edge: float) -> tuple[Floats, Floats]:
    """The corners, rates of false and of true positives; a logarithmic axis has no room for 0."""
    thin = one.roc.thinned(_POINTS)
    false, true = thin.fpr.numpy(), thin.tpr.numpy()
    # Of the points at one rate of false positives the last is the best.
    best = np.append(np.diff(false) > 0, True)
    return np.maximum(false[best], edge), np.where(true[best] > 0, true[best], np.nan)


def _band(axes: Axes, one: MembershipFigures, edge: float, colour: str) -> None:
    false, true = _steps(one, edge)
    bounds = [rate(round(share * one.members), one.members, one.confidence) for share in np.nan_to_num(true)]
    low, high = np.array([(max(bound.low, edge), max(bound.high, edge)) for bound in bounds]).T
    axes.fill_between(false, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
