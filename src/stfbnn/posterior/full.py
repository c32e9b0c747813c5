"""The full-covariance Gaussian over all weights of the first layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stfbnn.posterior.block_gaussian import (
    DEFAULT_MAX_BYTES,
    BlockGaussianPosterior,
    check_settings,
    initial_std,
    require_memory,
)
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.prior import GaussianPrior

FAMILY = "full"


@dataclass(frozen=True)
class Full:
    """Recipe for a Gaussian with a full covariance over all d weights: d² numbers, and O(d³) for a step on them.

    For first layers of up to a few thousand weights, such as those of small convolutional networks.

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
        """``"full"``."""
        return FAMILY

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> BlockGaussianPosterior:
        """Make the posterior N(mean, initial_std² I).

        Raises:
            InputError: It would take too much memory.
        """
        require_memory(FAMILY, 1, layout.size, mean.element_size(), self.max_bytes)
        index = torch.arange(layout.size).unsqueeze(0)
        config: dict[str, Any] = {"max_bytes": self.max_bytes}
        return BlockGaussianPosterior(layout, mean, initial_std(self.initial_std, mean, prior), index, FAMILY, config)
