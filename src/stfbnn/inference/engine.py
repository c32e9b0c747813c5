"""What `fit` needs of an inference engine: steps that lower the variational free energy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior

# At one weight vector (d,): the minibatch's mean negative log-likelihood in nats per example, and its gradient (d,).
Loss = Callable[[Tensor], tuple[float, Tensor]]


class Engine(ABC):
    """Minimises F(q) = E_q[mean NLL] + (T/N) KL(q‖p) over the posterior's parameters, one minibatch a step."""

    name: ClassVar[str]

    def __init__(self, posterior: Posterior, prior: GaussianPrior, num_examples: int) -> None:
        self.posterior = posterior
        self.prior = prior
        self.num_examples = num_examples
        self.temperature = 1.0
        self.step_count = 0
        self.total_steps = 1

    def begin(self, temperature: float, total_steps: int) -> None:
        """Start a schedule of ``total_steps`` steps at temperature T, from where the posterior stands."""
        self.temperature = temperature
        self.total_steps = total_steps
        self.step_count = 0

    @abstractmethod
    def step(self, loss: Loss, generator: torch.Generator) -> float:
        """Do one step on one minibatch, drawing noise from a CPU generator.

        Returns:
            The minibatch's mean negative log-likelihood per example, averaged over the draws, in nats.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the posterior: tensors and numbers."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def prior_changed(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Take note that the prior's scale was learned anew; by default nothing depends on it."""

    def noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal noise for one draw."""
        mean = self.posterior.mean_vector()
        return torch.randn(self.posterior.noise_size, generator=generator).to(mean)


def cosine_decay(step: int, total: int) -> float:
    """From 1 at step 0 to 0 at ``total``, along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


def require_positive(**settings: float) -> None:
    """Refuse settings that are not positive and finite, by name.

    Raises:
        InputError: One is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{name} must be positive and finite, but it is {value!r}")


def require_count(**settings: int) -> None:
    """Refuse settings that are not positive integers, by name.

    Raises:
        InputError: One is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, but it is {value!r}")
