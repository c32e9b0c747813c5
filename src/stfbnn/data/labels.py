"""Targets: classes or values to regress, and class labels as indices 0 … K-1 that keep their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from stfbnn.data.source import Array, Part, Task, check_finite
from stfbnn.errors import DataError

# A table's whole-number target with more distinct values than this is taken for a quantity.
MOST_CLASSES_OF_A_TABLE = 20


def decide_task(part: Part, asked: Literal["classification", "regression"] | None) -> Task:
    """Say what the training targets are.

    Texts are classes. Integers that belong to images are classes. Whole numbers that belong to a table are
    classes where there are at most 20 distinct ones, each twice on average. All else is regression.

    Args:
        part: The training part.
        asked: The user's own word, which wins where the targets allow it.

    Raises:
        DataError: The targets cannot be what was asked for, or look like one-hot rows.
    """
    targets = part.targets
    if targets is None:
        if asked is not None:
            raise DataError(f"{part.where} has no targets, so there is nothing for task={asked!r}")
        return "unlabelled"
    texts = targets.dtype.kind in "US"
    if asked == "regression":
        if texts:
            raise DataError(f"{part.where} has the target {str(targets.flat[0])!r}, which is no number to regress")
        return "regression"
    if targets.ndim > 1:
        if asked == "classification" or _one_hot(targets):
            raise DataError(
                f"{part.where} has targets of shape {targets.shape}; classes are given as one label per example, "
                f"not as one-hot rows (take the argmax), unless task='regression' is meant"
            )
        return "regression"
    whole = texts or targets.dtype.kind in "biu" or bool(np.all(targets == np.round(targets)))
    if asked == "classification":
        if not whole:
            bad = targets[targets != np.round(targets)][0]
            raise DataError(
                f"{part.where} has the target {bad}, which is no class label; classes are texts or integers"
            )
        return "classification"
    if texts or (part.inputs.ndim > 2 and targets.dtype.kind in "biu"):
        return "classification"
    distinct = len(np.unique(targets))
    few = distinct <= MOST_CLASSES_OF_A_TABLE and 2 * distinct <= len(targets)
    return "classification" if whole and few else "regression"


def index_labels(
    train: Part, test: Part | None, names: Sequence[str] | None = None
) -> tuple[Array, Array | None, tuple[str, ...]]:
    """Turn labels into indices.

    Args:
        train: The training part; its labels are texts or whole numbers.
        test: The test part, or None.
        names: The names of the labels 0 … K-1 where the source lists them, else None: the classes are then the
            training part's distinct labels in ascending order (texts by their characters).

    Returns:
        Training indices (int64), test indices or None, and the names of the classes.

    Raises:
        DataError: A label is outside ``names``, or the test part has a label that training has not.
    """
    assert train.targets is not None  # noqa: S101 - the task is only classification where there are targets
    seen = _plain(train.targets)
    tested = None if test is None or test.targets is None else _plain(test.targets)
    if names is None:
        known = np.unique(seen)
        names = [str(label) for label in known]
    else:
        known = np.arange(len(names))
        _refuse_unknown(seen, known, f"{train.where} has the labels", f"the names of {len(names)} classes are given")
    if tested is not None and test is not None:
        if seen.dtype.kind != tested.dtype.kind:
            raise DataError(f"{test.where} and {train.where} must both have numbers or both have texts as labels")
        _refuse_unknown(
            tested, known, f"{test.where} has the labels", f"the training part has only {_some(list(names))}"
        )
    indices = None if tested is None else np.searchsorted(known, tested)
    return np.searchsorted(known, seen), indices, tuple(names)


def regression_values(part: Part) -> Array | None:
    """The targets of a part as finite float32 values, N or N x D.

    Raises:
        DataError: They are not numbers, or not finite.
    """
    if part.targets is None:
        return None
    if part.targets.dtype.kind not in "fbiu":
        raise DataError(f"{part.where} has the target {str(part.targets.flat[0])!r}, which is no number to regress")
    with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite and is named as such
        values = part.targets.astype(np.float32)
    check_finite(values, f"the target of {part.where}")
    return values


def _plain(labels: Array) -> Array:
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def _refuse_unknown(labels: Array, known: Array, found: str, expected: str) -> None:
    unknown = np.setdiff1d(labels, known)
    if len(unknown):
        raise DataError(
            f"{found} {_some([str(label) for label in unknown])}, but {expected}; correct the labels "
            f"or drop these examples"
        )


def _one_hot(targets: Array) -> bool:
    return targets.dtype.kind in "fbiu" and bool(
        np.isin(targets, (0, 1)).all() and (targets.astype(np.float64).sum(1) == 1).all()
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(repr, names[:most])) + (" …" if len(names) > most else "")
