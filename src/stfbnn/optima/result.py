"""What a study of a network's layers found: optima, what lies between them, and what that says in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from stfbnn.files import plain
from stfbnn.optima.pairs import Pair
from stfbnn.optima.plane import PlaneSlice
from stfbnn.optima.retraining import Optimum

BARRIER = 0.02
"""Nats an example: two optima whose barrier is lower are in one basin (a likelihood 2 % lower, in the geometric mean)."""

SAME = 0.02
"""Two optima whose predictive distributions differ by less total variation, on average, are one function."""


# Whether the first layer, and whether the last one, has several disparate optima.
_CONTRASTS = {
    (True, False): "As the paper says: the first layer has several disparate optima here, and the last one has not.",
    (True, True): "The first layer has several disparate optima here, as the paper says, but so has the last one.",
    (
        False,
        False,
    ): "Unlike what the paper says: the first layer has not several disparate optima here, and neither has the last.",
    (
        False,
        True,
    ): "Unlike what the paper says: not the first layer has several disparate optima here, but the last one.",
}


@dataclass(frozen=True)
class LayerLandscape:
    """The optima of one layer.

    Attributes:
        layer: The layer's name.
        kind: Its class.
        place: "first", "middle", "last", or "" where it was named by the user.
        parameters: How many weights it has.
        optima: The trained weights first, then those that were found, in the order of their draws.
        pairs: Every two of them.
        embedding: Their places in a plane, by the total variation of their predictions, or where there is none by their
            distances; (x, y) for each.
        explained: Share of the squared distances that the plane keeps.
        plane: The training loss on the plane through the trained weights and two others; None where it was not asked for.
        plane_optima: Which three those are.
        seconds: Wall time of the retraining.
        execution: How the runs were computed.
    """

    layer: str
    kind: str
    place: str
    parameters: int
    optima: tuple[Optimum, ...]
    pairs: tuple[Pair, ...]
    embedding: tuple[tuple[float, float], ...]
    explained: float
    plane: PlaneSlice | None
    plane_optima: tuple[int, ...]
    seconds: float
    execution: str

    @property
    def found(self) -> tuple[Optimum, ...]:
        """The optima without the trained weights."""
        return self.optima[1:]

    @property
    def basins(self) -> list[list[int]]:
        """Numbers of the optima (0 for the trained weights) that straight lines without a barrier join, the largest first."""
        return _components(len(self.optima), [pair for pair in self.pairs if pair.line.barrier < BARRIER])

    @property
    def joined(self) -> list[list[int]]:
        """The same with curves, where those were fitted."""
        low = [pair for pair in self.pairs if min(_barriers(pair)) < BARRIER]
        return _components(len(self.optima), low)

    @property
    def functions(self) -> list[list[int]]:
        """Numbers of the optima that predict alike; where nothing says how alike, every basin is one."""
        known = [pair for pair in self.pairs if pair.total_variation is not None]
        if not known:
            return self.basins
        return _components(len(self.optima), [pair for pair in known if (pair.total_variation or 0.0) < SAME])

    @property
    def are_disparate(self) -> bool:
        """Whether there are several optima in the paper's sense: apart on straight lines, and different functions."""
        return len(self.basins) > 1 and len(self.functions) > 1

    def verdict(self) -> str:
        """What was found, in words with the numbers that carry it."""
        count = len(self.optima)
        lines, curves = (
            [pair.line.barrier for pair in self.pairs],
            [pair.curve.barrier for pair in self.pairs if pair.curve is not None],
        )
        said = f"{_name(self)}: {count - 1} retrained optima beside the trained weights. "
        basins, functions = len(self.basins), len(self.functions)
        said += f"{_counted(basins, 'basin').capitalize()} and {_counted(functions, 'function')}"
        if self.are_disparate:
            said += ": several disparate optima"
        said += f"; barriers on straight lines {_range(lines)} nats"
        if curves:
            said += f", on fitted curves {_range(curves)} ({_joined(self.joined, count)})"
        differ = [pair.disagreement for pair in self.pairs if pair.disagreement is not None]
        if differ:
            said += f"; {_range(differ, '.1%')} of the labels differ"
        away = [pair.relative_distance for pair in self.pairs]
        said += f"; relative distances {_range(away)}. {self._quality()}"
        return said

    def _quality(self) -> str:
        """How the optima do beside the trained weights."""
        trained, losses = self.optima[0].held_out_loss, [one.held_out_loss for one in self.found]
        better = sum(loss <= trained for loss in losses)
        said = f"Their held-out losses are {_range(losses)}, the trained weights' {trained:.3f} ({better} are no worse)"
        unfinished = sum(not one.converged for one in self.found)
        return said + (f"; {unfinished} had not converged." if unfinished else ".")

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A line for each optimum, as `Landscape.table` shows them."""
        for number, one in enumerate(self.optima):
            others = [pair for pair in self.pairs if number in (pair.first, pair.second)]
            yield (
                "trained" if number == 0 else str(number),
                f"{one.train_loss:.4f}",
                f"{one.held_out_loss:.4f}",
                "" if one.held_out_accuracy is None else f"{one.held_out_accuracy:.4f}",
                _mean([pair.relative_distance for pair in others]),
                _mean([pair.line.barrier for pair in others]),
                _mean([pair.curve.barrier for pair in others if pair.curve is not None]),
                _mean([pair.disagreement for pair in others if pair.disagreement is not None]),
            )


@dataclass(frozen=True)
class Landscape:
    """The optima of several layers of one network.

    Attributes:
        layers: In execution order.
        settings: What was asked for.
    """

    layers: tuple[LayerLandscape, ...]
    settings: dict[str, Any]

    def verdict(self) -> str:
        """What was found in each layer, and whether the first one is special."""
        lines = [layer.verdict() for layer in self.layers]
        by_place = {layer.place: layer for layer in self.layers}
        first, last = by_place.get("first"), by_place.get("last")
        if first is not None and last is not None:
            lines.append(_CONTRASTS[first.are_disparate, last.are_disparate])
        return "\n".join(lines)

    def tables(self) -> tuple[Table, ...]:
        """One table a layer, for a terminal; figures of pairs are averaged over an optimum's pairs.

        Losses on training and held-out examples, the share of right labels among these, relative distance, barriers on straight
        lines and on curves, and the share of labels that are told differently.
        """
        tables = []
        for layer in self.layers:
            table = Table(title=_name(layer), title_justify="left")
            heads = ("", "train", "held", "right", "dist.", "line", "curve", "differs")
            for head in heads:
                table.add_column(head, justify="right" if head else "left", no_wrap=True)
            for row in layer.rows():
                table.add_row(*row)
            tables.append(table)
        return tuple(tables)

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON; the weights themselves are left out."""
        layers = []
        for layer in self.layers:
            content = asdict(layer)
            for one in content["optima"]:
                del one["weights"]
            layers.append({**content, "basins": layer.basins, "functions": layer.functions, "verdict": layer.verdict()})
        return {"settings": self.settings, "layers": [plain(layer) for layer in layers], "verdict": self.verdict()}


def _name(layer: LayerLandscape) -> str:
    where = f"{layer.place} layer " if layer.place else "layer "
    return f"{where}{layer.layer or '(the model itself)'} ({layer.kind}, {layer.parameters:,} weights)"


def _barriers(pair: Pair) -> tuple[float, ...]:
    return (pair.line.barrier,) if pair.curve is None else (pair.line.barrier, pair.curve.barrier)


def _joined(groups: list[list[int]], count: int) -> str:
    return "which join all of them" if len(groups) == 1 else f"which leave {len(groups)} of {count} apart"


def _counted(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}s"


def _range(values: Sequence[float], form: str = ".3f") -> str:
    low, high = min(values), max(values)
    return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f}" if values else ""


def _components(count: int, edges: Sequence[Pair]) -> list[list[int]]:
    """Connected parts of a graph, the largest first."""
    parts = [{number} for number in range(count)]
    for edge in edges:
        one = next(part for part in parts if edge.first in part)
        other = next(part for part in parts if edge.second in part)
        if one is not other:
            parts.remove(other)
            one |= other
    return sorted((sorted(part) for part in parts), key=lambda part: (-len(part), part))
