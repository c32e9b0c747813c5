"""Class probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood import Categorical
from stfbnn.likelihood.base import per_example
from stfbnn.likelihood.categorical import picked
from stfbnn.predictive.base import Prediction, Sums, undefined
from stfbnn.predictive.weighting import draw_weights


@dataclass(frozen=True)
class CategoricalPrediction(Prediction):
    """Class probabilities and their uncertainty; entropies in nats.

    The classes are at dimension 1, also where the network has them at the last one (``Categorical(class_dim=-1)``):
    ``probs.movedim(1, -1)`` has them there.

    Attributes:
        log_probs: log p(k | x), the logarithm of the averaged probabilities, (N, K, …).
        aleatoric: Mean entropy of the draws, (N, …): what would remain if the weights were known.
        ignore_index: The target that marks positions to leave out, which the likelihood was given; None for none.
    """

    log_probs: Tensor
    aleatoric: Tensor
    ignore_index: int | None = None
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
        """log p(y_n | x_n), summed over an example's positions but those whose target is ``ignore_index``, (N,).

        Raises:
            InputError: The targets are not class indices (N, …).
        """
        if targets.shape != self.aleatoric.shape:
            raise InputError(
                f"for these predictions targets must be class indices of shape {tuple(self.aleatoric.shape)}, but their "
                f"shape is {tuple(targets.shape)}"
            )
        Categorical(ignore_index=self.ignore_index).check_targets(self.log_probs, targets)
        return per_example(picked(self.log_probs, targets.cpu(), self.ignore_index))

    mean = undefined("a classification has .probs, .labels and .confidence; .mean and .std belong to a regression")
    std = mean


class CategoricalSums(Sums):
    """Running sums: memory does not grow with the number of draws.

    Args:
        likelihood: What the outputs mean.
        temperature: τ, by which every draw's logits are divided.
    """

    def __init__(self, likelihood: Categorical, temperature: float) -> None:
        self._likelihood = likelihood
        self._temperature = temperature
        self._log_sum: Tensor | None = None
        self._entropy_sum = torch.zeros(())
        self._weights: list[float] = []

    def add(self, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Take the outputs of some draws, (draws, B, K, …)."""
        numbers = draw_weights(weights, len(outputs))
        for draw, weight in zip(outputs, numbers, strict=True):
            if self._log_sum is None:
                self._likelihood.check_outputs(draw)
            log_probs = self._likelihood.log_probs(in_double(draw), self._temperature)
            entropy = -(log_probs.exp() * log_probs).sum(dim=1)
            weighted = log_probs if weight == 1 else log_probs + math.log(weight)
            self._log_sum = weighted if self._log_sum is None else torch.logaddexp(self._log_sum, weighted)
            self._entropy_sum = self._entropy_sum.to(entropy) + weight * entropy
        self._weights += numbers

    def finish(self, at_mean: bool) -> Prediction:
        """The chunk's prediction."""
        assert self._log_sum is not None  # noqa: S101 - there is always a draw
        total = math.fsum(self._weights)
        return CategoricalPrediction(
            samples=len(self._weights),
            at_mean=at_mean,
            log_probs=(self._log_sum - math.log(total)).cpu(),
            aleatoric=(self._entropy_sum / total).cpu(),
            ignore_index=self._likelihood.ignore_index,
        )


def in_double(outputs: Tensor) -> Tensor:
    """For sums of many small probabilities; in float32 on Apple's accelerator, which has no float64."""
    return outputs.float() if outputs.device.type == "mps" else outputs.double()
