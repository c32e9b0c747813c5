"""The loss of one minibatch and its gradient, chunk by chunk.

The frozen trunk treats every example apart from the others (its batch norm uses running statistics), so a minibatch may be
cut into chunks whose gradients add up to the minibatch's exactly. Only one chunk's activations are in memory at a time, and
on a CPU they stay in its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, rechunk
from stfbnn.draws import chunk_rows
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork


def chunks(inputs: Inputs, target: Tensor, device: torch.device) -> list[tuple[Inputs, Tensor]]:
    """Cut a minibatch into the chunks that are run at once on ``device``."""
    parts = list(rechunk([inputs], chunk_rows(inputs, device)))
    targets = torch.split(target, [batch_size(part) for part in parts])
    return list(zip(parts, targets, strict=True))


class MinibatchLoss:
    """The mean over a minibatch of −log p(y | x, w), at any w; what the likelihood learns is kept fixed meanwhile.

    Args:
        bnn: The network.
        likelihood: p(y | output).
        inputs: B examples, on the network's device.
        target: Their targets.
    """

    def __init__(self, bnn: BayesianNetwork, likelihood: Likelihood, inputs: Inputs, target: Tensor) -> None:
        self._chunks = chunks(inputs, target, bnn.device)
        self._bnn, self._likelihood, self._size = bnn, likelihood, len(target)
        self._estimate: Tensor | None = None
        self._calls = 0

    @torch.enable_grad()
    def __call__(self, vector: Tensor) -> tuple[float, Tensor]:
        """The loss in nats per example and its gradient (d,) at the weights ``vector`` (d,)."""
        weights = vector.detach().requires_grad_()
        total = torch.zeros((), device=vector.device)
        gradient = torch.zeros_like(weights)
        self._calls += 1
        for inputs, target in self._chunks:
            outputs = self._bnn.outputs(weights, inputs)
            share = len(target) / self._size
            loss = -self._likelihood.log_prob(outputs, target).mean() * share
            gradient += torch.autograd.grad(loss, weights)[0]
            total += loss.detach()
            estimate = self._likelihood.estimate(outputs.detach(), target)
            if estimate is not None:
                self._estimate = share * estimate + (0 if self._estimate is None else self._estimate)
        return float(total), gradient

    def move_likelihood(self, weight: float) -> None:
        """Move what the likelihood learns by ``weight`` in (0, 1] towards the mean estimate over all calls so far."""
        if self._estimate is not None:
            self._likelihood.move(self._estimate / self._calls, min(1.0, weight))
