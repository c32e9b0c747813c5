"""The loss on paths between weights of one layer: straight lines, and curves that are bent to where the loss is low.

Sources: the barrier is that of Entezari et al. (2022) and Frankle et al. (2020); the curves, and fitting them by the mean loss
along them, are those of Garipov et al. (2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stfbnn.batches import TARGET_KEY, Batch
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_gradients, require_positive
from stfbnn.inference.engine import cosine_decay
from stfbnn.inference.loaders import kept_generators, require_rereadable
from stfbnn.inference.maximum_a_posteriori import adam_rate
from stfbnn.inference.survey import checked_batch
from stfbnn.optima.layer_function import Examples, LayerFunction, Scores
from stfbnn.progress import Reporter, progress_bar
from stfbnn.randomness import generator, seeded

BEND_STEPS = 300
"""Minibatches on which a curve is fitted where nothing else is said."""

VectorsOf = Callable[[range], Tensor]

# Numbers that the weight vectors of one evaluation may hold: a wide layer's paths are evaluated a few points at a time.
_VECTOR_NUMBERS = 2**25

# Numbers that control points fitted at once may hold; Adam and the ends of the curves take five times as much beside them.
_CONTROL_NUMBERS = 2**26

# Twice the usual rate: of 1, 2 and 3 times it, on a dense and on a convolutional network, it found the lowest curves in
# 200 to 400 steps.
_RELATIVE_RATE = 2.0

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Path:
    """The loss along one path w(t) between two weight vectors.

    Attributes:
        positions: t in [0, 1], from 0 to 1.
        losses: Mean loss at w(t), nats per example; infinite where it overflows.
        accuracies: Share of right labels at w(t); None where the targets are no labels.
        barrier: max over t of L(w(t)) − ((1 − t) L(w(0)) + t L(w(1))), in nats per example; at least 0, for it is 0 at both
            ends.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...] | None
    barrier: float

    @classmethod
    def of(cls, positions: Sequence[float], losses: Sequence[float], accuracies: Sequence[float] | None) -> Path:
        """A path from what was measured along it, with its barrier.

        Raises:
            InputError: The loss at an end is not finite, so that there is nothing to measure a barrier from.
        """
        start, end = losses[0], losses[-1]
        if not (math.isfinite(start) and math.isfinite(end)):
            raise InputError(
                f"the losses at the ends of a path are {start} and {end}: a barrier needs finite ones; check the weights"
            )
        # Where outputs overflow, a loss may come out as ∞ − ∞.
        known = tuple(math.inf if math.isnan(loss) else loss for loss in losses)
        above = (loss - ((1 - t) * start + t * end) for t, loss in zip(positions[1:-1], known[1:-1], strict=True))
        found = None if accuracies is None else tuple(accuracies)
        return cls(tuple(positions), known, found, max((0.0, *above)))


def line(function: LayerFunction, first: Tensor, second: Tensor, examples: Examples, points: int = 21) -> Path:
    """The loss on the straight line w(t) = (1 − t) a + t b from ``first``, a, to ``second``, b, both (d,); see `lines`."""
    return _paths(function, [(first, second)], examples, points)[0]


def lines(
    function: LayerFunction,
    weights: Tensor,
    pairs: Sequence[tuple[int, int]],
    examples: Examples,
    points: int = 21,
) -> tuple[Path, ...]:
    """The losses on the straight lines between several pairs, many points being evaluated at once.

    Args:
        function: The network as a function of the layer.
        weights: Weight vectors, (K, d).
        pairs: Which rows of them each line joins.
        examples: On which the loss is computed.
        points: How many values of t, at equal distances, both ends among them; an odd number has the middle among them.

    Raises:
        InputError: The weights are not finite vectors of the layer's size, a pair names a row that is not there, there are
            fewer than 2 points, or the loss at an end is not finite.
    """
    _require_pairs(weights, pairs)
    return _paths(function, [(weights[one], weights[other]) for one, other in pairs], examples, points)


def bezier(
    function: LayerFunction, first: Tensor, control: Tensor, second: Tensor, examples: Examples, points: int = 21
) -> Path:
    """The loss on the Bézier curve from ``first`` by ``control``, which `fit_bend` finds, to ``second``; see `beziers`."""
    return _paths(function, [(first, control, second)], examples, points)[0]


def beziers(
    function: LayerFunction,
    weights: Tensor,
    pairs: Sequence[tuple[int, int]],
    controls: Tensor,
    examples: Examples,
    points: int = 21,
) -> tuple[Path, ...]:
    """The losses on the curves w(t) = (1 − t)² a + 2 t (1 − t) θ + t² b between several pairs, many points at once.

    Args:
        function: The network as a function of the layer.
        weights: Weight vectors, (K, d).
        pairs: Which rows of them each curve joins.
        controls: θ of each pair, (P, d), as `fit_bends` finds them.
        examples: On which the loss is computed.
        points: As for `lines`.

    Raises:
        InputError: As for `lines`, or there are not as many control points as pairs.
    """
    _require_pairs(weights, pairs)
    if len(controls) != len(pairs):
        raise InputError(f"{len(pairs)} curves need as many control points, but there are {len(controls)}")
    anchors = [(weights[one], control, weights[other]) for (one, other), control in zip(pairs, controls, strict=True)]
    return _paths(function, anchors, examples, points)


