"""Predictions with a likelihood of the user's own: the draws' outputs as they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stfbnn.likelihood import Likelihood
from stfbnn.predictive.base import Prediction, undefined
from stfbnn.predictive.weighting import average, log_average

_UNKNOWN = "what {} would be, a likelihood of one's own does not say; compute it from the draws' outputs, .draws"


@dataclass(frozen=True)
class CustomPrediction(Prediction):
    """The outputs of all draws, of which only the user knows what they mean.

    Attributes:
        draws: The draws' outputs, (S, N, …).
        likelihood: p(y | output).
        weights: What each draw counts, (S,), summing to 1; None where all count the same.
    """

    draws: Tensor
    likelihood: Likelihood
    weights: Tensor | None = None
    _rows: ClassVar[dict[str, int]] = {"draws": 1}

    @classmethod
    def from_draws(
        cls, likelihood: Likelihood, outputs: Tensor, weights: Tensor | None, at_mean: bool
    ) -> CustomPrediction:
        """From the outputs of all draws, (S, N, …)."""
        return cls(len(outputs), at_mean, outputs, copy.deepcopy(likelihood).cpu(), weights)

    @property
    def mean(self) -> Tensor:
        """Mean of the draws' outputs, (N, …); whether that is the mean of y is for the user to know."""
        return average(self.draws, self.weights).to(self.draws.dtype)

    std = undefined(_UNKNOWN.format(".std"))
    aleatoric = undefined(_UNKNOWN.format(".aleatoric"))
    epistemic = undefined(_UNKNOWN.format(".epistemic"))
    entropy = undefined(_UNKNOWN.format(".entropy"))
    probs = undefined(_UNKNOWN.format(".probs"))

    def log_density(self, targets: Tensor) -> Tensor:
        """Log density of the mixture over the draws, by logsumexp, (N,), in nats."""
        targets = targets.cpu()
        self.likelihood.check_targets(self.draws[0], targets)
        with torch.no_grad():
            logs = torch.stack([self.likelihood.log_prob(draw, targets).double() for draw in self.draws])
        return log_average(logs, self.weights)
