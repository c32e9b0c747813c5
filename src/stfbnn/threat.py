"""What an attacker may change: the space of valid inputs, and how far from an input it may go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stfbnn.errors import InputError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class InputSpace:
    """Inputs as an attacker sees them, before they are normalised: images in [0, 1], for one.

    All radii are in these units. A network gets (x − mean) / std.

    Attributes:
        lower: The smallest valid value.
        upper: The largest.
        mean: What is subtracted, one number or one a channel (for tables one a column); (0,) for networks that take x itself.
        std: What is divided by, likewise.

    Raises:
        InputError: The range is empty, or the statistics are not of one length, finite and positive.
    """

    lower: float = 0.0
    upper: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not (self.lower < self.upper):
            raise InputError(f"the input space must have lower < upper, but they are {self.lower} and {self.upper}")
        numbers = torch.tensor([*self.mean, *self.std], dtype=torch.float64)
        if len(self.mean) != len(self.std) or not len(self.mean) or not bool(numbers.isfinite().all()):
            raise InputError(
                f"mean and std must be as many finite numbers, one or one a channel, but they are {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise InputError(f"std must be positive, but it is {self.std}")

    def check(self, inputs: Tensor) -> None:
        """Refuse inputs that do not lie in the space.

        Raises:
            InputError: They are no floats (B, …), there are none, some are not finite or out of range, or the number of
                channels is not that of the statistics.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2 or not len(inputs):
            found = (
                f"{inputs.dtype} of shape {tuple(inputs.shape)}"
                if isinstance(inputs, Tensor)
                else type(inputs).__name__
            )
            raise InputError(
                f"an attack changes one tensor of floats (B, …), B at least 1, but the inputs are {found}; discrete inputs, "
                f"such as token numbers, have no gradient and no small changes"
            )
        if not bool(inputs.isfinite().all()):
            raise InputError("the inputs hold NaN or infinite values")
        slack = 1e-6 * (self.upper - self.lower)
        low, high = float(inputs.min()), float(inputs.max())
        if low < self.lower - slack or high > self.upper + slack:
            raise InputError(
                f"the inputs span {low:.4g} … {high:.4g}, but the space is {self.lower} … {self.upper}: give them before "
                f"normalisation and say mean and std in InputSpace, or give the range that is meant"
            )
        if len(self.mean) > 1 and inputs.shape[1] != len(self.mean):
            raise InputError(f"there are {len(self.mean)} means, but the inputs have {inputs.shape[1]} channels")

    def to_network(self, inputs: Tensor) -> Tensor:
        """(x − mean) / std, differentiable; the same shape."""
        if self._is_identity:
            return inputs
        mean, std = self._statistics(inputs)
        return (inputs - mean) / std

    def from_network(self, inputs: Tensor) -> Tensor:
        """The reverse of `to_network`: x std + mean."""
        if self._is_identity:
            return inputs
        mean, std = self._statistics(inputs)
        return inputs * std + mean

    @property
    def _is_identity(self) -> bool:
        return self.mean == (0.0,) and self.std == (1.0,)

    def _statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in a shape that goes with (B, C, …)."""
        shape = (-1, *[1] * (inputs.ndim - 2))
        mean, std = (torch.tensor(values, dtype=inputs.dtype, device=inputs.device) for values in (self.mean, self.std))
        return mean.reshape(shape), std.reshape(shape)


@dataclass(frozen=True)
class Threat:
    """The set of changes an attacker may make: ‖δ‖ ≤ ε, with x + δ in the space.

    Attributes:
        epsilon: ε, in the units of the input space.
        norm: "linf" or "l2".

    Raises:
        InputError: ε is negative or not finite, or the norm is another one.
    """

    epsilon: float
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        number: object = self.epsilon
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
            raise InputError(f"epsilon must be a finite number of at least 0, but it is {self.epsilon!r}")
        if self.norm not in ("linf", "l2"):
            raise InputError(f'norm must be "linf" or "l2", but it is {self.norm!r}')

    def project(self, changed: Tensor, inputs: Tensor, space: InputSpace) -> Tensor:
        """A point of the set near ``changed``, (B, …).

        For l∞ it is the nearest one. For l2 the ball and then the range: the point that comes out lies in both, for cutting
        off at a range that holds x moves no coordinate away from x.
        """
        delta = changed - inputs
        if self.norm == "linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            lengths = self.length(delta).clamp_min(torch.finfo(delta.dtype).tiny)
            delta = delta * (self.epsilon / lengths).clamp_max(1).reshape(-1, *[1] * (delta.ndim - 1))
        return (inputs + delta).clamp(space.lower, space.upper)

    def length(self, delta: Tensor) -> Tensor:
        """‖δ‖ of each row, (B,)."""
        flat = delta.flatten(1)
        return flat.abs().amax(dim=1) if self.norm == "linf" else flat.square().sum(dim=1).sqrt()
