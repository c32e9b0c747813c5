"""Natural-gradient variational inference: variational online Newton for Gaussian posteriors.

The posterior's precision is tracked directly instead of being learned through noisy gradients of σ, so that a small first
layer finds its width (Khan et al. 2018; Lin, Schmidt & Khan 2020; Shen et al. 2024). With λ = N/T and δ the prior's
precision over λ, q = N(m, 1/(λ(h + δ))).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.engine import Engine, Loss, cosine_decay, require_count, require_positive
from stfbnn.posterior import MeanFieldPosterior, Posterior
from stfbnn.prior import GaussianPrior


class VariationalNewton(Engine):
    """Variational online Newton for the mean-field Gaussian.

    At w = m + σε with the minibatch's mean gradient ĝ, and products averaged over the draws:

        ĥ = ĝ ε / σ,   g ← β₁ g + (1−β₁) ĝ,   h ← (1−ρ) h + ρ ĥ + ½ ρ² (h−ĥ)² / (h+δ),
        m ← m − α (g / (1−β₁ᵗ) + δ (m−m₀)) / (h+δ)

    The last term of h keeps h + δ positive. The averaging weight ρ is 1/(t + t₀) until it falls to ``curvature_rate``, so
    that the first, rough estimate of h is soon outweighed; α decays along half a cosine to 0.

    Args:
        posterior: A mean-field Gaussian; its log σ is overwritten by h.
        prior: The Gaussian prior.
        num_examples: N.
        batches: Steps in one pass over the data.
        curvature: h₀, the diagonal of the generalised Gauss–Newton matrix per example at the trained weights, (d,).
        learning_rate: α at the start of each temperature; None takes min(0.1, ``wander`` · 2 T / batches).
        wander: How far the gradient's noise may make m wander at first, in posterior variances: about α · batches / (2 T).
            A larger one converges in fewer epochs, where the layer is small enough to bear it.
        momentum: β₁.
        curvature_rate: ρ's floor.
        curvature_trust: t₀, how many steps' worth of averaging h₀ counts; None takes one pass over the data.
        draws: Draws of weights a step: an even number makes antithetic pairs m ± σε, each of which cancels what the gradient
            at m adds to the noise of ĥ; 1 halves the cost of a step, and leaves σ noisier.
    """

    name: ClassVar[str] = "natural-gradient"

    def __init__(
        self,
        posterior: Posterior,
        prior: GaussianPrior,
        num_examples: int,
        batches: int,
        curvature: Tensor,
        learning_rate: float | None = None,
        wander: float = 0.5,
        momentum: float = 0.9,
        curvature_rate: float = 1e-3,
        curvature_trust: float | None = None,
        draws: int = 2,
    ) -> None:
        super().__init__(posterior, prior, num_examples)
        if not isinstance(posterior, MeanFieldPosterior):
            raise InputError(
                f"the natural-gradient engine infers a mean-field Gaussian, but the posterior is {posterior.family!r}; use "
                f'engine="bayes-by-backprop"'
            )
        self.batches = batches
        self.learning_rate = learning_rate
        self.wander = wander
        self.momentum = momentum
        self.curvature_rate = curvature_rate
        self.curvature_trust = batches if curvature_trust is None else curvature_trust
        self.draws = draws
        require_positive(wander=wander, curvature_rate=curvature_rate, curvature_trust=self.curvature_trust)
        if learning_rate is not None:
            require_positive(learning_rate=learning_rate)
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
            raise InputError(f"momentum must be in [0, 1), but it is {momentum!r}")
        require_count(draws=draws)
        if draws != 1 and draws % 2:
            raise InputError(f"draws must be 1 or an even number (antithetic pairs), but it is {draws}")
        self._loc, self._log_std = posterior.loc.detach(), posterior.log_std.detach()
        self._curvature = curvature.detach().clone()
        self._gradient = torch.zeros_like(curvature)
        self._curvature_steps = 0
        self._set_std()

    def begin(self, temperature: float, total_steps: int) -> None:
        """Widen or narrow q for the new T at the curvature found so far, and restart α and the momentum."""
        super().begin(temperature, total_steps)
        self._gradient.zero_()
        self.prior_changed()

    def prior_changed(self) -> None:
        """Keep the precision positive: h may be negative down to −δ, and δ shrinks with T and as the prior widens."""
        self._curvature.clamp_(min=-0.5 * self._delta)
        self._set_std()

    @property
    def initial_rate(self) -> float:
        """α at the start of this temperature."""
        if self.learning_rate is not None:
            return self.learning_rate
        return min(0.1, self.wander * 2 * self.temperature / self.batches)

    @property
    def _delta(self) -> Tensor:
        return self.temperature / (self.num_examples * self.prior.std.square())

    @torch.no_grad()
    def _set_std(self) -> None:
        effective = self.num_examples / self.temperature
        self._log_std.copy_(-0.5 * (effective * (self._curvature + self._delta)).log())

    def step(self, loss: Loss, generator: torch.Generator) -> float:
        """One Newton step on one minibatch; ``draws`` forward and backward passes."""
        std = self._log_std.exp()
        gradient, product = torch.zeros_like(std), torch.zeros_like(std)
        total = 0.0
        noise = torch.zeros_like(std)
        for index in range(self.draws):
            noise = -noise if index % 2 else self.noise(generator)
            value, fresh = loss(self._loc + std * noise)
            gradient += fresh / self.draws
            product += fresh * noise / self.draws
            total += value / self.draws
        with torch.no_grad():
            self._update(gradient, product / std)
        return total

    def _update(self, gradient: Tensor, curvature: Tensor) -> None:
        delta = self._delta
        rate = max(1 / (self._curvature_steps + self.curvature_trust), self.curvature_rate)
        alpha = self.initial_rate * cosine_decay(self.step_count, self.total_steps)
        self.step_count += 1
        self._curvature_steps += 1

        self._gradient.lerp_(gradient, 1 - self.momentum)
        difference = self._curvature - curvature
        correction = 0.5 * rate**2 * difference.square() / (self._curvature + delta)
        self._curvature.sub_(rate * difference).add_(correction)
        unbiased = self._gradient / (1 - self.momentum**self.step_count)
        pull = delta * (self._loc - self.prior.mean)
        self._loc.sub_(alpha * (unbiased + pull) / (self._curvature + delta))
        self._set_std()

    def state(self) -> dict[str, Any]:
        """h, the momentum, and the counts."""
        return {
            "curvature": self._curvature.clone(),
            "gradient": self._gradient.clone(),
            "curvature_steps": self._curvature_steps,
            "step_count": self.step_count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back h, the momentum, and the counts."""
        self._curvature.copy_(state["curvature"])
        self._gradient.copy_(state["gradient"])
        self._curvature_steps = int(state["curvature_steps"])
        self.step_count = int(state["step_count"])
        self._set_std()