def fit_bend(
    function: LayerFunction,
    first: Tensor,
    second: Tensor,
    train_loader: Iterable[Any],
    *,
    steps: int = BEND_STEPS,
    learning_rate: float | None = None,
    seed: int = 0,
    target_key: str = TARGET_KEY,
    stacked: bool = True,
    progress: bool | None = None,
) -> Tensor:
    """The control point θ (d,) of a Bézier curve from ``first`` to ``second``, both (d,), along which the mean loss is low.

    The other arguments, and the errors, are those of `fit_bends`.
    """
    return fit_bends(
        function,
        torch.stack([first, second]),
        [(0, 1)],
        train_loader,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        target_key=target_key,
        stacked=stacked,
        progress=progress,
    )[0]


def fit_bends(
    function: LayerFunction,
    weights: Tensor,
    pairs: Sequence[tuple[int, int]],
    train_loader: Iterable[Any],
    *,
    steps: int = BEND_STEPS,
    learning_rate: float | None = None,
    seed: int = 0,
    target_key: str = TARGET_KEY,
    stacked: bool = True,
    progress: bool | None = None,
) -> Tensor:
    """Fit a quadratic Bézier curve between every pair, minimising the mean loss E_{t ~ U(0,1)} L(w(t)) (Garipov et al., 2018).

    Every pair has an Adam of its own, starts at the midpoint, and sees the same minibatches and the same t, one a step, so that
    what is found for it does not depend on the other pairs. The gradient by θ is E_U[2 t (1 − t) ∇L(w(t))], which is a third
    of the mean of ∇L(w(t)) over t ~ Beta(2, 2): that is how t is drawn, at the steps of a golden-ratio sequence, for then few
    steps are spent near the ends, where θ moves little, and all parts of the curve come up evenly. What is left of a barrier is
    an upper bound: another curve, or more steps, may have less.

    Args:
        function: The network as a function of the layer.
        weights: Weight vectors, (K, d).
        pairs: Which rows of them each curve joins.
        train_loader: Batches to learn from, read anew as often as ``steps`` asks for; their weights are not used.
        steps: Minibatches for each pair.
        learning_rate: Adam's at the start, whence it decays along half a cosine to 0; None takes twice `adam_rate` of the pair.
        seed: Of t, and of what the loader draws.
        target_key: The target's entry in mappings.
        stacked: Run the pairs at once where the network allows that; else one after another.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        θ for each pair, (P, d).

    Raises:
        InputError: The weights are not finite vectors of the layer's size, a pair names a row that is not there, a setting or
            a batch cannot be used, or the loss became infinite.
    """
    require_count(steps=steps)
    if learning_rate is not None:
        require_positive(learning_rate=learning_rate)
    require_rereadable(train_loader)
    require_gradients(function.bnn.posterior)
    _require_pairs(weights, pairs)
    for one in weights:
        _require_vector(function, one)
    times = _times(steps, seed)
    size = max(1, _CONTROL_NUMBERS // function.size)
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    found = [weights.new_empty(0, function.size)]
    with progress_bar("fit curves", len(groups) * steps, progress) as bar:
        for group in groups:
            bends = _Bends(function, weights, group, learning_rate, steps, stacked)
            with kept_generators(train_loader):
                _run(bends, train_loader, times, seed, target_key, bar)
            found.append(bends.controls.to(weights))
    return torch.cat(found)


def scores_in_groups(function: LayerFunction, examples: Examples, count: int, vectors: VectorsOf) -> Scores:
    """Losses and accuracies of many weight vectors, only some of which are in memory at once.

    Args:
        function: The network as a function of the layer.
        examples: On which they are computed.
        count: How many vectors.
        vectors: Makes those with the given numbers, (len, d).
    """
    size = max(1, _VECTOR_NUMBERS // function.size)
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    scores = [examples.scores(function, vectors(part).to(function.trained)) for part in parts]
    rates = [one.accuracy for one in scores if one.accuracy is not None]
    return Scores(torch.cat([one.loss for one in scores]), torch.cat(rates) if rates else None)


class _Bends:
    """The control points of several pairs, and their optimisers.

    Attributes:
        controls: θ, (P, d), on the network's device.
    """

    def __init__(
        self,
        function: LayerFunction,
        weights: Tensor,
        pairs: Sequence[tuple[int, int]],
        learning_rate: float | None,
        steps: int,
        stacked: bool,
    ) -> None:
        self._function, self._stacked, self._steps, self._done = function, stacked, steps, 0
        self._first, self._second = (
            weights[[pair[end] for pair in pairs]].detach().to(function.trained) for end in (0, 1)
        )
        self.controls = (self._first + self._second) / 2
        layout = function.bnn.layout
        self._rates = [
            adam_rate(layout, torch.stack(ends), _RELATIVE_RATE) if learning_rate is None else learning_rate
            for ends in zip(self._first, self._second, strict=True)
        ]
        # Rows of one tensor, each with a rate of its own; Adam moves them in place.
        self._rows = list(self.controls)
        self._adam = torch.optim.Adam([{"params": [row]} for row in self._rows])

    def step(self, batch: Batch, t: float) -> float:
        """One step of every pair at the place t of its curve; returns the pairs' mean loss before it."""
        total = 0.0
        size = self._function.group(batch.inputs) if self._stacked else 1
        for start in range(0, len(self._rows), size):
            part = slice(start, start + size)
            vectors = (
                (1 - t) ** 2 * self._first[part] + 2 * t * (1 - t) * self.controls[part] + t**2 * self._second[part]
            )
            with torch.enable_grad():
                losses = self._function.losses(vectors.requires_grad_(), batch, self._stacked)
                gradients = torch.autograd.grad(losses.sum(), vectors)[0]
            total += float(losses.detach().sum())
            for row, gradient in zip(self._rows[part], gradients, strict=True):
                row.grad = gradient
        if not math.isfinite(total):
            raise InputError(
                f"the loss on a curve became {total} at step {self._done + 1} of {self._steps}: give a smaller learning_rate "
                f"than {max(self._rates):.3g}, or check the data for extreme values"
            )
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * cosine_decay(self._done, self._steps)
        self._adam.step()
        self._done += 1
        return total / len(self._rows)


def _run(bends: _Bends, loader: Iterable[Any], times: list[float], seed: int, target_key: str, bar: Reporter) -> None:
    """Take one step a minibatch, one for each t, over as many epochs as they need."""
    done = epoch = 0
    while done < len(times):
        before = done
        with seeded(seed, "bend", "epoch", epoch):
            for given in loader:
                batch = checked_batch(given, target_key).to(bends.controls.device)
                bar.advance(1, loss=bends.step(batch, times[done]))
                done += 1
                if done == len(times):
                    break
        if done == before:
            raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
        epoch += 1


def _times(steps: int, seed: int) -> list[float]:
    """Each t ~ Beta(2, 2), together spread more evenly than draws would be."""
    offset = float(torch.rand((), generator=generator(seed, "bend", "t"), dtype=torch.float64))
    return [_beta_quantile((offset + step * _GOLDEN) % 1) for step in range(steps)]


def _beta_quantile(share: float) -> float:
    """The t at which the distribution function 3 t² − 2 t³ of Beta(2, 2) is ``share``."""
    return 0.5 - math.sin(math.asin(1 - 2 * share) / 3)


def _paths(
    function: LayerFunction, anchors: Sequence[tuple[Tensor, ...]], examples: Examples, points: int
) -> tuple[Path, ...]:
    """The Bézier curves of these control points: of two, straight lines."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise InputError(f"a path needs at least 2 points, its ends, but points is {points!r}")
    for curve in anchors:
        for vector in curve:
            _require_vector(function, vector)
    if not anchors:
        return ()
    positions = [index / (points - 1) for index in range(points)]

    def vectors(numbers: range) -> Tensor:
        return torch.stack([_bezier_point(anchors[one // points], positions[one % points]) for one in numbers])

    scores = scores_in_groups(function, examples, len(anchors) * points, vectors)
    losses = scores.loss.reshape(-1, points).tolist()
    rates = [None] * len(anchors) if scores.accuracy is None else scores.accuracy.reshape(-1, points).tolist()
    return tuple(Path.of(positions, *one) for one in zip(losses, rates, strict=True))


def _bezier_point(anchors: Sequence[Tensor], t: float) -> Tensor:
    """Σ_i C(n, i) (1 − t)^(n − i) t^i anchor_i, which at both ends is the anchor itself."""
    degree = len(anchors) - 1
    total = torch.zeros_like(anchors[0])
    for index, anchor in enumerate(anchors):
        total += math.comb(degree, index) * (1 - t) ** (degree - index) * t**index * anchor.to(total)
    return total


def _require_vector(function: LayerFunction, vector: Tensor) -> None:
    if tuple(vector.shape) != (function.size,) or not vector.is_floating_point():
        raise InputError(
            f"the layer {function.layer!r} has {function.size} weights, so that its weights are floats of shape "
            f"({function.size},), but {tuple(vector.shape)} of {vector.dtype} was given"
        )
    if not bool(torch.isfinite(vector).all()):
        raise InputError("weights at the ends of a path hold NaN or infinite values; leave out the run that diverged")


def _require_pairs(weights: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    if weights.ndim != 2:
        raise InputError(f"weights must be vectors, (K, d), but their shape is {tuple(weights.shape)}")
    wrong = [pair for pair in pairs if not all(0 <= number < len(weights) for number in pair)]
    if wrong:
        raise InputError(f"the pair {wrong[0]} is not of the {len(weights)} weight vectors 0 … {len(weights) - 1}")
