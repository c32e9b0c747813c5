"""Labels that are there or not, each apart from the others: p(y = 1 | output) = sigmoid(output)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stfbnn.errors import InputError
from stfbnn.likelihood.base import (
    Likelihood,
    as_factors,
    at_least_float32,
    match,
    per_example,
    positive_numbers,
    require_finite_outputs,
    require_float_outputs,
    require_matching,
)

# So many logits between 0 and 1 and none outside are worth a warning.
_LOGITS_TO_JUDGE = 32


class Bernoulli(Likelihood):
    """One or more labels, each 0 or 1; outputs (B,), (B, 1) or (B, K, …), one logit for each label.

    Given the weights the labels are independent, so an example's log-probability is the sum over its labels.

    Args:
        outputs: "logits", or "probabilities" for a network that ends in a sigmoid.
        positive_weights: w > 0, a number for all labels or a list with one for each of the K: inference then maximises
            Σ w y log p(1) + (1 − y) log p(0), as ``binary_cross_entropy_with_logits(pos_weight=…)`` minimises its negative,
            for labels that are rarely there. That is a change of the objective alone: probabilities stay those of the draws,
            and log densities and held-out scores are not weighted.
    """

    name: ClassVar[str] = "bernoulli"
    has_logits: ClassVar[bool] = True

    def __init__(
        self,
        outputs: Literal["logits", "probabilities"] = "logits",
        *,
        positive_weights: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if outputs not in ("logits", "probabilities"):
            raise InputError(f'outputs must be "logits" or "probabilities", but it is {outputs!r}')
        self.outputs = outputs
        given = [positive_weights] if isinstance(positive_weights, int | float) else positive_weights
        self.positive_weights = None if given is None else positive_numbers(given, "positive_weights")

    def logits(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(1)/p(0) of every label, divided by ``temperature``; shape of ``outputs``."""
        if self.outputs == "probabilities":
            limits = torch.finfo(outputs.dtype)
            positive = outputs.clamp(limits.tiny, 1 - limits.eps)
            outputs = positive.log() - (-positive).log1p()
        return outputs / temperature

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that are not finite floats, not in [0, 1] though said to be probabilities, or not K as the weights."""
        require_float_outputs(outputs, "a Bernoulli likelihood")
        require_finite_outputs(outputs)
        count = len(self.positive_weights or ())
        if count > 1 and (outputs.ndim < 2 or outputs.shape[1] != count):
            raise InputError(
                f"positive_weights has {count} numbers, but the model's outputs are {tuple(outputs.shape)}; give one number "
                f"for all labels, or one for each of dimension 1"
            )
        if self.outputs == "probabilities" and not _in_unit_interval(outputs):
            raise InputError(
                f'outputs="probabilities" was said, but the model\'s outputs span {float(outputs.min()):.4g} … '
                f"{float(outputs.max()):.4g}; leave it out if they are logits"
            )

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are not 0 or 1; bool, integers and floats will do."""
        del outputs
        if targets.is_complex() or not bool(((targets == 0) | (targets == 1)).all()):
            raise InputError(
                f"a Bernoulli likelihood needs targets that are 0 or 1, but they are {targets.dtype} and span "
                f'{targets.min().item()} … {targets.max().item()}; for one of several classes use likelihood="categorical"'
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Also refuse targets of another shape or with other values than 0 and 1; warn of what look like probabilities."""
        self.check_outputs(outputs)
        if match(outputs, targets).shape != targets.shape and outputs.ndim > 1 and targets.ndim == outputs.ndim - 1:
            raise InputError(
                f"a Bernoulli likelihood needs one target for each of the outputs {tuple(outputs.shape)}, but the targets' "
                f'shape is {tuple(targets.shape)}; for one of {outputs.shape[1]} classes use likelihood="categorical"'
            )
        require_matching(outputs, targets)
        self.check_targets(outputs, targets)
        if self.outputs == "logits" and outputs.numel() >= _LOGITS_TO_JUDGE and _in_unit_interval(outputs):
            warnings.warn(
                "all of the model's outputs lie between 0 and 1: if they are probabilities and not logits, say "
                'likelihood=stfbnn.Bernoulli(outputs="probabilities"), or remove the final sigmoid',
                stacklevel=2,
            )

    def label_weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each label that is there, 1 for one that is not; None where all count 1."""
        if self.positive_weights is None:
            return None
        weights = as_factors(self.positive_weights, targets.device)
        if len(weights) > 1:
            weights = weights.reshape(-1, *[1] * (targets.ndim - 2))
        return torch.where(targets == 1, weights, torch.ones_like(weights))

    def label_log_probs(self, outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of each label, in the targets' shape."""
        logits = self.logits(match(outputs, targets), temperature)
        return -F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of log p over an example's labels, each times what it counts."""
        terms, weights = self.label_log_probs(at_least_float32(outputs), targets), self.label_weights(targets)
        return per_example(terms if weights is None else weights.to(terms) * terms)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """0 or 1 for each output, in the outputs' dtype."""
        uniform = torch.rand(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        return (uniform < self.logits(outputs.detach()).double().sigmoid()).to(outputs.dtype)

    def config(self) -> dict[str, Any]:
        """``outputs``, and the weights where there are any."""
        weights = {} if self.positive_weights is None else {"positive_weights": list(self.positive_weights)}
        return {"outputs": self.outputs, **weights}


def _in_unit_interval(outputs: Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())
