"""What a prediction is: the predictive distribution of each example, and where its uncertainty comes from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood import Categorical, Gaussian, Likelihood


@dataclass(frozen=True)
class Prediction(ABC):
    """Predictions of N examples, as CPU tensors.

    Attributes:
        samples: Posterior draws that were averaged.
        at_mean: Whether this is the deterministic prediction at the posterior mean, without epistemic uncertainty.
    """

    samples: int
    at_mean: bool

    # Tensor fields, and along which dimension of each the examples lie.
    _rows: ClassVar[dict[str, int]]

    @abstractmethod
    def log_density(self, targets: Tensor) -> Tensor:
        """log p(y_n | x_n) of the averaged predictive, in nats, shape (N,)."""

    def __len__(self) -> int:
        name, dimension = next(iter(self._rows.items()))
        size: int = getattr(self, name).shape[dimension]
        return size

    @classmethod
    def concatenate(cls, parts: Sequence[Prediction]) -> Prediction:
        """Join the predictions of consecutive chunks."""
        first = parts[0]
        values: dict[str, Any] = {field.name: getattr(first, field.name) for field in fields(first)}
        for name, dimension in first._rows.items():
            values[name] = torch.cat([getattr(part, name) for part in parts], dim=dimension)
        return type(first)(**values)


@dataclass(frozen=True)
class CategoricalPrediction(Prediction):
    """Class probabilities and their uncertainty; entropies in nats.

    Attributes:
        log_probs: log p(k | x), the logarithm of the averaged probabilities, (N, K, …).
        aleatoric: Mean entropy of the draws, (N, …): what would remain if the weights were known.
    """

    log_probs: Tensor
    aleatoric: Tensor
    _rows: ClassVar[dict[str, int]] = {"log_probs": 0, "aleatoric": 0}

    @property
    def probs(self) -> Tensor:
        """p(k | x), averaged over the draws, (N, K, …)."""
        return self.log_probs.exp()

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty H[p(· | x)], (N, …)."""
        return -(self.probs * self.log_probs.clamp_min(torch.finfo(self.log_probs.dtype).min)).sum(dim=1)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information of class and weights, total − aleatoric, (N, …); rounding below zero is cut off."""
        if self.at_mean:
            return torch.zeros_like(self.aleatoric)
        return (self.entropy - self.aleatoric).clamp_min(0)

    @property
    def labels(self) -> Tensor:
        """The most probable class, (N, …)."""
        return self.log_probs.argmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """Its probability, (N, …)."""
        return self.probs.amax(dim=1)

    def log_density(self, targets: Tensor) -> Tensor:
        """log p(y_n | x_n), summed over an example's positions, (N,)."""
        Categorical().check_targets(self.log_probs, targets)
        picked = self.log_probs.gather(1, targets.long().cpu().unsqueeze(1)).squeeze(1)
        return picked.flatten(1).sum(dim=1) if picked.ndim > 1 else picked

    @property
    def mean(self) -> Tensor:
        """Not defined for classes."""
        raise InputError("a classification has .probs, .labels and .confidence; .mean and .std belong to a regression")

    @property
    def std(self) -> Tensor:
        """Not defined for classes."""
        return self.mean


