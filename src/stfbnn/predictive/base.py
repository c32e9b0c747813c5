"""What every prediction has, and how posterior draws are added up to one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from stfbnn.batches import join_rows
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from stfbnn.decision import AbstentionRule


@dataclass(frozen=True)
class Prediction(ABC):
    """Predictions of N examples, as CPU tensors.

    Attributes:
        samples: Posterior draws that were averaged.
        at_mean: Whether this is the deterministic prediction at the posterior mean, without epistemic uncertainty.
    """

    samples: int
    at_mean: bool

    # Tensor fields, and along which dimension of each the examples lie.
    _rows: ClassVar[dict[str, int]]

    @abstractmethod
    def log_density(self, targets: Tensor) -> Tensor:
        """log p(y_n | x_n) of the averaged predictive, in nats, shape (N,)."""

    def abstain(self, rule: AbstentionRule) -> Tensor:
        """Where not to trust this prediction, (N,) booleans, True for no answer.

        Args:
            rule: From ``stfbnn.abstention_rule``, chosen on held-out predictions that were made as these were.

        Raises:
            InputError: These are of another kind, number of classes or number of draws than the held-out ones.
        """
        return ~rule.answers(self)

    def __len__(self) -> int:
        name, dimension = next(iter(self._rows.items()))
        size: int = getattr(self, name).shape[dimension]
        return size

    @classmethod
    def concatenate(cls, parts: Sequence[Prediction]) -> Prediction:
        """Join the predictions of consecutive chunks.

        Raises:
            InputError: The examples have different numbers of positions.
        """
        first = parts[0]
        values: dict[str, Any] = {field.name: getattr(first, field.name) for field in fields(first)}
        for name, dimension in first._rows.items():
            values[name] = join_rows([getattr(part, name) for part in parts], "predictions", dimension)
        return type(first)(**values)


class Sums(ABC):
    """The draws of one chunk, added up one after another."""

    @abstractmethod
    def add(self, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Take the outputs of some draws.

        Args:
            outputs: (draws, B, …).
            weights: What each draw counts, (draws,), positive; None for 1 each. `finish` divides by their sum.

        Raises:
            InputError: The outputs do not fit the likelihood, or the weights are not positive numbers, one a draw.
        """

    @abstractmethod
    def finish(self, at_mean: bool) -> Prediction:
        """The chunk's prediction."""


def undefined(reason: str) -> property:
    """A quantity that this kind of prediction has not: reading it raises `InputError` with the reason."""

    def refuse(_: Prediction) -> Tensor:
        raise InputError(reason)

    return property(refuse, doc=f"Not defined: {reason}.")
