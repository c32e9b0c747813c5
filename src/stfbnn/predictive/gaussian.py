"""Numbers with Gaussian noise: mixtures of one Gaussian a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stfbnn.likelihood import Gaussian, HeteroscedasticGaussian
from stfbnn.likelihood.base import require_matching
from stfbnn.likelihood.gaussian import LOG_TWO_PI
from stfbnn.predictive.base import Prediction, undefined
from stfbnn.predictive.weighting import average, log_average, variance

_NO_ENTROPY = "a regression has no closed-form entropy; use .std, or its parts .aleatoric and .epistemic"
_NO_PROBS = "a regression has .mean and .std; .probs belongs to a classification"


@dataclass(frozen=True)
class GaussianPrediction(Prediction):
    """Means and standard deviations, in the targets' unit: a mixture of one Gaussian a draw, with one noise for all.

    Attributes:
        draws: The draws' means, (S, N, …).
        noise_std: Standard deviation of the observation noise, broadcastable to (N, …).
        weights: What each draw counts, (S,), summing to 1; None where all count the same.
    """

    draws: Tensor
    noise_std: Tensor
    weights: Tensor | None = None
    _rows: ClassVar[dict[str, int]] = {"draws": 1}

    @classmethod
    def from_draws(
        cls, likelihood: Gaussian, outputs: Tensor, weights: Tensor | None, at_mean: bool
    ) -> GaussianPrediction:
        """From the outputs of all draws, (S, N, …)."""
        return cls(len(outputs), at_mean, outputs, likelihood.noise_std.detach().cpu().clone(), weights)

    @property
    def mean(self) -> Tensor:
        """E[y | x], (N, …)."""
        return average(self.draws, self.weights).to(self.draws.dtype)

    @property
    def aleatoric(self) -> Tensor:
        """Variance of the noise, (N, …), in the targets' unit squared."""
        return self.noise_std.square().to(self.draws.dtype).expand(self.draws.shape[1:])

    @property
    def epistemic(self) -> Tensor:
        """Variance of the draws' means, (N, …), in the targets' unit squared."""
        return variance(self.draws, self.weights).to(self.draws.dtype)

    @property
    def std(self) -> Tensor:
        """Standard deviation of y, √(aleatoric + epistemic) (law of total variance), (N, …)."""
        return (self.aleatoric + self.epistemic).sqrt()

    entropy = undefined(_NO_ENTROPY)
    probs = undefined(_NO_PROBS)

    def log_density(self, targets: Tensor) -> Tensor:
        """Log density of the mixture over the draws, by logsumexp, (N,); in nats per unit of the targets."""
        likelihood = Gaussian(noise_std=self.noise_std.tolist())
        likelihood.check(self.draws[0], targets)
        targets = targets.cpu().double()
        logs = torch.stack([likelihood.log_prob(draw.double(), targets) for draw in self.draws])
        return log_average(logs, self.weights)


@dataclass(frozen=True)
class HeteroscedasticPrediction(Prediction):
    """Means and standard deviations, in the targets' unit: a mixture of one Gaussian a draw, each with a noise of its own.

    Attributes:
        draws: The draws' means, (S, N, K, …).
        noise_std: The draws' standard deviations of the noise, (S, N, K, …).
        weights: What each draw counts, (S,), summing to 1; None where all count the same.
    """

    draws: Tensor
    noise_std: Tensor
    weights: Tensor | None = None
    _rows: ClassVar[dict[str, int]] = {"draws": 1, "noise_std": 1}

    @classmethod
    def from_draws(
        cls, likelihood: HeteroscedasticGaussian, outputs: Tensor, weights: Tensor | None, at_mean: bool
    ) -> HeteroscedasticPrediction:
        """From the outputs of all draws, (S, N, 2K, …)."""
        mean, log_variance = likelihood.heads(outputs.flatten(0, 1))
        shape = (*outputs.shape[:2], *mean.shape[1:])
        return cls(len(outputs), at_mean, mean.reshape(shape), (0.5 * log_variance).exp().reshape(shape), weights)

    @property
    def mean(self) -> Tensor:
        """E[y | x], (N, K, …)."""
        return average(self.draws, self.weights).to(self.draws.dtype)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of the draws' noise variances, (N, K, …), in the targets' unit squared."""
        return average(self.noise_std.double().square(), self.weights).to(self.draws.dtype)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the draws' means, (N, K, …), in the targets' unit squared."""
        return variance(self.draws, self.weights).to(self.draws.dtype)

    @property
    def std(self) -> Tensor:
        """Standard deviation of y, √(aleatoric + epistemic) (law of total variance), (N, K, …)."""
        return (self.aleatoric + self.epistemic).sqrt()

    entropy = undefined(_NO_ENTROPY)
    probs = undefined(_NO_PROBS)

    def log_density(self, targets: Tensor) -> Tensor:
        """Log density of the mixture over the draws, by logsumexp, (N,); in nats per unit of the targets."""
        HeteroscedasticGaussian().check_targets(self.draws[0], targets)
        require_matching(self.draws[0], targets)
        targets = targets.cpu().double()
        # Equal but for a last dimension of 1.
        shape = (len(self.draws), *targets.shape)
        mean, std = self.draws.double().reshape(shape), self.noise_std.double().reshape(shape)
        terms = -0.5 * ((targets - mean) / std).square() - std.log() - 0.5 * LOG_TWO_PI
        return log_average(terms.flatten(2).sum(dim=2) if terms.ndim > 2 else terms, self.weights)