@dataclass(frozen=True)
class GaussianPrediction(Prediction):
    """Means and standard deviations, in the targets' unit: a mixture of one Gaussian a draw.

    Attributes:
        draws: The draws' means, (S, N, …).
        noise_std: Standard deviation of the observation noise, broadcastable to (N, …).
    """

    draws: Tensor
    noise_std: Tensor
    _rows: ClassVar[dict[str, int]] = {"draws": 1}

    @property
    def mean(self) -> Tensor:
        """E[y | x], (N, …)."""
        return self.draws.double().mean(dim=0).to(self.draws.dtype)

    @property
    def aleatoric(self) -> Tensor:
        """Variance of the noise, (N, …), in the targets' unit squared."""
        return self.noise_std.square().to(self.draws.dtype).expand(self.draws.shape[1:])

    @property
    def epistemic(self) -> Tensor:
        """Variance of the draws' means, (N, …), in the targets' unit squared."""
        return self.draws.double().var(dim=0, correction=0).to(self.draws.dtype)

    @property
    def std(self) -> Tensor:
        """Standard deviation of y, √(aleatoric + epistemic) (law of total variance), (N, …)."""
        return (self.aleatoric + self.epistemic).sqrt()

    @property
    def entropy(self) -> Tensor:
        """Not defined: the entropy of a mixture of Gaussians has no closed form."""
        raise InputError("a regression has no closed-form entropy; use .std, or its parts .aleatoric and .epistemic")

    @property
    def probs(self) -> Tensor:
        """Not defined for numbers."""
        raise InputError("a regression has .mean and .std; .probs belongs to a classification")

    def log_density(self, targets: Tensor) -> Tensor:
        """Log density of the mixture over the draws, by logsumexp, (N,); in nats per unit of the targets."""
        likelihood = Gaussian(noise_std=self.noise_std.tolist())
        likelihood.check(self.draws[0], targets)
        targets = targets.cpu().double()
        logs = torch.stack([likelihood.log_prob(draw.double(), targets) for draw in self.draws])
        return logs.logsumexp(dim=0) - math.log(len(self.draws))


class CategoricalSums:
    """Running sums over the draws of one chunk: memory does not grow with the number of draws."""

    def __init__(self, likelihood: Categorical, temperature: float) -> None:
        self._likelihood = likelihood
        self._temperature = temperature
        self._log_sum: Tensor | None = None
        self._entropy_sum = torch.zeros(())
        self._count = 0

    def add(self, outputs: Tensor) -> None:
        """Take the outputs of some draws, (draws, B, K, …)."""
        for draw in outputs:
            if self._log_sum is None:
                self._likelihood.check_outputs(draw)
            log_probs = self._likelihood.log_probs(_precise(draw), self._temperature)
            entropy = -(log_probs.exp() * log_probs).sum(dim=1)
            self._log_sum = log_probs if self._log_sum is None else torch.logaddexp(self._log_sum, log_probs)
            self._entropy_sum = self._entropy_sum.to(entropy) + entropy
            self._count += 1

    def finish(self, at_mean: bool) -> Prediction:
        """The chunk's prediction."""
        assert self._log_sum is not None  # noqa: S101 - there is always a draw
        return CategoricalPrediction(
            samples=self._count,
            at_mean=at_mean,
            log_probs=(self._log_sum - math.log(self._count)).cpu(),
            aleatoric=(self._entropy_sum / self._count).cpu(),
        )


class GaussianSums:
    """The draws' means of one chunk; the mixture's density needs them all."""

    def __init__(self, likelihood: Gaussian) -> None:
        self._likelihood = likelihood
        self._draws: list[Tensor] = []

    def add(self, outputs: Tensor) -> None:
        """Take the outputs of some draws, (draws, B, …)."""
        if not self._draws:
            self._likelihood.check_outputs(outputs[0])
        self._draws.append(outputs.float().cpu() if outputs.dtype != torch.float64 else outputs.cpu())

    def finish(self, at_mean: bool) -> Prediction:
        """The chunk's prediction."""
        draws = torch.cat(self._draws)
        return GaussianPrediction(
            samples=len(draws),
            at_mean=at_mean,
            draws=draws,
            noise_std=self._likelihood.noise_std.detach().cpu().clone(),
        )


def sums_for(likelihood: Likelihood, temperature: float) -> CategoricalSums | GaussianSums:
    """The running sums that suit a likelihood.

    Raises:
        InputError: It is neither categorical nor Gaussian.
    """
    if isinstance(likelihood, Categorical):
        return CategoricalSums(likelihood, temperature)
    if isinstance(likelihood, Gaussian):
        return GaussianSums(likelihood)
    raise InputError(
        f"predictions need a likelihood that is stfbnn.Categorical, stfbnn.Gaussian or a subclass, not "
        f"{type(likelihood).__name__}"
    )


def _precise(outputs: Tensor) -> Tensor:
    # Sums of many small probabilities; Apple's accelerator has no float64.
    return outputs.float() if outputs.device.type == "mps" else outputs.double()
