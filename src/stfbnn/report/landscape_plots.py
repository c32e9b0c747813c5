"""Pictures of a network's landscape: for each layer where its optima lie, what lies between them, and a plane through three."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stfbnn.optima.result import BARRIER, Landscape, LayerLandscape
from stfbnn.report.plots import BLUE, GREY, ORANGE

_COLOURS = "viridis"


def landscape_figure(found: Landscape, title: str = "") -> Figure:
    """Draw one row a layer: the optima in a plane, the losses along all paths, the barriers, and a slice of the loss.

    Args:
        found: From ``stfbnn.landscape``.
        title: What the whole picture is about.

    Returns:
        A figure of its own, for ``save_figure`` or for a notebook to show.
    """
    figure = Figure(figsize=(15, 3.7 * len(found.layers) + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found.layers), 4, squeeze=False)
    for layer, (places, paths, barriers, plane) in zip(found.layers, panels, strict=True):
        _places(places, layer, figure)
        _paths(paths, layer)
        _barriers(barriers, layer, figure)
        _plane(plane, layer, figure)
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)
    return figure


def _places(axes: Axes, layer: LayerLandscape, figure: Figure) -> None:
    points, losses = np.asarray(layer.embedding), [one.held_out_loss for one in layer.optima]
    norm = Normalize(min(losses), max(*losses, min(losses) + 1e-6))
    for number, (x, y) in enumerate(points):
        marker, size = ("*", 170) if number == 0 else ("o", 60)
        axes.scatter(
            x, y, s=size, marker=marker, color=colormaps[_COLOURS](norm(losses[number])), edgecolor="black", zorder=3
        )
        axes.annotate("trained" if number == 0 else str(number), (x, y), (5, 5), textcoords="offset points", fontsize=8)
    axes.set_title(f"{layer.place or 'layer'}: {layer.layer or 'the model'}", fontsize=10, parse_math=False)
    kind = "total variation" if layer.pairs[0].total_variation is not None else "distance"
    axes.set(xlabel=f"optima by {kind} ({layer.explained:.0%} kept)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    _tidy(axes)
    figure.colorbar(ScalarMappable(norm, _COLOURS), ax=axes, label="held-out loss (nats)", shrink=0.85)


def _paths(axes: Axes, layer: LayerLandscape) -> None:
    for place, pair in enumerate(layer.pairs):
        axes.plot(
            pair.line.positions,
            pair.line.losses,
            color=BLUE,
            linewidth=0.9,
            alpha=0.7,
            label="straight line" if place == 0 else None,
        )
        if pair.curve is not None:
            axes.plot(
                pair.curve.positions,
                pair.curve.losses,
                color=ORANGE,
                linewidth=0.9,
                linestyle="--",
                alpha=0.8,
                label="fitted curve" if place == 0 else None,
            )
    axes.set_title("between every two optima", fontsize=10)
    axes.set(xlabel="position on the path", ylabel="training loss (nats)", xlim=(0, 1))
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _barriers(axes: Axes, layer: LayerLandscape, figure: Figure) -> None:
    """Straight lines' barriers above the diagonal, those of curves below it."""
    count = len(layer.optima)
    matrix = np.full((count, count), np.nan)
    for pair in layer.pairs:
        matrix[pair.first, pair.second] = pair.line.barrier
        if pair.curve is not None:
            matrix[pair.second, pair.first] = pair.curve.barrier
    image = axes.imshow(matrix, cmap="magma_r", vmin=0, vmax=max(BARRIER, float(np.nanmax(matrix))))
    names = ["t", *map(str, range(1, count))]
    axes.set_xticks(range(count), names, fontsize=8)
    axes.set_yticks(range(count), names, fontsize=8)
    curves = any(pair.curve is not None for pair in layer.pairs)
    axes.set_title("barriers: lines above, curves below" if curves else "barriers on lines", fontsize=10)
    figure.colorbar(image, ax=axes, label="barrier (nats)", shrink=0.85)


def _plane(axes: Axes, layer: LayerLandscape, figure: Figure) -> None:
    if layer.plane is None:
        axes.set_axis_off()
        return
    losses = np.asarray(layer.plane.losses, dtype=float)
    finite = losses[np.isfinite(losses)]
    low, high = float(finite.min()), float(finite.max())
    # Losses grow by orders of magnitude away from the optima; negative ones, of densities, have no logarithm.
    spaced = np.geomspace if low > 0 else np.linspace
    levels = spaced(low, max(high, low + 1e-9), 18)
    norm = LogNorm(levels[0], levels[-1]) if low > 0 else Normalize(levels[0], levels[-1])
    shown = np.where(np.isfinite(losses), losses, high)
    image = axes.contourf(layer.plane.xs, layer.plane.ys, shown, levels=levels, cmap=_COLOURS, norm=norm)
    for number, (x, y) in zip(layer.plane_optima, layer.plane.corners, strict=True):
        axes.plot(x, y, marker="*" if number == 0 else "o", color="white", markeredgecolor="black", markersize=9)
        axes.annotate(
            "trained" if number == 0 else str(number),
            (x, y),
            (6, 6),
            textcoords="offset points",
            fontsize=8,
            color="white",
        )
    axes.set_title("training loss on the plane through three", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8, color=GREY)
    figure.colorbar(image, ax=axes, label="nats", shrink=0.85, format="%.3g")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
