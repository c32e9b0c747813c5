"""Estimators that draw whole weight vectors: one for all examples of a minibatch, or one for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, map_tensors
from stfbnn.errors import InputError
from stfbnn.inference.estimators.base import Average, Estimate, Estimator, Minibatch, Sampler
from stfbnn.network import BayesianNetwork


class SharedSample(Estimator):
    """One weight draw for the whole minibatch; works for every layer and every family.

    Args:
        draws: Draws for one estimate.
        antithetic: Draw in pairs ±ε.
    """

    name: ClassVar[str] = "shared"

    def __init__(self, draws: int = 1, antithetic: bool = False) -> None:
        super().__init__(draws, antithetic)

    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        """The mean over the draws of loss(w), w = draw(ε), and the chain rule through draw."""
        average = Average(self.draws)
        for noise in self.noises(lambda: sampler.noise(generator)):
            with torch.enable_grad():
                weights = sampler.draw(noise)
            nll, gradient = minibatch(weights.detach())
            average.add(nll, _chain(weights, sampler, gradient))
        return average.result()


class PerExample(Estimator):
    """An independent weight draw for every example: the noise of a minibatch averages out as its size grows.

    The trunk must run example by example under ``torch.vmap``. A minibatch's weights take B·d numbers, in pieces.

    Args:
        draws: Draws for each example and estimate.
        antithetic: Draw in pairs ±ε.
    """

    name: ClassVar[str] = "per-example"

    def check(self, bnn: BayesianNetwork, example: Inputs) -> None:
        """Only where the network runs example by example."""
        # With gradients: some operations can be run so, but not differentiated.
        with torch.enable_grad():
            weights = bnn.trained_vector().to(bnn.posterior.mean_vector())
            vectors = weights.repeat(batch_size(example), 1).requires_grad_()
            outputs = outputs_of_each(bnn, vectors, example)
            try:
                torch.autograd.grad(outputs.sum(), vectors)
            except RuntimeError as error:
                raise _unusable(error) from error

    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        """The mean over examples and draws of loss(w_n; x_n, y_n)."""
        average = Average(self.draws)
        for noise in self.noises(lambda: sampler.noise(generator, minibatch.size)):
            with torch.enable_grad():
                weights = sampler.draw(noise)
            nll, gradient = minibatch.per_example(weights.detach())
            average.add(nll, _chain(weights, sampler, gradient))
        return average.result()


def outputs_of_each(bnn: BayesianNetwork, vectors: Tensor, inputs: Inputs) -> Tensor:
    """The network's outputs for B examples with weights of their own, ``vectors`` (B, d).

    Raises:
        InputError: The network cannot run example by example under ``torch.vmap``.
    """

    def one(vector: Tensor, example: Inputs) -> Tensor:
        return bnn.outputs(vector, map_tensors(example, lambda tensor: tensor.unsqueeze(0))).squeeze(0)

    try:
        with _plain_attention():
            outputs: Tensor = torch.vmap(one)(vectors, inputs)
    except (RuntimeError, ValueError) as error:
        raise _unusable(error) from error
    return outputs


def _unusable(error: Exception) -> InputError:
    return InputError(
        f'the network cannot run with weights of their own for each example ({error}); use estimator="antithetic"'
    )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """No fused attention within a block: under vmap it does not see that gradients are needed, and it has none."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _chain(weights: Tensor, sampler: Sampler, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weights, sampler.leaves, gradient)
