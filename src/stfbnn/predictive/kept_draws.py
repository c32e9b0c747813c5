"""Keeping the outputs of all draws, for predictions whose density needs them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stfbnn.likelihood import Likelihood
from stfbnn.predictive.base import Prediction, Sums
from stfbnn.predictive.weighting import draw_weights, normalised

# From the likelihood, the outputs (S, B, …), the normalised weights (None where all are equal) and whether this is the
# prediction at the mean.
Build = Callable[[Any, Tensor, Tensor | None, bool], Prediction]


class DrawSums(Sums):
    """The outputs of all draws of one chunk, on the CPU.

    Args:
        likelihood: What the outputs mean.
        build: Makes the prediction.
    """

    def __init__(self, likelihood: Likelihood, build: Build) -> None:
        self._likelihood, self._build = likelihood, build
        self._draws: list[Tensor] = []
        self._weights: list[float] = []

    def add(self, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Take the outputs of some draws, (draws, B, …)."""
        if not self._draws:
            self._likelihood.check_outputs(outputs[0])
        self._weights += draw_weights(weights, len(outputs))
        self._draws.append(outputs.float().cpu() if outputs.dtype != torch.float64 else outputs.cpu())

    def finish(self, at_mean: bool) -> Prediction:
        """The chunk's prediction."""
        return self._build(self._likelihood, torch.cat(self._draws), normalised(self._weights), at_mean)
