"""What every estimator of E_q[−log p(y|x,w)] and its gradient shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from stfbnn.batches import Inputs
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count
from stfbnn.network import BayesianNetwork

# For examples start … stop of a minibatch: the first layer's stand-in, from its input to its output.
LayerForward = Callable[[int, int], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Sampler:
    """q(w) as an engine sees it: a differentiable map from its own leaves and standard normal noise to weights.

    Attributes:
        leaves: Tensors that require gradients, by which the estimators differentiate.
        draw: Noise (..., noise_size) to weights (..., d).
        moments: The mean and the marginal standard deviations, (d,) each, differentiable in the leaves.
        noise_size: Standard normal numbers a draw takes.
    """

    leaves: tuple[Tensor, ...]
    draw: Callable[[Tensor], Tensor]
    moments: Callable[[], tuple[Tensor, Tensor]]
    noise_size: int

    def noise(self, generator: torch.Generator, *leading: int) -> Tensor:
        """Standard normal noise (*leading, noise_size) from a CPU generator, like the leaves."""
        return torch.randn(*leading, self.noise_size, generator=generator).to(self.leaves[0])


@dataclass(frozen=True)
class Estimate:
    """One minibatch's estimate.

    Attributes:
        nll: E_q of the mean negative log-likelihood, nats per example.
        gradients: Its gradient by each of the sampler's leaves.
    """

    nll: float
    gradients: tuple[Tensor, ...]


class Minibatch(Protocol):
    """A minibatch of B examples, whose mean negative log-likelihood can be had in several ways."""

    def __call__(self, vector: Tensor) -> tuple[float, Tensor]:
        """At one weight vector (d,): the loss and its gradient (d,)."""

    @property
    def size(self) -> int:
        """B."""

    def per_example(self, vectors: Tensor) -> tuple[float, Tensor]:
        """At one weight vector for each example, (B, d): the loss and its gradient (B, d)."""

    def through_layer(self, forward: LayerForward, leaves: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """With a stand-in for the first layer's forward: the loss and its gradients by ``leaves``."""

    @property
    def network(self) -> BayesianNetwork:
        """The network that it runs through."""


class Estimator(ABC):
    """An unbiased estimator of a minibatch's E_q[NLL] and its gradient.

    Args:
        draws: Passes through the network for one estimate, averaged.
        antithetic: Draw them in pairs ±ε: what is odd in ε cancels exactly.
    """

    name: ClassVar[str]

    def __init__(self, draws: int = 2, antithetic: bool = True) -> None:
        require_count(draws=draws)
        if antithetic and draws % 2:
            raise InputError(f"antithetic draws come in pairs: draws must be even, but it is {draws}")
        self.draws = draws
        self.antithetic = antithetic

    def __repr__(self) -> str:
        """As it would be constructed."""
        return f"{type(self).__name__}(draws={self.draws}, antithetic={self.antithetic})"

    def check(self, bnn: BayesianNetwork, example: Inputs) -> None:  # noqa: B027 - most suit every network
        """Refuse a network or a posterior family for which the estimator is not right, given a few rows of inputs.

        Raises:
            InputError: Says why, and what to use.
        """

    @abstractmethod
    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        """One estimate, with noise from a CPU generator."""

    def at_point(self, minibatch: Minibatch, vector: Tensor) -> tuple[float, Tensor]:
        """The minibatch's loss and its gradient (d,) at one weight vector (d,), where there is nothing to draw."""
        return minibatch(vector)

    def noises(self, fresh: Callable[[], Tensor]) -> Iterator[Tensor]:
        """The noise of each draw: fresh, or that of the draw before with its sign turned."""
        noise = torch.empty(0)
        for index in range(self.draws):
            noise = -noise if self.antithetic and index % 2 else fresh()
            yield noise


class Average:
    """The mean of several estimates."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._nll = 0.0
        self._gradients: tuple[Tensor, ...] | None = None

    def add(self, nll: float, gradients: tuple[Tensor, ...]) -> None:
        """Take one."""
        self._nll += nll / self._count
        if self._gradients is None:
            self._gradients = tuple(gradient / self._count for gradient in gradients)
        else:
            for total, gradient in zip(self._gradients, gradients, strict=True):
                total.add_(gradient, alpha=1 / self._count)

    def result(self) -> Estimate:
        """The mean."""
        assert self._gradients is not None  # noqa: S101 - there is always a draw
        return Estimate(self._nll, self._gradients)
