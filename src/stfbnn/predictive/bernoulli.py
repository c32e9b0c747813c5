"""Probabilities of labels that are there or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from stfbnn.likelihood import Bernoulli
from stfbnn.likelihood.base import match, per_example, require_matching
from stfbnn.predictive.base import Prediction, Sums, undefined
from stfbnn.predictive.categorical import in_double
from stfbnn.predictive.weighting import draw_weights


@dataclass(frozen=True)
class BernoulliPrediction(Prediction):
    """Probabilities of 0-or-1 labels and their uncertainty, label by label; entropies in nats.

    Each label's uncertainty is its own: sum ``.aleatoric`` over an example's labels for the mean entropy of all of them. The
    sum of ``.entropy`` is that of independent labels, an upper bound of the joint entropy, for labels that share the uncertain
    weights depend on each other.

    Attributes:
        log_positive: log p(y = 1 | x), the logarithm of the averaged probabilities, (N,) or (N, K, …) as the outputs are.
        log_negative: log p(y = 0 | x), likewise; given apart because 1 − p loses a small probability.
        aleatoric: Mean entropy of the draws: what would remain if the weights were known, likewise.
    """

    log_positive: Tensor
    log_negative: Tensor
    aleatoric: Tensor
    _rows: ClassVar[dict[str, int]] = {"log_positive": 0, "log_negative": 0, "aleatoric": 0}

    @property
    def probs(self) -> Tensor:
        """p(y = 1 | x), averaged over the draws, (N, …)."""
        return self.log_positive.exp()

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty of each label, (N, …)."""
        least = torch.finfo(self.log_positive.dtype).min
        positive, negative = self.log_positive.clamp_min(least), self.log_negative.clamp_min(least)
        return -(positive.exp() * positive + negative.exp() * negative)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information of each label and the weights, total − aleatoric, (N, …); rounding below zero is cut off."""
        if self.at_mean:
            return torch.zeros_like(self.aleatoric)
        return (self.entropy - self.aleatoric).clamp_min(0)

    @property
    def labels(self) -> Tensor:
        """1 where p(y = 1 | x) is above ½, else 0, (N, …)."""
        return (self.log_positive > self.log_negative).long()

    @property
    def confidence(self) -> Tensor:
        """The probability of what ``.labels`` says, (N, …)."""
        return torch.maximum(self.log_positive, self.log_negative).exp()

    def log_density(self, targets: Tensor) -> Tensor:
        """Σ over an example's labels of log p(y | x), each averaged over the draws, (N,)."""
        Bernoulli().check_targets(self.log_positive, targets)
        require_matching(self.log_positive, targets)
        is_there = targets.cpu() == 1
        positive, negative = match(self.log_positive, is_there), match(self.log_negative, is_there)
        return per_example(torch.where(is_there, positive, negative))

    mean = undefined("labels have .probs, .labels and .confidence; .mean and .std belong to a regression")
    std = mean


class BernoulliSums(Sums):
    """Running sums: memory does not grow with the number of draws.

    Args:
        likelihood: What the outputs mean.
        temperature: τ, by which every draw's logits are divided.
    """

    def __init__(self, likelihood: Bernoulli, temperature: float) -> None:
        self._likelihood = likelihood
        self._temperature = temperature
        self._logs: tuple[Tensor, Tensor] | None = None
        self._entropy_sum = torch.zeros(())
        self._weights: list[float] = []

    def add(self, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Take the outputs of some draws, (draws, B, …)."""
        numbers = draw_weights(weights, len(outputs))
        for draw, weight in zip(outputs, numbers, strict=True):
            if self._logs is None:
                self._likelihood.check_outputs(draw)
            logits = self._likelihood.logits(in_double(draw), self._temperature)
            positive, negative = F.logsigmoid(logits), F.logsigmoid(-logits)
            entropy = -(positive.exp() * positive + negative.exp() * negative)
            if weight != 1:
                positive, negative = positive + math.log(weight), negative + math.log(weight)
            if self._logs is not None:
                positive = torch.logaddexp(self._logs[0], positive)
                negative = torch.logaddexp(self._logs[1], negative)
            self._logs = positive, negative
            self._entropy_sum = self._entropy_sum.to(entropy) + weight * entropy
        self._weights += numbers

    def finish(self, at_mean: bool) -> Prediction:
        """The chunk's prediction."""
        assert self._logs is not None  # noqa: S101 - there is always a draw
        total = math.fsum(self._weights)
        return BernoulliPrediction(
            samples=len(self._weights),
            at_mean=at_mean,
            log_positive=(self._logs[0] - math.log(total)).cpu(),
            log_negative=(self._logs[1] - math.log(total)).cpu(),
            aleatoric=(self._entropy_sum / total).cpu(),
        )
