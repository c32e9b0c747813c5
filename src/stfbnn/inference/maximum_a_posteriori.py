"""Retraining the first layer alone, as an engine: a point mass goes to the maximum of the posterior density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.inference.checks import require_positive
from stfbnn.inference.engine import Engine, cosine_decay
from stfbnn.inference.estimators import Estimator, Minibatch
from stfbnn.inference.history import FitRecord
from stfbnn.posterior import ParameterLayout, PointMassPosterior, Posterior
from stfbnn.prior import GaussianPrior

# Where a unit has fewer inputs, a step must still be small beside the weights themselves.
_FEWEST_INPUTS = 12
# Retraining ends where two epochs lower the objective by less than this share of what all of them did (of 1 nat at least).
_FLAT = 1e-3
_FEWEST_EPOCHS = 3


class MaximumAPosteriori(Engine):
    """Adam on −log p(y | x, w) per example − (T/N) log p(w), its rate decaying along half a cosine to 0.

    Args:
        posterior: A point mass.
        prior: p(w).
        num_examples: N.
        estimator: Only its `at_point` is used, for there is nothing random to average over.
        learning_rate: Adam's, at the start; None takes `adam_rate` of the weights at the start.
    """

    name: ClassVar[str] = "maximum-a-posteriori"

    def __init__(
        self,
        posterior: Posterior,
        prior: GaussianPrior,
        num_examples: int,
        estimator: Estimator,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(posterior, prior, num_examples, estimator)
        if not isinstance(posterior, PointMassPosterior):
            raise InputError(
                f'the engine {self.name!r} moves a point mass, but the posterior is {posterior.family!r}; use engine="auto"'
            )
        self._loc = posterior.loc
        self.learning_rate = adam_rate(posterior.layout, self._loc.detach()) if learning_rate is None else learning_rate
        require_positive(learning_rate=self.learning_rate)
        self._adam = torch.optim.Adam([self._loc], lr=self.learning_rate)
        # Which weights the likelihood has ever depended on.
        self.used = torch.zeros_like(self._loc, dtype=torch.bool)

    def step(self, minibatch: Minibatch, generator: torch.Generator) -> float:
        """One Adam step on one minibatch."""
        del generator
        nll, gradient = self.estimator.at_point(minibatch, self._loc.detach())
        self.used |= gradient != 0
        with torch.enable_grad():
            penalty = -self.prior.log_prob(self._loc) * (self.temperature / self.num_examples)
        self._loc.grad = gradient + torch.autograd.grad(penalty, self._loc)[0]
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate * cosine_decay(self.step_count, self.total_steps)
        self._adam.step()
        self._loc.grad = None
        self.step_count += 1
        return nll

    def state(self) -> dict[str, Any]:
        """Adam's state, the step, and which weights were used."""
        return {"adam": self._adam.state_dict(), "step_count": self.step_count, "used": self.used.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._adam.load_state_dict(state["adam"])
        self.step_count = int(state["step_count"])
        self.used.copy_(state["used"])


def adam_rate(layout: ParameterLayout, weights: Tensor, relative: float = 1.0) -> float:
    """A rate for Adam on a first layer: ``relative`` · RMS(w) / √n, n the number of a unit's inputs.

    Adam moves every weight by about its rate, and so a unit's pre-activation by up to the rate times n; that pre-activation
    is itself of the size RMS(w) √n, for inputs of size 1. So ``relative`` is the share by which one step may change it.

    Args:
        layout: The layer's parameters; the largest of them says how many inputs a unit has.
        weights: Weights of the layer's usual size, (d,).
        relative: That share.
    """
    shape = max(layout.shapes, key=math.prod)
    inputs = math.prod(shape[1:])
    size = float(weights.square().mean().sqrt())
    # A layer that is zero throughout says nothing of its scale.
    return relative * (size or 1.0) / math.sqrt(max(inputs, _FEWEST_INPUTS))


def is_flat(records: Sequence[FitRecord], epochs: int) -> bool:
    """Whether retraining has stopped to pay.

    Args:
        records: Its epochs so far.
        epochs: How many there may be.
    """
    # Before the last quarter of the schedule the rate is so high that a plateau says nothing.
    if len(records) < max(_FEWEST_EPOCHS, 0.75 * epochs):
        return False
    course = [record.free_energy for record in records]
    before, now = min(course[:-2]), min(course[-2:])
    return before - now < _FLAT * max(1.0, course[0] - now)
