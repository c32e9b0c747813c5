"""What `fit` needs of an inference engine: steps that lower the variational free energy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from stfbnn.inference.estimators import Estimator, Minibatch
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior


class Engine(ABC):
    """Minimises F(q) = E_q[mean NLL] + (T/N) KL(q‖p) over the posterior's parameters, one minibatch a step."""

    name: ClassVar[str]
    # Whether passing over the data again and again improves the answer.
    iterates: ClassVar[bool] = True

    def __init__(self, posterior: Posterior, prior: GaussianPrior, num_examples: int, estimator: Estimator) -> None:
        self.posterior = posterior
        self.prior = prior
        self.num_examples = num_examples
        self.estimator = estimator
        self.temperature = 1.0
        self.step_count = 0
        self.total_steps = 1

    def begin(self, temperature: float, total_steps: int) -> None:
        """Start a schedule of ``total_steps`` steps at temperature T, from where the posterior stands."""
        self.temperature = temperature
        self.total_steps = total_steps
        self.step_count = 0

    @abstractmethod
    def step(self, minibatch: Minibatch, generator: torch.Generator) -> float:
        """Do one step on one minibatch, drawing noise from a CPU generator.

        Returns:
            The estimate of the minibatch's E_q[NLL], nats per example.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the posterior: tensors and numbers."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def prior_changed(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Take note that the prior's scale was learned anew; by default nothing depends on it."""


def cosine_decay(step: int, total: int) -> float:
    """From 1 at step 0 to 0 at ``total``, along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
