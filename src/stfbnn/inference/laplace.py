"""Laplace's approximation of the first layer: a Gaussian at the weights, as wide as the curvature there says.

Nothing is optimised: the trained weights are taken for the posterior's mode, and the generalised Gauss–Newton matrix of one
pass over the data for the Hessian (MacKay 1992; Daxberger et al. 2021), Σ = (λ(H + δ))⁻¹. It costs that one pass.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.engine import Engine
from stfbnn.inference.estimators import Estimator, Minibatch
from stfbnn.inference.precision import precision_of
from stfbnn.posterior import Posterior
from stfbnn.prior import GaussianPrior


class Laplace(Engine):
    """Laplace's approximation; its one epoch a temperature only measures the free energy.

    Args:
        posterior: A mean-field, filterwise or full-covariance Gaussian, at the trained weights.
        prior: The Gaussian prior; where it is centred does not matter here.
        num_examples: N.
        estimator: Of E_q[NLL].
        curvature: H, its diagonal (d,) or its blocks (U, k, k).
    """

    name: ClassVar[str] = "laplace"
    iterates: ClassVar[bool] = False

    def __init__(
        self, posterior: Posterior, prior: GaussianPrior, num_examples: int, estimator: Estimator, curvature: Tensor
    ) -> None:
        super().__init__(posterior, prior, num_examples, estimator)
        precision = precision_of(posterior, prior, num_examples, curvature)
        if precision is None:
            raise InputError(
                f"a Laplace approximation here is a mean-field, filterwise or full-covariance Gaussian, but the posterior is "
                f'{posterior.family!r}; use engine="bayes-by-backprop"'
            )
        self._precision = precision

    def begin(self, temperature: float, total_steps: int) -> None:
        """Set the width for the new T."""
        super().begin(temperature, total_steps)
        self._precision.begin(temperature)

    def prior_changed(self) -> None:
        """The width follows the prior."""
        self._precision.begin(self.temperature)

    def step(self, minibatch: Minibatch, generator: torch.Generator) -> float:
        """Measure the minibatch's E_q[NLL]; nothing moves."""
        self.step_count += 1
        return self.estimator.estimate(minibatch, self._precision.sampler(), generator).nll

    def state(self) -> dict[str, Any]:
        """The precision."""
        return {"precision": self._precision.state(), "step_count": self.step_count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the precision."""
        self._precision.load_state(state["precision"])
        self.step_count = int(state["step_count"])
