"""One number an example: how unsure its prediction is, and how wrong it turned out to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import as_finite, as_floats, as_labels
from stfbnn.predictive import (
    BernoulliPrediction,
    CategoricalPrediction,
    GaussianPrediction,
    HeteroscedasticPrediction,
    PoissonPrediction,
    Prediction,
)

Score: TypeAlias = Callable[[Prediction], Tensor]
"""From a prediction of N examples to N numbers, the lower the safer."""

Loss: TypeAlias = Callable[[Prediction, Tensor], Tensor]
"""From a prediction of N examples and their targets to N losses in [0, 1], or to N booleans, True where it is wrong."""

_CLASS_SCORES: dict[str, Callable[[Any], Tensor]] = {
    "entropy": lambda prediction: prediction.entropy,
    "confidence": lambda prediction: 1 - prediction.confidence,
    "epistemic": lambda prediction: prediction.epistemic,
}
_NUMBER_SCORES: dict[str, Callable[[Any], Tensor]] = {
    "std": lambda prediction: prediction.std,
    "epistemic": lambda prediction: prediction.epistemic,
}
SCORES = tuple(dict.fromkeys([*_CLASS_SCORES, *_NUMBER_SCORES]))
"""The scores that have a name."""

_SEVERAL = (
    "the predictions are of several positions or labels an example, {shape}, which are not independent of each other, and the "
    "guarantee counts independent examples: give score= and loss= as functions that make one number an example, such as "
    "score=lambda pred: pred.entropy.flatten(1).mean(1)"
)


def name_of(given: str | Score | Loss) -> str:
    """What a score or a loss is called: its name, or that of a function followed by (), which no name of ours has."""
    return given if isinstance(given, str) else f"{getattr(given, '__name__', type(given).__name__)}()"


@dataclass(frozen=True)
class Losses:
    """How wrong N predictions are.

    Attributes:
        values: In [0, 1], (N,), float64.
        whole: Whether by their nature they can only be 0 or 1: errors, or booleans.
    """

    values: Tensor
    whole: bool


def score_of(prediction: Prediction, name: str, function: Score | None) -> Tensor:
    """The scores of a prediction, (N,), in float64; NaN where a prediction is NaN.

    Args:
        prediction: Of N examples.
        name: One of ``SCORES``, or what ``function`` is called.
        function: A score of the user's own; None for one that has a name.

    Raises:
        InputError: Nobody knows such a score for such a prediction, it says nothing, or it is not one number an example.
    """
    if function is not None:
        return _one_an_example(function(prediction), len(prediction), f"the score {name!r}")
    if isinstance(prediction, CategoricalPrediction | BernoulliPrediction):
        known = _CLASS_SCORES
    elif isinstance(prediction, GaussianPrediction | HeteroscedasticPrediction | PoissonPrediction):
        known = _NUMBER_SCORES
    else:
        raise InputError(
            f"no score of a {type(prediction).__name__} has a name; give score= as a function from it to one number an "
            f"example, the lower the safer"
        )
    if name not in known:
        raise InputError(
            f"score must be {', '.join(map(repr, known))} for these predictions, or a function from them to one number an "
            f"example, but it is {name!r}"
        )
    if name == "epistemic" and prediction.at_mean:
        raise InputError(
            "the prediction is the one at the posterior mean, which has no epistemic uncertainty; predict with draws "
            "(weights='sample'), or take the score 'entropy' or 'confidence' ('std' for numbers)"
        )
    return _single(known[name](prediction)).double()


def losses_of(prediction: Prediction, targets: Tensor, name: str, function: Loss | None) -> Losses:
    """How wrong a prediction is, example by example.

    Args:
        prediction: Of N examples.
        targets: Of the same.
        name: "error", or what ``function`` is called.
        function: A loss of the user's own; None for errors.

    Raises:
        InputError: The targets do not fit, an error is not defined for such predictions, or losses are not in [0, 1].
    """
    count = len(prediction)
    if not isinstance(targets, Tensor) or targets.ndim < 1 or len(targets) != count:
        found = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(
            f"targets must be a tensor with one entry for each of {count} predictions, but they are {found}"
        )
    if function is None:
        return Losses(_wrong(prediction, targets).double(), whole=True)
    found_losses = function(prediction, targets)
    what = f"the loss {name!r}"
    whole = isinstance(found_losses, Tensor) and found_losses.dtype == torch.bool
    values = as_finite(_one_an_example(found_losses, count, what), f"the values of {what}")
    if float(values.min()) < 0 or float(values.max()) > 1:
        raise InputError(
            f"{what} must be in [0, 1], but goes from {float(values.min()):.4g} to {float(values.max()):.4g}; divide it by its "
            f"largest possible value, which must not be read off the data"
        )
    return Losses(values, whole)


def held_out_scores(prediction: Prediction, name: str, function: Score | None) -> Tensor:
    """Like `score_of`, for the examples by which a threshold is chosen: none missing, none infinite.

    Raises:
        InputError: As for `score_of`, or some are NaN or infinite.
    """
    return as_finite(score_of(prediction, name, function), f"the scores {name!r} of the held-out predictions")


def _wrong(prediction: Prediction, targets: Tensor) -> Tensor:
    """Where the most probable class or label is not the target, (N,)."""
    if isinstance(prediction, CategoricalPrediction):
        labels = _single(prediction.labels)
        as_floats(prediction.log_probs, "the logarithms of the probabilities")
        classes = as_labels(_single(targets), len(prediction), prediction.log_probs.shape[1])
        if prediction.ignore_index is not None and bool((classes == prediction.ignore_index).any()):
            raise InputError(
                f"some targets are ignore_index={prediction.ignore_index}, which marks examples to leave out: leave them "
                f"out of the held-out examples, and of what is evaluated"
            )
        return labels != classes
    if isinstance(prediction, BernoulliPrediction):
        labels = _single(prediction.labels)
        # Refuses targets that do not fit.
        as_floats(prediction.log_density(targets), "the log densities of the targets")
        return labels != targets.detach().cpu().reshape(labels.shape)
    raise InputError(
        f"a {type(prediction).__name__} is never simply right or wrong: give loss= as a function of it and the targets, such "
        f"as loss=lambda pred, y: (pred.mean - y).abs() > tolerance"
    )


def _single(values: Tensor) -> Tensor:
    """(N,) or (N, 1) as (N,)."""
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise InputError(_SEVERAL.format(shape=tuple(values.shape)))
    return values


def _one_an_example(values: Tensor, count: int, what: str) -> Tensor:
    if not isinstance(values, Tensor) or values.is_complex() or tuple(values.shape) != (count,):
        found = (
            f"{tuple(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        )
        raise InputError(f"{what} must give one real number an example, a tensor of shape ({count},), but gave {found}")
    return values.detach().cpu().double()
