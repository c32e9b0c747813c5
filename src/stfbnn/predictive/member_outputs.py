"""The raw outputs of all members of an average, from which predictions at any predictive temperature are made at once.

A member is a posterior draw, a network of an ensemble, a dropout mask: whatever is averaged. So this is the common form of all
methods that can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.likelihood import Likelihood
from stfbnn.predictive.base import Prediction
from stfbnn.predictive.dispatch import sums_for
from stfbnn.predictive.weighting import log_average, mean_over_examples

TAU_RANGE = (0.05, 20.0)
"""Where the predictive temperature is searched."""


@dataclass(frozen=True, eq=False)
class MemberOutputs:
    """What every member says of the same N inputs.

    Attributes:
        outputs: Raw outputs, (S, N, …).
        likelihood: What they mean.
        shares: What each member counts, (S,), positive, summing to 1; None where all count the same.
        at_mean: Whether the one member is a point estimate, so that there is no epistemic uncertainty.

    Raises:
        InputError: There is no member, or the shares are not one a member.
    """

    outputs: Tensor
    likelihood: Likelihood
    shares: Tensor | None = None
    at_mean: bool = False

    def __post_init__(self) -> None:
        if self.outputs.ndim < 2 or not len(self.outputs):
            raise InputError(
                f"outputs must be those of at least one member, (members, examples, …), but have shape "
                f"{tuple(self.outputs.shape)}"
            )
        if self.shares is not None and self.shares.shape != self.outputs.shape[:1]:
            raise InputError(f"{len(self.outputs)} members need as many shares, but got {tuple(self.shares.shape)}")

    def at(self, temperature: float = 1.0) -> Prediction:
        """Average the members' predictions.

        Args:
            temperature: τ, by which every member's logits are divided.

        Raises:
            InputError: The outputs do not fit the likelihood, or τ is not 1 though they are no logits.
        """
        sums = sums_for(self.likelihood, temperature)
        sums.add(self.outputs, self.shares)
        return sums.finish(self.at_mean)

    def best_temperature(self, targets: Tensor, counts: Tensor | None = None) -> float:
        """τ that minimises the mean negative log-likelihood of each label under the averaged predictive at logits / τ.

        Args:
            targets: Held-out targets of the N inputs, which no member has seen.
            counts: What each label counts, one after another; None where all count the same.

        Returns:
            τ within ``TAU_RANGE``, to about a thousandth.

        Raises:
            InputError: The likelihood has no logits, or the targets do not fit.
        """

        def loss(log_tau: float) -> float:
            tau = math.exp(log_tau)
            each = torch.stack([self.likelihood.label_log_probs(one.double(), targets, tau) for one in self.outputs])
            return -float(mean_over_examples(log_average(each, self.shares).flatten(), counts))

        low, high = (math.log(bound) for bound in TAU_RANGE)
        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
        return math.exp(found.x)
