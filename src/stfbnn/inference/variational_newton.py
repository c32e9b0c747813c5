"""Natural-gradient variational inference: variational online Newton for Gaussian posteriors.

The posterior's precision is tracked directly instead of being learned through noisy gradients of σ, so that a small first
layer finds its width (Khan et al. 2018; Lin, Schmidt & Khan 2020; Shen et al. 2024).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_positive
from stfbnn.inference.engine import Engine, cosine_decay
from stfbnn.inference.estimators import Estimator, Minibatch
from stfbnn.inference.precision import DiagonalPrecision, precision_of
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior

# How far H₀ is moved towards its diagonal where S is a matrix.
_SHRINKAGE = 0.5


class VariationalNewton(Engine):
    """Variational online Newton for Gaussians whose precision S can be tracked: mean-field, filterwise, full covariance.

    With the gradient ĝ of the minibatch's E_q[NLL] by the mean m, and S moved by `Precision` from the gradient by the scale:

        g ← β₁ g + (1−β₁) ĝ,   m ← m − α S⁻¹ (g / (1−β₁ᵗ) + δ (m−m₀))

    The averaging weight ρ of S is 1/(t + t₀) until it falls to ``curvature_rate``, so that the first, rough estimate is soon
    outweighed; α decays along half a cosine to 0.

    Args:
        posterior: The Gaussian; its width is overwritten.
        prior: The Gaussian prior.
        num_examples: N.
        estimator: Of E_q[NLL] and its gradients.
        batches: Steps in one pass over the data.
        curvature: H₀, the generalised Gauss–Newton matrix per example at the start: its diagonal (d,), or its blocks
            (U, k, k), which are moved halfway to their diagonal.
        learning_rate: α at the start of each temperature; None takes min(0.1, ``wander`` · 2 T / batches).
        wander: How far the gradient's noise may make m wander at first, in posterior variances: about α · batches / (2 T).
            A larger one converges in fewer epochs, where the layer is small enough to bear it.
        momentum: β₁.
        curvature_rate: ρ's floor.
        curvature_trust: t₀, how many steps' worth of averaging H₀ counts; None takes one pass over the data.
        curvature_every: For block covariances, minibatches averaged before S moves; None follows from the blocks' width.
        largest_std: For mean-field posteriors, the width that no weight starts above, at each temperature: H is raised where
            it says nothing of a weight. None starts where H₀ and the prior say, which is right for a layer; a whole network
            whose weights are all as wide as that is far from the one that H₀ was measured at.
    """

    name: ClassVar[str] = "natural-gradient"

    def __init__(
        self,
        posterior: Posterior,
        prior: GaussianPrior,
        num_examples: int,
        estimator: Estimator,
        batches: int,
        curvature: Tensor,
        learning_rate: float | None = None,
        wander: float = 1.0,
        momentum: float = 0.9,
        curvature_rate: float = 1e-3,
        curvature_trust: float | None = None,
        curvature_every: int | None = None,
        largest_std: float | None = None,
    ) -> None:
        super().__init__(posterior, prior, num_examples, estimator)
        self.batches = batches
        self.learning_rate = learning_rate
        self.wander = wander
        self.momentum = momentum
        self.curvature_rate = curvature_rate
        self.curvature_trust = batches if curvature_trust is None else curvature_trust
        require_positive(wander=wander, curvature_rate=curvature_rate, curvature_trust=self.curvature_trust)
        if learning_rate is not None:
            require_positive(learning_rate=learning_rate)
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
            raise InputError(f"momentum must be in [0, 1), but it is {momentum!r}")
        if curvature_every is not None:
            require_count(curvature_every=curvature_every)
        precision = precision_of(posterior, prior, num_examples, curvature, shrinkage=_SHRINKAGE, every=curvature_every)
        if precision is None:
            raise InputError(
                f"the natural-gradient engine infers mean-field, filterwise and full-covariance Gaussians, but the posterior "
                f'is {posterior.family!r}; use engine="bayes-by-backprop"'
            )
        if largest_std is not None:
            require_positive(largest_std=largest_std)
            if not isinstance(precision, DiagonalPrecision):
                raise InputError(
                    f"largest_std is for mean-field posteriors, but this one is {posterior.family!r}; leave it at None"
                )
        self.largest_std = largest_std
        self.precision = precision
        self._loc = precision.mean()
        self._gradient = torch.zeros_like(self._loc)
        self._curvature_steps = 0

    def begin(self, temperature: float, total_steps: int) -> None:
        """Widen or narrow q for the new T at the curvature found so far, and restart α and the momentum."""
        super().begin(temperature, total_steps)
        self._gradient.zero_()
        self.precision.begin(temperature)
        if self.largest_std is not None and isinstance(self.precision, DiagonalPrecision):
            self.precision.narrow(self.largest_std)

    def prior_changed(self) -> None:
        """The precision follows the prior."""
        self.precision.begin(self.temperature)

    @property
    def initial_rate(self) -> float:
        """α at the start of this temperature."""
        if self.learning_rate is not None:
            return self.learning_rate
        return min(0.1, self.wander * 2 * self.temperature / self.batches)

    def step(self, minibatch: Minibatch, generator: torch.Generator) -> float:
        """One Newton step on one minibatch; as many forward and backward passes as the estimator has draws."""
        found = self.estimator.estimate(minibatch, self.precision.sampler(), generator)
        gradient, scale_gradient = found.gradients
        rate = max(1 / (self._curvature_steps + self.curvature_trust), self.curvature_rate)
        alpha = self.initial_rate * cosine_decay(self.step_count, self.total_steps)
        self.step_count += 1
        self._curvature_steps += 1
        with torch.no_grad():
            self.precision.update(scale_gradient, rate)
            self._gradient.lerp_(gradient, 1 - self.momentum)
            unbiased = self._gradient / (1 - self.momentum**self.step_count)
            pull = self.precision.delta * (self._loc - self.prior.mean)
            self._loc.sub_(alpha * self.precision.newton(unbiased + pull))
        return found.nll

    def state(self) -> dict[str, Any]:
        """S, the momentum, and the counts."""
        return {
            "precision": self.precision.state(),
            "gradient": self._gradient.clone(),
            "curvature_steps": self._curvature_steps,
            "step_count": self.step_count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back S, the momentum, and the counts; the mean and the width come back with the posterior."""
        self.precision.load_state(state["precision"])
        self._gradient.copy_(state["gradient"])
        self._curvature_steps = int(state["curvature_steps"])
        self.step_count = int(state["step_count"])
