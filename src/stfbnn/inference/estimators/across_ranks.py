"""One estimate from all ranks of a run: each draws weights of its own, on its own examples."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stfbnn.batches import Inputs
from stfbnn.inference.estimators.base import Estimate, Estimator, Minibatch, Sampler
from stfbnn.network import BayesianNetwork
from stfbnn.processes import Processes


class AcrossRanks(Estimator):
    """The mean of the ranks' own estimates, each weighted by the number of its examples; of a single rank its own.

    The gradient by the scale is the product of a rank's loss gradient and its noise, ĝ_r ε_r: it is these products that are
    averaged, for the product of the averages would be near 0 whatever the curvature. The posterior is the same on every rank,
    so that what an engine makes of the averages, such as ĝ_r ε_r / σ, is the average of what it would make of each.

    A step sums one vector over the ranks: the gradients by the leaves of q, the loss, and the number of examples.

    Args:
        own: What each rank estimates with.
        processes: The ranks.

    Attributes:
        examples: Of all ranks, at the last estimate.
    """

    name: ClassVar[str] = "across-ranks"

    def __init__(self, own: Estimator, processes: Processes) -> None:
        super().__init__(own.draws, own.antithetic)
        self._own, self._processes = own, processes
        self.examples = 0

    def check(self, bnn: BayesianNetwork, example: Inputs) -> None:
        """As each rank's own."""
        self._own.check(bnn, example)

    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        """The weighted mean over the ranks; each gives a generator of its own."""
        found = self._own.estimate(minibatch, sampler, generator)
        return self._mean(found.nll, found.gradients, minibatch.size)

    def at_point(self, minibatch: Minibatch, vector: Tensor) -> tuple[float, Tensor]:
        """The weighted mean over the ranks at one weight vector."""
        nll, gradient = self._own.at_point(minibatch, vector)
        found = self._mean(nll, (gradient,), minibatch.size)
        return found.nll, found.gradients[0]

    def _mean(self, nll: float, gradients: tuple[Tensor, ...], size: int) -> Estimate:
        self.examples = size
        if not self._processes.several:
            return Estimate(nll, gradients)
        figures = gradients[0].new_tensor([nll, 1.0])
        total = self._processes.sum(size * torch.cat([*(gradient.reshape(-1) for gradient in gradients), figures]))
        self.examples = round(float(total[-1]))
        *means, loss, _ = torch.split(total / total[-1], [*(gradient.numel() for gradient in gradients), 1, 1])
        return Estimate(
            float(loss), tuple(mean.reshape(like.shape) for mean, like in zip(means, gradients, strict=True))
        )
