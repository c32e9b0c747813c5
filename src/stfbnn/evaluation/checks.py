"""What every figure asks of its input: the right shape, the right range and no NaN, said before anything is counted.

All figures are computed in float64 on the CPU: they are sums over few numbers, and a sum of 10,000 float32 terms
is wrong in the digits that such tables show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stfbnn.errors import InputError

ArrayLike: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]

SUM_TOLERANCE = 1e-3
"""How far a row of probabilities may be from 1: what half precision loses, and far less than a missing softmax."""


def as_floats(value: ArrayLike, what: str) -> Tensor:
    """Take real numbers as a float64 tensor on the CPU, without history.

    Args:
        value: A tensor, an array or nested sequences of numbers.
        what: Its name in an error.

    Returns:
        The same numbers, at least one of them, none of them NaN (infinite ones may be).

    Raises:
        InputError: They are not real numbers, are none at all, or some are NaN.
    """
    tensor = _as_tensor(value, what)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{what} must be real numbers, but they are {tensor.dtype}")
    numbers = tensor.to(torch.float64)
    if not numbers.numel():
        raise InputError(f"{what} are empty (shape {tuple(numbers.shape)}); there is nothing to evaluate")
    missing = int(numbers.isnan().sum())
    if missing:
        raise InputError(f"{what} hold {missing} NaN values; find out which examples they come from and leave them out")
    return numbers


def as_finite(value: ArrayLike, what: str) -> Tensor:
    """Like :func:`as_floats`, refusing infinite numbers too.

    Raises:
        InputError: As for :func:`as_floats`, or some numbers are infinite.
    """
    numbers = as_floats(value, what)
    infinite = int(numbers.isinf().sum())
    if infinite:
        raise InputError(f"{what} hold {infinite} infinite values, and must be finite")
    return numbers


def as_probabilities(value: ArrayLike) -> Tensor:
    """Take predictive probabilities.

    Args:
        value: N x K, one row an example, non-negative, each row summing to 1 within ``SUM_TOLERANCE``.

    Returns:
        The same as float64.

    Raises:
        InputError: They are not of that shape, range or sum.
    """
    probs = _require_matrix(as_finite(value, "probabilities"), "probabilities")
    if float(probs.min()) < 0:
        raise InputError(
            f"probabilities must not be negative, but the smallest is {float(probs.min()):.4g}; are they logits? "
            f"Then apply a softmax first"
        )
    _require_sum(probs.sum(1), "probabilities must sum to 1", "apply a softmax first if they are scores")
    return probs


def as_log_probabilities(value: ArrayLike) -> Tensor:
    """Take logarithms of predictive probabilities.

    Args:
        value: N x K, at most 0 (up to rounding; minus infinity is the logarithm of 0), each row's exponentials
            summing to 1 within ``SUM_TOLERANCE``.

    Returns:
        The same as float64.

    Raises:
        InputError: They are not of that shape, range or sum.
    """
    log_probs = _require_matrix(as_floats(value, "log-probabilities"), "log-probabilities")
    _require_sum(
        log_probs.logsumexp(1).exp(),
        "the exponentials of log-probabilities must sum to 1",
        "if they are logits, apply log_softmax first",
    )
    return log_probs


def as_labels(value: ArrayLike, count: int, classes: int) -> Tensor:
    """Take class labels.

    Args:
        value: N integers in [0, classes).
        count: N, the number of predictions.
        classes: K, the number of classes.

    Returns:
        The same as int64 on the CPU.

    Raises:
        InputError: They are not integers, not N of them in one dimension, or out of range.
    """
    labels = _as_tensor(value, "targets")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"targets must be integer class labels, but they are {labels.dtype}")
    if labels.shape != (count,):
        raise InputError(
            f"targets must be one label an example, of shape ({count},) as there are {count} predictions, but they "
            f"have shape {tuple(labels.shape)}"
        )
    labels = labels.to(torch.int64)
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise InputError(
            f"targets must be in 0 to {classes - 1} as there are {classes} classes, but {outside.numel()} are not, "
            f"such as {int(outside[0])}; leave ignored examples out and count classes from 0"
        )
    return labels


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of differing shapes: broadcasting N x 1 against N would silently compare all with all.

    Args:
        tensors: The tensors, under their names in the error.

    Raises:
        InputError: They are not of one shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"shapes must agree exactly, for they are not broadcast: {shapes}; reshape them first")


def _as_tensor(value: ArrayLike, what: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be a tensor or an array of numbers: {error}") from error
    return tensor.detach().cpu()


def _require_matrix(tensor: Tensor, what: str) -> Tensor:
    if tensor.ndim != 2 or tensor.shape[1] < 2:
        raise InputError(
            f"{what} must be an N x K matrix with K of at least 2 classes, but have shape {tuple(tensor.shape)}; for "
            f"a binary problem give both columns"
        )
    return tensor


def _require_sum(sums: Tensor, expectation: str, advice: str) -> None:
    wrong = (sums - 1).abs() > SUM_TOLERANCE
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise InputError(
            f"{expectation} in each row, but {int(wrong.sum())} of {len(sums)} rows do not, such as row {row} with "
            f"{float(sums[row]):.6g}; {advice}"
        )
