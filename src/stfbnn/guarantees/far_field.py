"""The confidence of a Bayesian network far from the data, computed in the limit and measured on the way to it.

Along a ray o + αx the logits of one draw w of the first layer satisfy f_w(o + αx)/α → g∞(Wx). Where the largest component of
g∞(Wx) is alone, the softmax of f_w tends to 1 for its class, at any temperature, and to 0 for the others; where it is tied
(zero is a tie) nothing is said. With P_k the probability of the first for class k and P_0 that of a tie, dominated convergence
gives

    max_k P_k ≤ lim inf max_k E_q[p_k] ≤ lim sup max_k E_q[p_k] ≤ max_k (P_k + P_0).

Of S independent draws n_k fall to class k and n_0 are tied. As n_k + n_0 is binomial, its Clopper–Pearson upper limit at level
δ/K exceeds P_k + P_0 for all K classes at once with a probability of at least 1 − δ, and so their maximum is a bound. A network
with fixed weights is one draw: its confidence tends to 1 unless it is tied. The first layer's biases, and what is random in
them, and the origin o have no part in the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stfbnn.batches import (
    TARGET_KEY,
    Inputs,
    batch_size,
    concatenate,
    map_tensors,
    rows,
    tensors_of,
    to_device,
)
from stfbnn.draws import chunk_rows
from stfbnn.errors import InputError
from stfbnn.guarantees.far_field_result import ConfidenceAlong, Direction, FarField, Kind, limit_bound
from stfbnn.guarantees.homogeneous import HomogeneousLimit
from stfbnn.likelihood import Bernoulli, Categorical, Likelihood
from stfbnn.mixed_precision import full_precision
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import input_batches
from stfbnn.progress import progress_bar
from stfbnn.randomness import generator

# Margins that rounding may have made: relative to the row's own size, and to the largest number on the way to it.
_OWN_ROUNDING, _PEAK_ROUNDING = 1e-9, 1e-12
_CHECKED_DRAWS = 2


def far_field(
    bnn: BayesianNetwork,
    directions: Any,
    *,
    draws: int = 1000,
    level: float = 0.05,
    threshold: float = 0.9,
    random_directions: int = 0,
    seed: int = 0,
    has_targets: bool = True,
    target_key: str = TARGET_KEY,
    progress: bool | None = None,
) -> FarField:
    """Compute the limit of the confidence along each of some directions, with an upper bound.

    Directions live in the space of the network's own inputs, after whatever normalisation the data pipeline does; an example
    stands for the ray through it from that space's origin (often the mean of the data), and by the module's first paragraph for
    every ray parallel to it. Their lengths do not matter.

    Args:
        bnn: The network, after `fit`, with logits of classes, or one logit of a label.
        directions: N of them as inputs of the model, (N, …); or a loader of batches, whose targets are ignored.
        draws: S, independent draws of the first layer's weights (of a mixture: of its component, too).
        level: δ, for each direction.
        threshold: The confidence that `FarField.share` holds bounds against.
        random_directions: How many Gaussian directions to add.
        seed: Of the draws and the random directions.
        has_targets: False for a loader whose batches are tuples of inputs without a target.
        target_key: The target's entry in a loader's mappings.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        The limits.

    Raises:
        NoLimitError: A module of the network has no known limit, and is named; or the limit was seen to be wrong.
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: An argument is out of range, a direction is zero, or the outputs are not those of classes.
    """
    _require_positive(draws=draws)
    if isinstance(random_directions, bool) or not isinstance(random_directions, int) or random_directions < 0:
        raise InputError(f"random_directions must be a whole number of at least 0, but it is {random_directions!r}")
    for name, value in (("level", level), ("threshold", threshold)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"{name} must lie between 0 and 1, but it is {value!r}")
    scores = _scores_of(bnn.require_fitted())
    given = concatenate(list(input_batches(directions, has_targets, target_key)) or _nothing())
    count = batch_size(given)
    everything = unit_directions(_with_random(given, random_directions, seed))
    parts = _equal_parts(everything, bnn)
    limit = HomogeneousLimit(bnn, parts[0])
    parts = [limit.prepared(part) for part in parts]
    total = count + random_directions

    def winners(vector: Tensor) -> Tensor:
        parameters = limit.parameters(vector)
        found = [_winners(scores, *limit.outputs(parameters, part)) for part in parts]
        return torch.cat(found)[:total].cpu()

    fixed = [bnn.trained_vector(), bnn.posterior.mean_vector().detach()]
    some = [independent_draw(bnn, seed, index) for index in range(min(draws, _CHECKED_DRAWS))]
    check = limit.check([*fixed, *some], parts[0])
    classes = scores(limit.outputs(limit.parameters(fixed[0]), parts[0])[0]).shape[1]
    trained, mean = (winners(vector).tolist() for vector in fixed)
    # The last column is for ties.
    counts = torch.zeros(total, classes + 1, dtype=torch.long)
    places = torch.arange(total)
    with progress_bar("far field", draws, progress) as bar:
        for index in range(draws):
            counts[places, winners(independent_draw(bnn, seed, index)) % (classes + 1)] += 1
            bar.advance()
    found = []
    for place, row in enumerate(counts.tolist()):
        kind: Kind = "data" if place < count else "random"
        *each, ties = row
        fates = (_label(trained[place]), _label(mean[place]))
        found.append(Direction(kind, tuple(each), ties, limit_bound(each, ties, level), *fates))
    settings = {"draws": draws, "level": level, "threshold": threshold, "seed": seed, "random": random_directions}
    return FarField(tuple(found), draws, level, threshold, check, settings)


@torch.no_grad()
def confidence_along(
    bnn: BayesianNetwork,
    directions: Any,
    distances: Sequence[float],
    *,
    samples: int = 200,
    seed: int = 0,
    origin: Tensor | None = None,
    has_targets: bool = True,
    target_key: str = TARGET_KEY,
    progress: bool | None = None,
) -> ConfidenceAlong:
    """Measure the confidence at o + αx for unit directions x and growing distances α, in the network's own precision.

    The draws are the first ``samples`` of `far_field` with the same seed, so that with as many the measured confidence tends to
    its ``limit`` itself where no draw is tied.

    Args:
        bnn: The network, after `fit`.
        directions: As for `far_field`; they are scaled to unit length.
        distances: Euclidean distances α in the space of the network's inputs, rising.
        samples: Draws to average.
        seed: Which draws.
        origin: o, of the shape of one input; None for zero.
        has_targets: As for `far_field`.
        target_key: As for `far_field`.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        Confidence of the averaged predictive and of the trained network.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: An argument is out of range, or outputs overflow at the largest distance.
    """
    _require_positive(samples=samples)
    far = [float(distance) for distance in distances]
    if not far or not all(math.isfinite(one) and one >= 0 for one in far) or sorted(set(far)) != far:
        raise InputError(f"distances must be finite, at least 0 and rising, but they are {list(distances)}")
    likelihood = bnn.require_fitted()
    _scores_of(likelihood)
    units = unit_directions(concatenate(list(input_batches(directions, has_targets, target_key)) or _nothing()))
    if origin is not None and (not isinstance(units, Tensor) or origin.shape != units.shape[1:]):
        raise InputError(
            f"origin must be one input of the model without a batch dimension, for a model with one tensor as its input, but "
            f"its shape is {tuple(origin.shape)}"
        )
    bnn.check_unchanged()
    places = [map_tensors(units, partial(_moved, distance=one, origin=origin)) for one in far]
    count, size = batch_size(units), chunk_rows(units, bnn.device)
    chunks = [to_device(rows(at, start, start + size), bnn.device) for at in places for start in range(0, count, size)]

    def probabilities(vector: Tensor) -> Tensor:
        return torch.cat([_probabilities(likelihood, bnn.outputs(vector, chunk), bnn) for chunk in chunks])

    with bnn.computing_in("32-true"), progress_bar("confidence", samples, progress) as bar:
        trained = probabilities(bnn.trained_vector())
        total = torch.zeros_like(trained)
        for index in range(samples):
            total += probabilities(independent_draw(bnn, seed, index))
            bar.advance()

    def by_direction(probs: Tensor) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, probs.amax(dim=1).view(len(far), count).T.tolist()))

    return ConfidenceAlong(tuple(far), by_direction(total / samples), by_direction(trained), samples)


@torch.no_grad()
def independent_draw(bnn: BayesianNetwork, seed: int, index: int) -> Tensor:
    """Draw ``index`` of q(w), independent of all others, (d,).

    Unlike those that predictions average, draws of a mixture choose their component at random, for a binomial count needs that.
    """
    posterior = bnn.posterior
    noise = torch.randn(posterior.noise_size, generator=generator(seed, "independent draw", index))
    with full_precision(bnn.device):
        return posterior.draw(noise.to(posterior.mean_vector()))


def unit_directions(inputs: Inputs) -> Inputs:
    """Every row scaled to unit Euclidean length, all its tensors together.

    Raises:
        InputError: A row is zero, or a tensor holds no floats.
    """
    if any(not tensor.is_floating_point() for tensor in tensors_of(inputs)):
        raise InputError(
            "directions must be floats: token numbers and masks cannot be scaled, so they have no limit far away"
        )
    # In double precision and by the largest entry first, so that no square overflows.
    flat = torch.cat([tensor.detach().cpu().double().flatten(1) for tensor in tensors_of(inputs)], dim=1)
    largest = flat.abs().amax(dim=1)
    if bool((largest == 0).any()):
        bad = (largest == 0).nonzero().flatten().tolist()[:5]
        raise InputError(f"directions must not be zero, but rows {bad} are; leave them out")
    norms = (flat / largest[:, None]).norm(dim=1)

    def scaled(tensor: Tensor) -> Tensor:
        shape = (-1, *[1] * (tensor.ndim - 1))
        unit: Tensor = tensor.detach().cpu().double() / largest.view(shape) / norms.view(shape)
        return unit.to(tensor)

    return map_tensors(inputs, scaled)


def _scores_of(likelihood: Likelihood) -> Callable[[Tensor], Tensor]:
    """From outputs to scores (N, K), of which the largest is the label."""
    if not isinstance(likelihood, Categorical | Bernoulli):
        raise InputError(
            f"the confidence far from the data is that of classes or of one label; the likelihood here is {likelihood.name!r}"
        )
    if likelihood.outputs != "logits":
        raise InputError("the network returns probabilities, which are bounded; let it return logits and fit it again")

    def scores(outputs: Tensor) -> Tensor:
        if isinstance(likelihood, Categorical) and outputs.ndim == 2 and outputs.shape[1] > 1:
            return outputs
        if isinstance(likelihood, Bernoulli) and (outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1)):
            logits = outputs.reshape(-1)
            return torch.stack([torch.zeros_like(logits), logits], dim=1)
        raise InputError(
            f"the confidence far from the data is that of one label for each input, with outputs (N, K) of K classes or one "
            f"logit (N,) or (N, 1), but the outputs here are {tuple(outputs.shape)}"
        )

    return scores


def _probabilities(likelihood: Likelihood, outputs: Tensor, bnn: BayesianNetwork) -> Tensor:
    """(N, K)."""
    if not bool(torch.isfinite(outputs).all()):
        raise InputError("the network's outputs are not finite so far away; choose smaller distances")
    # Where there is no double precision, as good as there is.
    dtype = torch.float32 if outputs.device.type == "mps" else torch.float64
    return (_scores_of(likelihood)(outputs).to(dtype) / bnn.predictive_temperature).softmax(dim=1)


def _winners(scores: Callable[[Tensor], Tensor], outputs: Tensor, peak: Tensor) -> Tensor:
    """The class of each row, (N,); −1 where rounding could have decided."""
    limits = scores(outputs)
    top, classes = limits.topk(2, dim=1)
    rounding = torch.maximum(_OWN_ROUNDING * limits.abs().amax(dim=1), _PEAK_ROUNDING * peak)
    return torch.where(top[:, 0] - top[:, 1] > rounding, classes[:, 0], -1)


def _label(winner: int) -> int | None:
    return None if winner < 0 else winner


def _with_random(given: Inputs, count: int, seed: int) -> Inputs:
    if not count:
        return given
    random = generator(seed, "random directions")
    drawn = map_tensors(given, lambda tensor: torch.randn(count, *tensor.shape[1:], generator=random).to(tensor))
    return concatenate([given, drawn])


def _equal_parts(inputs: Inputs, bnn: BayesianNetwork) -> list[Inputs]:
    """Batches of one size, as a traced graph needs them; the first rows again at the end where some are missing."""
    count = batch_size(inputs)
    # Half as many as in single precision. A batch of one is taken for no batch by many networks.
    number = math.ceil(count / max(2, chunk_rows(inputs, bnn.device) // 2))
    size = max(2, math.ceil(count / number))
    return [
        map_tensors(inputs, partial(_taken, places=torch.arange(start, start + size) % count))
        for start in range(0, count, size)
    ]


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    return tensor[places.to(tensor.device)]


def _moved(tensor: Tensor, distance: float, origin: Tensor | None) -> Tensor:
    moved = distance * tensor
    return moved if origin is None else moved + origin.to(tensor)


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, but it is {value!r}")


def _nothing() -> list[Inputs]:
    raise InputError("there are no directions: the loader gave no batch")
