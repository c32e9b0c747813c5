"""How wide the posterior of each layer is and what that buys: ranked, as tables and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text
from torch import Tensor

from stfbnn.files import plain
from stfbnn.predictive.weighting import mean_and_error

TIE = 0.001
"""Nats an example: held-out scores that are no further apart count as equal, and the smaller layer comes first."""

STANDARD_ERRORS = 2.0
"""Differences of up to so many standard errors may be chance."""

# What tables show of the figures on the test examples, for classes and for numbers.
_SHOWN = (("accuracy", "accuracy"), ("ece", "ECE"), ("rmse", "RMSE"), ("coverage_90", "in 90 %"))
_ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """Of two held-out scores, from the same examples.

    Attributes:
        mean: One NLL less the other, nats per example; negative where the first is better.
        standard_error: Of that mean, from the differences of single examples.
    """

    mean: float
    standard_error: float

    @property
    def within_noise(self) -> bool:
        """Whether chance explains it: it is at most two standard errors."""
        return abs(self.mean) <= STANDARD_ERRORS * self.standard_error

    @classmethod
    def of(cls, density: Tensor, other: Tensor, weights: Tensor | None = None) -> Difference:
        """Compare log densities of the same N examples, paired.

        Args:
            density: log p(y_n | x_n) under what is judged, (N,), N of at least 2.
            other: The same under what it is compared with.
            weights: What each example counts, (N,); None where all count the same.
        """
        return cls(*mean_and_error(other.double() - density.double(), weights))

    def __str__(self) -> str:
        return f"{abs(self.mean):.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True)
class LayerWidth:
    """One layer alone made Bayesian.

    Attributes:
        layer: What ``bayesianize(layer=…)`` takes.
        kind: Its class.
        parameters: How many numbers are random.
        share: Of the whole network's parameters.
        temperature: T of the posterior.
        relative_std: Mean σ over the root mean square of the trained weights. With the prior "rms" it is 1 where the data say
            nothing of the layer.
        kl_per_parameter: KL(q‖p) / d, nats.
        held_out_nll: Of the averaged predictive, nats per example.
        metrics: Figures of `stfbnn.evaluation.evaluate` on the test examples; none for a likelihood of one's own.
        epistemic: Mean epistemic part of the predictions (mutual information in nats, or a variance in the targets' unit
            squared), on the test examples and on each foreign set, by name; empty for a likelihood of one's own.
        auroc: For each foreign set, of telling its examples from the test examples by "entropy" and by "epistemic"; a score
            that the predictions do not have is left out.
        seconds: Wall time of inference.
        artifact_bytes: What the posterior takes on disk, about.
        over_network: Held-out NLL less the trained network's own.
        over_first: The same, less that of the network's first layer; None for that layer, or where it was not compared.
    """

    layer: str
    kind: str
    parameters: int
    share: float
    temperature: float
    relative_std: float
    kl_per_parameter: float
    held_out_nll: float
    metrics: Mapping[str, float]
    epistemic: Mapping[str, float]
    auroc: Mapping[str, Mapping[str, float]]
    seconds: float
    artifact_bytes: int
    over_network: Difference
    over_first: Difference | None = None


@dataclass(frozen=True)
class NetworkFigures:
    """The trained network itself on the same examples.

    Where its outputs are numbers, and the noise is not given, it gets that of its held-out residuals.

    Attributes:
        held_out_nll: Nats per example.
        metrics: As of `LayerWidth`.
        auroc: For each foreign set, by the entropy of its predictions; empty where they have none.
    """

    held_out_nll: float
    metrics: Mapping[str, float]
    auroc: Mapping[str, float]


@dataclass(frozen=True)
class LayerComparison:
    """What `compare_layers` found.

    The layer is chosen by its held-out NLL, which is therefore a little too good for the best one: judge it by ``metrics``,
    which are of other data where a test set was given.

    Attributes:
        network: The trained network itself.
        layers: In execution order.
        first: The layer that `bayesianize` takes by itself.
        failed: Layers that could not be made Bayesian, or inferred, with the reason.
        skipped: Layers that were not compared, for there were too many.
        tested_on: "test", or "held-out" where there was no test set: then ``metrics`` are of the data that chose.
        num_held_out: Held-out examples.
    """

    network: NetworkFigures
    layers: tuple[LayerWidth, ...]
    first: str
    failed: Mapping[str, str]
    skipped: tuple[str, ...]
    tested_on: Literal["test", "held-out"]
    num_held_out: int

    def ranked(self) -> tuple[LayerWidth, ...]:
        """By held-out NLL, the best first; of those within a thousandth of a nat of the best that is left, by size."""
        waiting = sorted(self.layers, key=lambda one: one.held_out_nll)
        ranked: list[LayerWidth] = []
        while waiting:
            equals = [one for one in waiting if one is waiting[0] or one.held_out_nll - waiting[0].held_out_nll <= TIE]
            ranked += sorted(equals, key=lambda one: (one.parameters, one.held_out_nll))
            waiting = waiting[len(equals) :]
        return tuple(ranked)

    @property
    def recommended(self) -> str:
        """The best layer, for ``bayesianize(layer=…)``."""
        return self.ranked()[0].layer

    def verdict(self) -> str:
        """Whether the first layer is the right one, which is, and whether it pays at all, with the numbers."""
        return " ".join([self._of_the_first(), self._of_the_network(), *self._of_the_widths()])

    def table(self) -> Table:
        """The ranking, for a terminal."""
        best = self.recommended
        table = Table(
            title="Each layer alone made Bayesian, the best first",
            title_justify="left",
            caption=" ".join(self._notes()),
            caption_justify="left",
            box=None,
            pad_edge=False,
        )
        shown = [(key, title) for key, title in _SHOWN if key in self.network.metrics]
        table.add_column("layer", overflow="fold")
        for head in (
            "at",
            "weights",
            "T",
            "σ /\nRMS",
            "KL /\nweight",
            "held-out\nNLL",
            "− first\nlayer",
            *(t for _, t in shown),
            "s",
        ):
            table.add_column(head, justify="right", no_wrap=True)
        places = {one.layer: place for place, one in enumerate(self.layers, 1)}
        for one in self.ranked():
            table.add_row(
                Text(_name(one.layer)),
                str(places[one.layer]),
                f"{one.parameters:,}",
                f"{one.temperature:g}",
                f"{one.relative_std:.3f}",
                f"{one.kl_per_parameter:.3f}",
                f"{one.held_out_nll:.4f}",
                _signed(one.over_first),
                *(f"{one.metrics[key]:.4f}" for key, _ in shown),
                f"{one.seconds:.1f}",
                style="bold" if one.layer == best else None,
            )
        figures = [f"{self.network.metrics[key]:.4f}" for key, _ in shown]
        table.add_row("network itself", *[""] * 5, f"{self.network.held_out_nll:.4f}", "", *figures, "", style="dim")
        return table

    def uncertainty_table(self) -> Table:
        """The epistemic part in and out of distribution, for a terminal: a line for each layer and foreign set."""
        table = Table(title="Epistemic uncertainty", title_justify="left", box=None, pad_edge=False)
        table.add_column("layer", overflow="fold")
        table.add_column("foreign set", overflow="fold")
        for head in (self.tested_on, "foreign", "AUROC by\nentropy", "AUROC by\nepistemic"):
            table.add_column(head, justify="right", no_wrap=True)
        for one in self.ranked():
            inside = _figure(one.epistemic.get(self.tested_on))
            for name in one.auroc or [_ABSENT]:
                scores = one.auroc.get(name, {})
                outside = _figure(one.epistemic.get(name))
                table.add_row(
                    Text(_name(one.layer)),
                    Text(name),
                    inside,
                    outside,
                    _figure(scores.get("entropy")),
                    _figure(scores.get("epistemic")),
                )
        for name, score in self.network.auroc.items():
            table.add_row("network itself", Text(name), "", "", _figure(score), "", style="dim")
        return table

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON, which has no infinity: such a figure is None."""
        content: dict[str, Any] = plain(asdict(self))
        said = {"ranked": [one.layer for one in self.ranked()], "recommended": self.recommended}
        return {**content, **said, "verdict": self.verdict()}

    def _of_the_first(self) -> str:
        best = self.ranked()[0]
        named = f"{_quoted(best.layer)} ({best.held_out_nll:.4f})"
        if best.layer == self.first:
            return self._runner_up()
        if self.first in self.failed:
            return f"The first layer {_quoted(self.first)} cannot be taken: {self.failed[self.first]}. Best is {named}."
        if best.over_first is None:
            return f"The first layer {_quoted(self.first)} was not compared; best is {named}."
        gap, first = best.over_first, next(one for one in self.layers if one.layer == self.first)
        behind = f"{_quoted(self.first)} ({first.held_out_nll:.4f})"
        if first.held_out_nll - best.held_out_nll <= TIE:
            return (
                f"Not quite: {named} is as good as the first layer {behind} to within {TIE:g} nats per example of held-out "
                f"NLL, with {best.parameters:,} weights instead of {first.parameters:,}."
            )
        if gap.within_noise:
            return (
                f"The held-out examples cannot tell: {named} has the lowest held-out NLL, but the first layer {behind} is as "
                f"good within the noise, a difference of {gap} nats per example."
            )
        return f"No, {named} has a lower held-out NLL than the first layer {behind}, by {gap} nats per example."

    def _runner_up(self) -> str:
        """That the first layer is the best, and how far the second is behind."""
        best, *others = self.ranked()
        if not others:
            return f"The first layer {_quoted(best.layer)} is the only one compared (held-out NLL {best.held_out_nll:.4f})."
        said = (
            f"Yes, the first layer {_quoted(best.layer)} is the right one: held-out NLL {best.held_out_nll:.4f}, the best of "
            f"the {len(self.layers)} layers compared"
        )
        gap, second = others[0].over_first, f"{_quoted(others[0].layer)} ({others[0].held_out_nll:.4f})"
        assert gap is not None  # noqa: S101 - the first layer was compared
        if gap.mean <= TIE:
            return f"{said}; {second} is as good to within {TIE:g} nats, with {others[0].parameters:,} weights."
        if gap.within_noise:
            return (
                f"{said}; the held-out examples cannot tell {second} from it, a difference of {gap} nats per example."
            )
        return f"{said}; next is {second}, worse by {gap} nats per example."

    def _of_the_network(self) -> str:
        best, own = self.ranked()[0], self.network.held_out_nll
        lowest, gap = min(one.held_out_nll for one in self.layers), best.over_network
        if lowest >= own:
            return (
                f"No layer beats the trained network itself ({own:.4f}, the layers at best {lowest:.4f}): there was nothing to "
                f"repair, or the fits have not converged."
            )
        if gap.within_noise:
            return f"Beside the trained network itself ({own:.4f}) it makes no difference beyond the noise, {gap}."
        verb = "beats" if gap.mean < 0 else "is worse than"
        return f"The network with {_quoted(best.layer)} random {verb} the trained network itself ({own:.4f}), by {gap}."

    def _of_the_widths(self) -> Iterator[str]:
        if len(self.layers) > 1:
            wide = sorted(self.layers, key=lambda one: one.relative_std)
            narrowest, widest = wide[0], wide[-1]
            yield (
                f"The widest posterior is that of {_quoted(widest.layer)}, with a mean σ of {widest.relative_std:.3f} times "
                f"the size of its weights; the narrowest that of {_quoted(narrowest.layer)}, with {narrowest.relative_std:.3f}."
            )

    def _notes(self) -> Iterator[str]:
        yield (
            f"at: place in execution order. NLL: nats per example, of {self.num_held_out:,} held-out examples. − first: that "
            f"of the first layer taken off, with its standard error."
        )
        if self.tested_on == "held-out":
            yield "No test set was given: all figures are of the held-out examples, which also chose the layer."
        if self.skipped:
            yield f"{len(self.skipped)} further layers were not compared."
        for layer, reason in self.failed.items():
            # A layer's name in brackets would be read as markup.
            yield f"{_name(layer)} failed: {reason}.".replace("[", r"\[")


def _name(layer: str) -> str:
    return layer or "(the model itself)"


def _quoted(layer: str) -> str:
    return repr(layer) if layer else "(the model itself)"


def _figure(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"


def _signed(difference: Difference | None) -> str:
    return "" if difference is None else f"{difference.mean:+.4f}±{difference.standard_error:.4f}"
