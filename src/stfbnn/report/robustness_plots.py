"""Pictures of robustness: accuracy against ε and against the number of draws that an attack averages, method by method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stfbnn.report.plots import BLUE, GREY, ORANGE, SKY
from stfbnn.robustness.result import Accuracy, Robustness, objections, require_alike, show_epsilon

# Okabe and Ito's; methods differ in their marks as well, and the eighth begins anew with other dashes.
_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", SKY, "#D55E00", GREY)
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")


def robustness_figure(results: Mapping[str, Robustness], title: str = "") -> Figure:
    """Draw accuracy under the worst attack against ε, and under one attack against its draws a step where there are such.

    Bars are the intervals of the results. A method is marked † where a check of its attacks failed or its clean accuracy
    differs from the first one's by more than a point, so that its line is not to be compared with the others' as it is.

    Args:
        results: By the methods' names.
        title: What the whole picture is about.

    Returns:
        A figure of its own, for ``save_figure`` or for a notebook to show.

    Raises:
        InputError: There are no methods, or they are not of as many examples, one norm and the same values of ε.
    """
    first = require_alike(results)
    drawn = any(one.draws is not None for one in results.values())
    figure = Figure(figsize=(9.5 if drawn else 5.2, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if drawn else 1, squeeze=False)[0]
    _against_epsilon(panels[0], results, first)
    if drawn:
        _against_draws(panels[1], results)
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        # A dollar sign in a method's name is no mathematics.
        text.set_parse_math(False)
    return figure


def _against_epsilon(axes: Axes, results: Mapping[str, Robustness], first: Robustness) -> None:
    places = (0.0, *first.epsilons)
    for (name, one), style in zip(results.items(), _styles(), strict=False):
        label = f"{name} †" if objections(one, first) else name
        _line(axes, places, [one.clean, *map(one.worst, one.epsilons)], style, label)
    axes.set_title("under the worst attack", fontsize=10)
    axes.set_xticks(places, ["0", *map(show_epsilon, first.epsilons)])
    axes.set(xlabel=f"ε ({first.norm})", ylabel="accuracy")
    _tidy(axes)


def _against_draws(axes: Axes, results: Mapping[str, Robustness]) -> None:
    curves = {name: one.draws for name, one in results.items() if one.draws is not None}
    for (name, one), style in zip(results.items(), _styles(), strict=False):
        if one.draws is not None:
            _line(axes, one.draws.counts, [outcome.accuracy for outcome in one.draws.outcomes], style, name)
    # In powers of two, with the counts themselves below the marks.
    axes.set_xscale("log", base=2)
    counts = sorted({count for curve in curves.values() for count in curve.counts})
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    found = sorted({curve.epsilon for curve in curves.values()})
    attacks = sorted({outcome.attack.split(",")[0] for curve in curves.values() for outcome in curve.outcomes})
    axes.set_title(f"under {', '.join(attacks)} at ε = {', '.join(map(show_epsilon, found))}", fontsize=10)
    axes.set(xlabel="draws averaged in each step of the attack")
    _tidy(axes)


def _styles() -> Iterator[dict[str, str]]:
    """One a method, without end."""
    for dashes in itertools.cycle(_DASHES):
        for colour, mark in zip(_COLOURS, _MARKS, strict=True):
            yield {"color": colour, "marker": mark, "linestyle": dashes}


def _line(
    axes: Axes, places: Sequence[float], shares: Sequence[Accuracy], style: Mapping[str, str], label: str
) -> None:
    values = [share.value for share in shares]
    # Limits are on both sides of their share but for rounding, which matplotlib would refuse.
    below = [max(0.0, share.value - share.low) for share in shares]
    above = [max(0.0, share.high - share.value) for share in shares]
    axes.errorbar(
        places,
        values,
        yerr=[below, above],
        label=label,
        linewidth=1.4,
        markersize=4.5,
        elinewidth=0.8,
        capsize=2,
        color=style["color"],
        marker=style["marker"],
        linestyle=style["linestyle"],
    )


def _tidy(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
