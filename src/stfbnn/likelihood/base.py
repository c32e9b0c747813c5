"""What every likelihood p(y | f(x)) can do, and the checks and shapes that they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError


class Likelihood(nn.Module, ABC):
    """p(y | output); it may hold a state that inference learns, such as the noise of a regression.

    A likelihood of one's own is easiest made with `CustomLikelihood`; a subclass of this one works in `fit` and `predict`
    too, and its predictions are `CustomPrediction`.

    Attributes:
        name: By which `fit` and files know it.
        has_logits: Whether the outputs are logits of labels, which a predictive temperature may divide.
    """

    name: ClassVar[str]
    has_logits: ClassVar[bool] = False

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs and targets that do not fit this likelihood.

        Raises:
            InputError: Shapes, dtypes, ranges or values are wrong.
        """

    def check_outputs(self, outputs: Tensor) -> None:
        """The part of `check` that needs no targets; by default nothing.

        Raises:
            InputError: The outputs cannot be this likelihood's.
        """
        del outputs

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """The part of `check` about the targets' dtype and values, of which there may be more than outputs; by default nothing.

        Raises:
            InputError: Dtype or values are wrong.
        """
        del outputs, targets

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y_n | output_n) in nats for every example, shape (B,), differentiable in ``outputs``."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets y ~ p(y | output) with a CPU generator; the shape of targets."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, with what was learned; JSON-able."""

    def rebuilt(self, config: dict[str, Any]) -> Likelihood:
        """A likelihood of this kind in the state that `config` described at some time."""
        return type(self)(**config)

    def label_weights(self, targets: Tensor) -> Tensor | None:
        """What each single label counts in `log_prob`, in the targets' shape; None where all count 1.

        A label that counts 0 is left out: of predictions' log densities, scores and figures, too. Other weights change the
        objective of inference alone.
        """
        del targets
        return None

    def label_log_probs(self, outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of each single label, in the targets' shape, with the logits divided by ``temperature``; 0 where left out.

        What labels count (`label_weights`) is not in it.

        Raises:
            InputError: The outputs are no logits of labels.
        """
        del outputs, targets, temperature
        raise InputError(
            f"a predictive temperature divides logits, and the outputs of a {self.name} likelihood are none"
        )

    def curvature_targets(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """The targets at which the curvature of the loss is measured before natural-gradient inference.

        Draws from the model itself, which make the mean square of the scores the Fisher information, equal in expectation
        to the generalised Gauss–Newton matrix where the outputs are natural parameters.
        """
        del targets
        return self.sample(outputs, generator)

    def curvature_log_prob(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers (B,) whose gradients, added over the examples and squared, have the loss's curvature as expectation.

        They are log p of the `curvature_targets`. What the observed labels count (`label_weights`) multiplies the curvature,
        so that here its root multiplies log p of the label that was drawn in the same place.
        """
        labels = self.curvature_targets(outputs.detach(), targets, generator)
        weights = None if labels is targets else self.label_weights(targets)
        if weights is not None:
            terms = self.label_log_probs(at_least_float32(outputs), labels)
            # Drawn labels have the outputs' shape, (B, 1) where the targets are (B,).
            return per_example(weights.sqrt().to(terms).reshape(terms.shape) * terms)
        each = self.log_prob(outputs, labels)
        if labels is targets:
            # The scores of observed labels do not have mean zero; random signs remove their cross terms from the square.
            each = each * (2 * torch.randint(0, 2, (len(targets),), generator=generator) - 1).to(each)
        return each

    def estimate(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor | None:
        """What these examples say of a state that is learned, averaged over them; None where nothing is learned.

        Args:
            outputs: (B, …).
            targets: (B, …).
            weights: What each example counts in the average, (B,), of positive sum; None where all count the same.
        """
        del outputs, targets, weights
        return None

    def move(self, estimate: Tensor | None, weight: float) -> None:
        """Move the state that is learned by ``weight`` in (0, 1] towards an estimate; by default nothing."""
        del estimate, weight


def require_finite_outputs(outputs: Tensor) -> None:
    """Refuse NaN and infinite outputs.

    Raises:
        InputError: There are some.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise InputError("the model's outputs hold NaN or infinite values on this batch; check its weights and inputs")


def require_float_outputs(outputs: Tensor, what: str) -> None:
    """Refuse outputs that are not floats (batch, …).

    Raises:
        InputError: They are not.
    """
    if not outputs.is_floating_point() or outputs.ndim < 1:
        raise InputError(
            f"{what} needs float outputs of shape (batch, …), but the model gives {tuple(outputs.shape)} of {outputs.dtype}"
        )


def require_matching(outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets that have not the outputs' shape, a last dimension of 1 apart.

    Raises:
        InputError: They have not.
    """
    if match(outputs, targets).shape != targets.shape:
        raise InputError(
            f"targets must have the outputs' shape {tuple(outputs.shape)}, but theirs is {tuple(targets.shape)} (they "
            f"would broadcast to a wrong loss)"
        )


def match(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs (B, 1) as (B,) where the targets are (B,), and the reverse; otherwise unchanged."""
    if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
        return outputs.squeeze(-1)
    if targets.ndim == outputs.ndim + 1 and targets.shape[-1] == 1:
        return outputs.unsqueeze(-1)
    return outputs


def per_example(terms: Tensor) -> Tensor:
    """The sum over all dimensions but the first, (B,)."""
    return terms.flatten(1).sum(dim=1) if terms.ndim > 1 else terms


def at_least_float32(outputs: Tensor) -> Tensor:
    """Sums of log-probabilities lose too much in half precision."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def normalised(rows: Tensor) -> bool:
    """Whether all rows are non-negative floats that sum to 1 along dimension 1."""
    if not rows.is_floating_point():
        return False
    rows = rows.detach().float()
    return bool((rows >= 0).all()) and bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all())


def positive_numbers(values: Sequence[float], what: str) -> tuple[float, ...]:
    """Weights of classes or labels.

    Raises:
        InputError: They are not a list of numbers, or one is not positive and finite.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be a list of positive numbers, but it is {values!r}") from error
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise InputError(f"{what} must be a list of positive and finite numbers, but it is {values!r}")
    return numbers


def as_factors(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as a tensor in float64; in float32 on Apple's accelerator, which has no float64."""
    return torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
