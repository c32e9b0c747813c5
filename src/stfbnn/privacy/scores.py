"""What one prediction tells of membership: scores of single examples that need no other model.

A network fits what it was trained on, so it is surer of its training examples, and more often right. Every score here is
higher for what looks more like a member. They are computed from log-probabilities, not probabilities: for training
examples p_y is so close to 1 that 1 − p_y would be rounding, and it is exactly there that members and others differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_labels, as_log_probabilities

ScoreFunction = Callable[[ArrayLike, ArrayLike], Tensor]

FLOOR = math.log(5e-324)
"""Stands for log 0, and for what is smaller: the logarithm of the least positive double, so that every score is finite."""


def loss_score(log_probs: ArrayLike, labels: ArrayLike) -> Tensor:
    """log p_y: the loss attack of Yeom et al. (2018).

    Args:
        log_probs: log p(k | x) of the released predictive, (N, K); minus infinity is allowed.
        labels: The true classes, (N,).

    Returns:
        (N,) in float64, finite.

    Raises:
        InputError: The log-probabilities are not N x K of sum 1, or the labels are not N classes.
    """
    logs, classes = _checked(log_probs, labels)
    return _picked(logs, classes)


def confidence_score(log_probs: ArrayLike, labels: ArrayLike) -> Tensor:
    """max_k log p_k, for an attacker who does not know the label (Salem et al. 2019).

    The labels are checked and not used; arguments, result and errors are those of `loss_score`.
    """
    return _checked(log_probs, labels)[0].amax(dim=1)


def entropy_score(log_probs: ArrayLike, labels: ArrayLike) -> Tensor:
    """−H[p], the negative entropy in nats; the label is not used either.

    Arguments, result and errors are those of `loss_score`.
    """
    logs, _ = _checked(log_probs, labels)
    return (logs.exp() * logs).sum(dim=1)


def modified_entropy_score(log_probs: ArrayLike, labels: ArrayLike) -> Tensor:
    """−Mentr, with Mentr = −(1 − p_y) log p_y − Σ_{k≠y} p_k log(1 − p_k) of Song and Mittal (2021).

    It is small only for the right class held with certainty, where the entropy is small for a wrong one too.
    Arguments, result and errors are those of `loss_score`.
    """
    logs, classes = _checked(log_probs, labels)
    rest = _log_rest(logs)
    others = (logs.exp() * rest).scatter(1, classes.unsqueeze(1), 0.0).sum(dim=1)
    return _picked(rest, classes).exp() * _picked(logs, classes) + others


def scaled_confidence(log_probs: ArrayLike, labels: ArrayLike) -> Tensor:
    """φ = log(p_y / (1 − p_y)), which is nearly Gaussian over retrained networks (Carlini et al. 2022).

    1 − p_y is the sum of the other classes' probabilities, taken in log space: φ keeps its digits where p_y rounds to 1.
    Arguments, result and errors are those of `loss_score`.
    """
    logs, classes = _checked(log_probs, labels)
    others = logs.scatter(1, classes.unsqueeze(1), -math.inf).logsumexp(dim=1)
    return _picked(logs, classes) - others


def correctness_score(log_probs: ArrayLike, labels: ArrayLike) -> Tensor:
    """1 where the most probable class is the label, else 0: the gap attack of Yeom et al. (2018).

    Its advantage is the generalisation gap: the accuracy on members minus that on others. Arguments, result and errors
    are those of `loss_score`.
    """
    logs, classes = _checked(log_probs, labels)
    return (logs.argmax(dim=1) == classes).to(torch.float64)


SCORES: dict[str, ScoreFunction] = {
    "loss": loss_score,
    "confidence": confidence_score,
    "entropy": entropy_score,
    "modified_entropy": modified_entropy_score,
    "scaled_confidence": scaled_confidence,
    "correctness": correctness_score,
}


def as_membership(value: ArrayLike, shape: tuple[int, ...], what: str = "member") -> Tensor:
    """Take who was in the training data.

    Args:
        value: Truth values.
        shape: The shape they must have.
        what: Their name in an error.

    Returns:
        The same as a bool tensor on the CPU.

    Raises:
        InputError: They are not truth values, or of another shape.
    """
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
    if tensor.dtype != torch.bool:
        raise InputError(
            f"{what} must be true for members and false for others, but it holds {tensor.dtype}; compare, or convert by .bool()"
        )
    if tuple(tensor.shape) != shape:
        raise InputError(f"{what} must have shape {shape}, but it has {tuple(tensor.shape)}")
    return tensor


def _checked(log_probs: ArrayLike, labels: ArrayLike) -> tuple[Tensor, Tensor]:
    """Log-probabilities whose rows sum to 1 up to rounding, none below `FLOOR`, and the labels."""
    logs = as_log_probabilities(log_probs)
    classes = as_labels(labels, *logs.shape)
    return logs.log_softmax(dim=1).clamp_min(FLOOR), classes


def _picked(values: Tensor, classes: Tensor) -> Tensor:
    return values.gather(1, classes.unsqueeze(1)).squeeze(1)


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 − p_k), (N, K): only the most probable class can be so near 1 that the others must be summed for it."""
    top = logs.argmax(dim=1, keepdim=True)
    summed = logs.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    # At the top class itself log1p may be −inf; it is replaced.
    return (-logs.exp()).log1p().scatter(1, top, summed)
