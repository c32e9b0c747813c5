"""The rows of a table: their batches, their scale, and which of them are held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_array
from torch import Tensor
from torch.utils.data import TensorDataset

from stfbnn.errors import InputError
from stfbnn.provenance import example_hashes
from stfbnn.randomness import generator

Array = NDArray[Any]


@dataclass(frozen=True)
class Table:
    """Rows with their targets.

    Attributes:
        X: Inputs, (N, D).
        y: Classes 0 … K−1 as int64, (N,); or numbers, (N,) or (N, K).
        weights: What each row counts, (N,), positive; None where all count 1.
    """

    X: Array
    y: Array
    weights: Array | None = None

    @classmethod
    def of(cls, X: Array, y: Array, sample_weight: Any, name: str = "sample_weight") -> Table:
        """Rows with what scikit-learn calls their weights; rows that do not count are left out.

        Raises:
            InputError: The weights are not one for each row, one is negative, or all are 0.
            ValueError: They are no numbers, or not finite.
        """
        if sample_weight is None:
            return cls(X, y)
        weights = check_array(sample_weight, ensure_2d=False, dtype=np.float64, input_name=name)
        if weights.shape != (len(X),):
            raise InputError(f"{name} must be one number for each row, ({len(X)},), but its shape is {weights.shape}")
        if (weights < 0).any() or not weights.any():
            raise InputError(
                f"{name} must not be negative, and not zero for every row, but it lies in {_span(weights)}"
            )
        return cls(X, y, weights).take(np.flatnonzero(weights))

    def take(self, rows: Array) -> Table:
        """Some of the rows."""
        return Table(self.X[rows], self.y[rows], None if self.weights is None else self.weights[rows])


@dataclass(frozen=True)
class RowBatches:
    """Batches of nearly equal sizes, in a new order at every pass where they are shuffled.

    Indexing the tensors once a batch is several times as fast as collecting rows one by one, which for the small networks
    of tables is what counts; and no single row is left over, of which batch normalisation could make nothing.

    Attributes:
        dataset: Inputs, targets and, where they have any, the examples' weights.
        size: The largest size of a batch.
        shuffle: Draw the order from torch's global generator, which the library seeds for every epoch.
    """

    dataset: TensorDataset
    size: int
    shuffle: bool = False

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.dataset)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for rows in order.tensor_split(len(self)):
            yield tuple(tensor[rows] for tensor in self.dataset.tensors)


@dataclass(frozen=True)
class Scale:
    """Shift and scale of columns: standardised = (values − mean) / std.

    Attributes:
        mean: A number for each column; 0 dimensions for a vector of values.
        std: Likewise; 1 where a column is constant.
    """

    mean: Array
    std: Array

    @classmethod
    def of(cls, values: Array, weights: Array | None = None) -> Scale:
        """The mean and the standard deviation of each column of ``values``, (N, D) or (N,), by the rows' weights (N,)."""
        wide = values.astype(np.float64)
        mean = np.average(wide, axis=0, weights=weights)
        std = np.sqrt(np.average(np.square(wide - mean), axis=0, weights=weights))
        # Rounding leaves a constant column with a spread that is not quite zero.
        constant = std <= 10 * np.finfo(np.float64).eps * np.abs(mean)
        return cls(mean, np.where(constant, 1.0, std))

    @classmethod
    def none(cls, values: Array) -> Scale:
        """The scale that changes nothing."""
        shape = values.shape[1:]
        return cls(np.zeros(shape), np.ones(shape))

    def apply(self, values: Array) -> Array:
        """Standardise, in float64."""
        scaled: Array = (values.astype(np.float64) - self.mean) / self.std
        return scaled


def hold_out_rows(X: Array, strata: Array | None, fraction: float, seed: int) -> tuple[Array, Array]:
    """Choose rows to be held out; rows with equal inputs stay together.

    A bootstrap sample, or a table of few columns, holds the same inputs many times: were some of them trained on and some
    held out, the temperature would be chosen on examples that training has seen. The different inputs are sorted by class
    after a random permutation, and every k-th is taken from a random start, so that each class is held out in proportion.

    Args:
        X: The inputs, (N, D).
        strata: The classes, (N,); None for a regression.
        fraction: The share of the different inputs to hold out, in (0, 1).
        seed: The same seed gives the same rows.

    Returns:
        The indices of the rest and of the rows that are held out, ascending.

    Raises:
        InputError: All inputs are equal.
    """
    # Adding zero makes −0 and 0 the same bytes.
    hashes = example_hashes(torch.from_numpy(np.ascontiguousarray(X + 0.0)))
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    groups = len(first)
    if groups < 2:
        raise InputError(
            f"nothing can be held out to choose the temperature on, for all {len(X)} rows of X are equal; give more data, "
            f"or a number as temperature="
        )
    random = generator(seed, "hold-out rows")
    order = torch.randperm(groups, generator=random).numpy()
    if strata is not None:
        order = order[np.argsort(strata[first[order]], kind="stable")]
    count = min(max(1, round(fraction * groups)), groups - 1)
    start = int(torch.randint(groups, (), generator=random))
    held = np.zeros(groups, dtype=bool)
    held[order[(np.arange(count) * groups + start) // count]] = True
    rows = held[group]
    return np.flatnonzero(~rows), np.flatnonzero(rows)


def _span(values: Array) -> str:
    return f"[{values.min():g}, {values.max():g}]"
