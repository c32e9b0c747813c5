"""The loss of one minibatch and its gradient, chunk by chunk.

The frozen trunk treats every example apart from the others (its batch norm uses running statistics), so a minibatch may be
cut into chunks whose gradients add up to the minibatch's exactly. Only one chunk's activations are in memory at a time, and
on a CPU they stay in its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, rows
from stfbnn.draws import chunk_rows
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork


class MinibatchLoss:
    """E over a minibatch of −log p(y | x, w), at any w.

    Args:
        bnn: The network.
        likelihood: p(y | output); its noise, where it is learned, is updated at every call.
        inputs: B examples, on the network's device.
        target: Their targets.
        noise_weight: How far a call moves the learned noise towards this minibatch's estimate, in (0, 1].
    """

    def __init__(
        self, bnn: BayesianNetwork, likelihood: Likelihood, inputs: Inputs, target: Tensor, noise_weight: float
    ) -> None:
        size = batch_size(inputs)
        step = chunk_rows(inputs, bnn.device)
        self._chunks = [
            (rows(inputs, start, start + step), target[start : start + step]) for start in range(0, size, step)
        ]
        self._bnn, self._likelihood = bnn, likelihood
        self._size, self._noise_weight = size, noise_weight

    def __call__(self, vector: Tensor) -> tuple[float, Tensor]:
        """The loss in nats per example and its gradient (d,) at the weights ``vector`` (d,)."""
        weights = vector.detach().requires_grad_()
        total = torch.zeros((), device=vector.device)
        gradient = torch.zeros_like(weights)
        for inputs, target in self._chunks:
            outputs = self._bnn.outputs(weights, inputs)
            share = len(target) / self._size
            self._likelihood.update(outputs.detach(), target, self._noise_weight * share)
            loss = -self._likelihood.log_prob(outputs, target).mean() * share
            gradient += torch.autograd.grad(loss, weights)[0]
            total += loss.detach()
        return float(total), gradient
