"""The parts of a task's data: examples that can be counted, batched, cut short and corrupted, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stfbnn.benchmark.records import Kind
from stfbnn.data import Split, loader
from stfbnn.data.loader import Statistic
from stfbnn.errors import InputError


class Part(Protocol):
    """Some examples."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> Tensor | None:
        """Their targets, in order; None where they have none."""

    def batches(self, size: int, shuffle: bool = False) -> Iterable[Any]:
        """Minibatches, in order or in a new order at each pass, drawn from torch's global generator."""

    def first(self, count: int | None) -> Part:
        """The first examples; all for None."""


@dataclass(frozen=True, eq=False)
class TensorPart:
    """Images or rows of a table.

    Attributes:
        split: The examples.
        mean: What is subtracted.
        std: What is divided by.
    """

    split: Split
    mean: Statistic
    std: Statistic

    def __len__(self) -> int:
        return len(self.split)

    @property
    def targets(self) -> Tensor | None:
        """Their targets, in order."""
        return self.split.targets

    def batches(self, size: int, shuffle: bool = False) -> Iterable[Any]:
        """Minibatches."""
        return loader(self.split, size, shuffle=shuffle, mean=self.mean, std=self.std)

    def first(self, count: int | None) -> TensorPart:
        """The first examples."""
        if count is None or count >= len(self):
            return self
        return TensorPart(self.split.take(torch.arange(count)), self.mean, self.std)

    def changed(self, change: Callable[[Tensor], Tensor]) -> TensorPart:
        """The same examples with other inputs; ``change`` gets them before they are normalised, images in [0, 1]."""
        return TensorPart(Split(change(self.split.inputs), self.split.targets), self.mean, self.std)


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's data for one seed, divided before anything is trained.

    Attributes:
        kind: What the targets are.
        network: Makes an untrained network, from torch's global generator.
        train: What is trained on.
        held: What every choice is made by; no stage has seen it.
        test: What the figures are of, and nothing else.
        outside: Foreign examples.
        corrupted: From a corruption's name and a severity, 1 to 5, to the corrupted examples of `shifted`.
        shifted: The test examples that are corrupted.
        corruptions: The names.
    """

    kind: Kind
    network: Callable[[], nn.Module]
    train: Part
    held: Part
    test: Part
    outside: Mapping[str, Part] = field(default_factory=dict)
    corrupted: Callable[[str, int], Part] | None = None
    shifted: Part | None = None
    corruptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("held", self.held), ("test", self.test)):
            if part.targets is None:
                raise InputError(f"the {name} part of a task needs targets")

    def only(self, count: int) -> TaskData:
        """The same with ``count`` training and held-out examples, such as one batch to measure a step by."""
        return TaskData(
            self.kind, self.network, self.train.first(count), self.held.first(count), self.test.first(count)
        )


def targets_of_part(part: Part) -> Tensor:
    """The targets of a part that has some."""
    targets = part.targets
    assert targets is not None  # noqa: S101 - checked when the data were put together
    return targets
