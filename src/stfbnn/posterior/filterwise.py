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

    For a layer with weight and bias, block u is ``weight[u].flatten()`` followed by ``bias[u]``.

    Raises:
        InputError: The parameters do not all have the same number of rows.
    """
    rows = {shape[0] if shape else 0 for shape in layout.shapes}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(f"{name} {shape}" for name, shape in zip(layout.names, layout.shapes, strict=True))
        raise InputError(
            f"a filterwise posterior needs a layer whose parameters all have one row for each output unit, but this one's are "
            f'{shapes}; take posterior="low-rank" or "mean-field"'
        )
    (units,) = rows
    parts = torch.split(torch.arange(layout.size), list(layout.sizes))
    return torch.cat([part.reshape(units, -1) for part in parts], dim=1)


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
