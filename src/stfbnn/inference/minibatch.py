"""The loss of one minibatch and its gradient, chunk by chunk.

The frozen trunk treats every example apart from the others (its batch norm uses running statistics), so a minibatch may be
cut into chunks whose gradients add up to the minibatch's exactly. Only one chunk's activations are in memory at a time, and
on a CPU they stay in its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, rechunk, rows
from stfbnn.draws import chunk_rows
from stfbnn.inference.estimators import LayerForward, outputs_of_each
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork

# Weights of their own for each example take this much at once.
_PER_EXAMPLE_BYTES = 2**27


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

    @property
    def size(self) -> int:
        """B."""
        return self._size

    @property
    def network(self) -> BayesianNetwork:
        """The network."""
        return self._bnn

    @torch.enable_grad()
    def __call__(self, vector: Tensor) -> tuple[float, Tensor]:
        """The loss in nats per example and its gradient (d,) at the weights ``vector`` (d,)."""
        weights = vector.detach().requires_grad_()
        sums = _Sums((weights,))
        for inputs, target in self._chunks:
            sums.add(self._loss(self._bnn.outputs(weights, inputs), target))
        self._calls += 1
        return sums.nll(), sums.gradients[0]

    @torch.enable_grad()
    def per_example(self, vectors: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient (B, d) with weights of its own, ``vectors`` (B, d), for every example.

        Raises:
            InputError: The network cannot run example by example under ``torch.vmap``.
        """
        gradients = torch.empty_like(vectors)
        total, start = 0.0, 0
        step = max(1, _PER_EXAMPLE_BYTES // (vectors.shape[1] * vectors.element_size()))
        for inputs, target in self._chunks:
            for offset in range(0, len(target), step):
                stop = min(len(target), offset + step)
                weights = vectors[start + offset : start + stop].detach().requires_grad_()
                sums = _Sums((weights,))
                outputs = outputs_of_each(self._bnn, weights, rows(inputs, offset, stop))
                sums.add(self._loss(outputs, target[offset:stop]))
                gradients[start + offset : start + stop] = sums.gradients[0]
                total += sums.nll()
            start += len(target)
        self._calls += 1
        return total, gradients

    @torch.enable_grad()
    def through_layer(self, forward: LayerForward, leaves: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """The loss, and its gradients by ``leaves``, with ``forward(start, stop)`` in place of the first layer's forward."""
        sums, start = _Sums(leaves), 0
        for inputs, target in self._chunks:
            stop = start + len(target)
            with self._bnn.layer_forward(forward(start, stop)):
                outputs = self._bnn.run(self._bnn.network, inputs)
            sums.add(self._loss(outputs, target))
            start = stop
        self._calls += 1
        return sums.nll(), tuple(sums.gradients)

    def move_likelihood(self, weight: float) -> None:
        """Move what the likelihood learns by ``weight`` in (0, 1] towards the mean estimate over all calls so far."""
        if self._estimate is not None:
            self._likelihood.move(self._estimate / self._calls, min(1.0, weight))

    def _loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """These examples' share of the minibatch's loss."""
        share = len(target) / self._size
        estimate = self._likelihood.estimate(outputs.detach(), target)
        if estimate is not None:
            self._estimate = share * estimate + (0 if self._estimate is None else self._estimate)
        return -self._likelihood.log_prob(outputs, target).mean() * share


class _Sums:
    """A loss and its gradients, added up chunk by chunk."""

    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        self._leaves = leaves
        self._total = torch.zeros((), device=leaves[0].device)
        self.gradients = [torch.zeros_like(leaf) for leaf in leaves]

    def add(self, loss: Tensor) -> None:
        for total, part in zip(self.gradients, torch.autograd.grad(loss, self._leaves), strict=True):
            total.add_(part)
        self._total += loss.detach()

    def nll(self) -> float:
        return float(self._total)
