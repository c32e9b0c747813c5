"""The loss of one minibatch and its gradient, chunk by chunk.

The frozen trunk treats every example apart from the others (its batch norm uses running statistics), so a minibatch may be
cut into chunks whose gradients add up to the minibatch's exactly. Only one chunk's activations are in memory at a time, and
on a CPU they stay in its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stfbnn.batches import Batch, Inputs, batch_size, rechunk
from stfbnn.draws import chunk_rows
from stfbnn.inference.estimators import LayerForward, outputs_of_each
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork

# Weights of their own for each example take this much at once.
_PER_EXAMPLE_BYTES = 2**27


def chunks(batch: Batch, device: torch.device) -> list[Batch]:
    """Cut a minibatch into the chunks that are run at once on ``device``."""
    parts = list(rechunk([batch.inputs], chunk_rows(batch.inputs, device)))
    sizes = [batch_size(part) for part in parts]
    targets = torch.split(batch.target, sizes)
    weights = [None] * len(parts) if batch.weight is None else torch.split(batch.weight, sizes)
    return [Batch(*part) for part in zip(parts, targets, weights, strict=True)]


class MinibatchLoss:
    """(1/B) Σ_n a_n (−log p(y_n | x_n, w)) over a minibatch, at any w; what the likelihood learns is kept fixed meanwhile.

    The sum is divided by the number of examples, not by that of their weights a_n: it is an unbiased estimate of the same mean
    over all N rows, in which an example of weight 2 counts as one that is there twice.

    Args:
        bnn: The network.
        likelihood: p(y | output).
        inputs: B examples, on the network's device.
        target: Their targets.
        weight: What each example counts, (B,); None where all count 1.
    """

    def __init__(
        self, bnn: BayesianNetwork, likelihood: Likelihood, inputs: Inputs, target: Tensor, weight: Tensor | None = None
    ) -> None:
        batch = Batch(inputs, target, weight)
        self._chunks = chunks(batch, bnn.device)
        self._bnn, self._likelihood, self._size = bnn, likelihood, len(target)
        self.total_weight = batch.total_weight
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
        for chunk in self._chunks:
            sums.add(self._loss(self._bnn.outputs(weights, chunk.inputs), chunk))
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
        for chunk in self._chunks:
            for offset in range(0, len(chunk), step):
                stop = min(len(chunk), offset + step)
                weights = vectors[start + offset : start + stop].detach().requires_grad_()
                sums, part = _Sums((weights,)), chunk.rows(offset, stop)
                sums.add(self._loss(outputs_of_each(self._bnn, weights, part.inputs), part))
                gradients[start + offset : start + stop] = sums.gradients[0]
                total += sums.nll()
            start += len(chunk)
        self._calls += 1
        return total, gradients

    @torch.enable_grad()
    def through_layer(self, forward: LayerForward, leaves: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """The loss, and its gradients by ``leaves``, with ``forward(start, stop)`` in place of the first layer's forward."""
        sums, start = _Sums(leaves), 0
        for chunk in self._chunks:
            stop = start + len(chunk)
            with self._bnn.layer_forward(forward(start, stop)):
                outputs = self._bnn.run(self._bnn.network, chunk.inputs)
            sums.add(self._loss(outputs, chunk))
            start = stop
        self._calls += 1
        return sums.nll(), tuple(sums.gradients)

    @property
    def learned(self) -> Tensor | None:
        """What the likelihood would learn, the mean over all calls so far; None where it learns nothing."""
        return None if self._estimate is None else self._estimate / self._calls

    def _loss(self, outputs: Tensor, part: Batch) -> Tensor:
        """These examples' share of the minibatch's loss."""
        counts = part.total_weight
        if counts > 0:
            estimate = self._likelihood.estimate(outputs.detach(), part.target, part.weight)
            if estimate is not None:
                share = counts / self.total_weight
                self._estimate = share * estimate + (0 if self._estimate is None else self._estimate)
        each = part.weighted(self._likelihood.log_prob(outputs, part.target))
        return -each.mean() * (len(part) / self._size)


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
