"""Bayes by Backprop: stochastic variational inference by reparameterised gradients (Blundell et al. 2015).

Works for every posterior family. On one small layer the KL term's gradient on σ is 1/N a weight and drowns in the noise of
the likelihood's, so σ moves slowly: start from a sensible width, or take the natural-gradient engine.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from stfbnn.inference.engine import Engine, Loss, cosine_decay, require_count, require_positive
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior


class BayesByBackprop(Engine):
    """Adam on the posterior's own parameters, its rate decaying along half a cosine to 0.

    Args:
        posterior: Any family.
        prior: The Gaussian prior.
        num_examples: N.
        learning_rate: Adam's, at the start.
        draws: Draws of weights a step, averaged.
    """

    name: ClassVar[str] = "bayes-by-backprop"

    def __init__(
        self, posterior: Posterior, prior: GaussianPrior, num_examples: int, learning_rate: float = 1e-3, draws: int = 1
    ) -> None:
        super().__init__(posterior, prior, num_examples)
        require_positive(learning_rate=learning_rate)
        require_count(draws=draws)
        self.learning_rate = learning_rate
        self.draws = draws
        self._adam = torch.optim.Adam(posterior.parameters(), lr=learning_rate)

    def step(self, loss: Loss, generator: torch.Generator) -> float:
        """One Adam step on the minibatch's free energy; ``draws`` forward and backward passes."""
        self._adam.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(self.draws):
            weights = self.posterior.draw(self.noise(generator))
            value, gradient = loss(weights.detach())
            # The chain rule through w = draw(ε), with the network's part already computed.
            weights.backward(gradient / self.draws)  # type: ignore[no-untyped-call]
            total += value / self.draws
        divergence = self.posterior.kl(self.prior) * (self.temperature / self.num_examples)
        divergence.backward()  # type: ignore[no-untyped-call]
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate * cosine_decay(self.step_count, self.total_steps)
        self._adam.step()
        self.step_count += 1
        return total

    def state(self) -> dict[str, Any]:
        """Adam's state and the step."""
        return {"adam": self._adam.state_dict(), "step_count": self.step_count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back Adam's state and the step."""
        self._adam.load_state_dict(state["adam"])
        self.step_count = int(state["step_count"])
