"""Bayes by Backprop: stochastic variational inference by reparameterised gradients (Blundell et al. 2015).

Works for every posterior family. On one small layer the KL term's gradient on σ is 1/N a weight and drowns in the noise of
the likelihood's, so σ moves slowly from where it starts: take the natural-gradient engine where the family has it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.checks import require_positive
from stfbnn.inference.engine import Engine, cosine_decay
from stfbnn.inference.estimators import Estimator, Minibatch, Sampler
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior


class BayesByBackprop(Engine):
    """Adam on the posterior's own parameters, its rate decaying along half a cosine to 0.

    Args:
        posterior: Any family.
        prior: The Gaussian prior.
        num_examples: N.
        estimator: Of E_q[NLL] and its gradient.
        curvature: Diagonal of the Gauss–Newton matrix h₀ per example at the start, (d,): the posterior starts with the widths
            1/√(λ(h₀ + δ)), λ = N/T, δ the prior's precision over λ; None leaves them as the recipe made them.
        learning_rate: Adam's, at the start.
    """

    name: ClassVar[str] = "bayes-by-backprop"

    def __init__(
        self,
        posterior: Posterior,
        prior: GaussianPrior,
        num_examples: int,
        estimator: Estimator,
        curvature: Tensor | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(posterior, prior, num_examples, estimator)
        require_positive(learning_rate=learning_rate)
        if not any(True for _ in posterior.parameters()):
            raise InputError(
                f"the posterior {posterior.family!r} has nothing to infer; call bayesianize with another family"
            )
        self.learning_rate = learning_rate
        self._curvature = curvature
        self._adam = torch.optim.Adam(posterior.parameters(), lr=learning_rate)

    def begin(self, temperature: float, total_steps: int) -> None:
        """Start the schedule anew, from the widths that the curvature gives."""
        super().begin(temperature, total_steps)
        if self._curvature is not None:
            effective = self.num_examples / temperature
            self.posterior.set_std((effective * self._curvature + self.prior.std.square().reciprocal()).rsqrt())

    def step(self, minibatch: Minibatch, generator: torch.Generator) -> float:
        """One Adam step on the minibatch's free energy."""
        posterior = self.posterior
        leaves = tuple(posterior.parameters())
        sampler = Sampler(
            leaves, posterior.draw, lambda: (posterior.mean_vector(), posterior.std_vector()), posterior.noise_size
        )
        found = self.estimator.estimate(minibatch, sampler, generator)
        self._adam.zero_grad(set_to_none=True)
        with torch.enable_grad():
            divergence = posterior.kl(self.prior) * (self.temperature / self.num_examples)
        divergence.backward()  # type: ignore[no-untyped-call]
        for leaf, gradient in zip(leaves, found.gradients, strict=True):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate * cosine_decay(self.step_count, self.total_steps)
        self._adam.step()
        self.step_count += 1
        return found.nll

    def state(self) -> dict[str, Any]:
        """Adam's state, the step, and the curvature at the start."""
        return {"adam": self._adam.state_dict(), "step_count": self.step_count, "curvature": self._curvature}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back Adam's state, the step, and the curvature; the widths are the posterior's own."""
        curvature = state["curvature"]
        # A checkpoint is read onto the CPU.
        self._curvature = None if curvature is None else curvature.to(self.posterior.mean_vector())
        self._adam.load_state_dict(state["adam"])
        self.step_count = int(state["step_count"])
