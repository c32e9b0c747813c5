"""Counts: mixtures of one Poisson distribution a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stfbnn.likelihood import Poisson
from stfbnn.likelihood.base import require_matching
from stfbnn.predictive.base import Prediction, undefined
from stfbnn.predictive.weighting import average, log_average, variance


@dataclass(frozen=True)
class PoissonPrediction(Prediction):
    """Expected counts and their uncertainty: a mixture of one Poisson distribution a draw, wider than a Poisson.

    Attributes:
        log_rates: Logarithms of the draws' rates, (S, N, …).
        weights: What each draw counts in averages, (S,), summing to 1; None where all count the same.
    """

    log_rates: Tensor
    weights: Tensor | None = None
    _rows: ClassVar[dict[str, int]] = {"log_rates": 1}

    @classmethod
    def from_draws(
        cls, likelihood: Poisson, outputs: Tensor, weights: Tensor | None, at_mean: bool
    ) -> PoissonPrediction:
        """From the outputs of all draws, (S, N, …)."""
        del likelihood
        return cls(len(outputs), at_mean, outputs, weights)

    @property
    def mean(self) -> Tensor:
        """E[y | x], the mean of the rates, (N, …)."""
        return average(self.log_rates.double().exp(), self.weights).to(self.log_rates.dtype)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of the draws' variances, which are their rates, (N, …), in counts squared."""
        return self.mean

    @property
    def epistemic(self) -> Tensor:
        """Variance of the rates, (N, …), in counts squared."""
        return variance(self.log_rates.double().exp(), self.weights).to(self.log_rates.dtype)

    @property
    def std(self) -> Tensor:
        """Standard deviation of y, √(aleatoric + epistemic) (law of total variance), (N, …)."""
        return (self.aleatoric + self.epistemic).sqrt()

    entropy = undefined("counts have no closed-form entropy; use .std, or its parts .aleatoric and .epistemic")
    probs = undefined("counts have .mean and .std; for the probability of a count use .log_density(count).exp()")

    def log_density(self, targets: Tensor) -> Tensor:
        """Log probability of the counts under the mixture over the draws, by logsumexp, (N,)."""
        likelihood = Poisson()
        likelihood.check_targets(self.log_rates[0], targets)
        require_matching(self.log_rates[0], targets)
        targets = targets.cpu().double()
        logs = torch.stack([likelihood.log_prob(draw.double(), targets) for draw in self.log_rates])
        return log_average(logs, self.weights)
