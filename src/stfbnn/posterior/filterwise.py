"""The filterwise Gaussian: one full covariance for each output unit of the first layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.posterior.block_gaussian import (
    DEFAULT_MAX_BYTES,
    BlockGaussianPosterior,
    check_settings,
    initial_std,
    require_memory,
)
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.prior import GaussianPrior

FAMILY = "filterwise"


def unit_index(layout: ParameterLayout) -> Tensor:
    """Which entries of w belong to each output unit, shape (U, k): of every parameter, in turn, its row u, flattened.

    For a layer with weight and bias, block u is ``weight[u].flatten()`` followed by ``bias[u]``. In a transposed convolution,
    whose weight has the input channels first, it is ``weight[:, u].flatten()``; with groups, the rows of u's group and the
    column of u within it. A row of an embedding is a token's vector, that of a recurrent layer one gate of one hidden unit (in
    all of its layers and directions together).

    Raises:
        InputError: The parameters do not all have the same number of units.
    """
    parts = torch.split(torch.arange(layout.size), list(layout.sizes))
    rows = [
        _rows(layout, name, part.reshape(shape))
        for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)
    ]
    if len({len(part) for part in rows}) != 1 or not rows[0].numel():
        shapes = ", ".join(f"{name} {shape}" for name, shape in zip(layout.names, layout.shapes, strict=True))
        raise InputError(
            f"a filterwise posterior needs a layer whose parameters all have one row for each output unit, but this one's are "
            f'{shapes}; take posterior="low-rank" or "mean-field"'
        )
    return torch.cat(rows, dim=1)


def _rows(layout: ParameterLayout, name: str, entries: Tensor) -> Tensor:
    """The entries of one parameter, a row for each unit, (U, …); no rows where it has none."""
    if entries.ndim == 0 or len(entries) == 0:
        return entries.new_empty(0, 0)
    if layout.transposed_groups is None or name == "bias":
        return entries.flatten(1) if entries.ndim > 1 else entries.unsqueeze(1)
    if name != "weight":
        # Of a parametrised weight: its rows are those of the input channels.
        return entries.new_empty(0, 0)
    groups, columns = layout.transposed_groups, entries.shape[1]
    return entries.reshape(groups, -1, columns, entries[0, 0].numel()).transpose(1, 2).reshape(groups * columns, -1)


@dataclass(frozen=True)
class Filterwise:
    """Recipe for a Gaussian with one full covariance for each output unit, and none between units.

    A 3x3 filter over three channels has 27 weights, so its covariance is 27x27; for a dense layer of 784 inputs and 256
    units, all covariances together are 630 MB in float32.

    Attributes:
        initial_std: σ at the start of inference, for all weights; None leaves it to inference, which estimates one from
            the curvature of the loss (before that, σ is a tenth of the prior's).
        max_bytes: A layer for which inference would take more memory than this is refused.

    Raises:
        InputError: A setting is out of range.
    """

    initial_std: float | None = None
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        check_settings(self.initial_std, self.max_bytes)

    @property
    def name(self) -> str:
        """``"filterwise"``."""
        return FAMILY

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> BlockGaussianPosterior:
        """Make the posterior N(mean, initial_std² I).

        Raises:
            InputError: The layer's parameters have no common output units, or it would take too much memory.
        """
        index = unit_index(layout)
        units, size = index.shape
        require_memory(FAMILY, units, size, mean.element_size(), self.max_bytes)
        config: dict[str, Any] = {"max_bytes": self.max_bytes}
        return BlockGaussianPosterior(layout, mean, initial_std(self.initial_std, mean, prior), index, FAMILY, config)
