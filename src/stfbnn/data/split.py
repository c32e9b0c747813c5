"""One part of a data set, and how to hold some of it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.randomness import generator


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and, where they are known, their targets.

    Images that come as bytes stay bytes: a set of 60,000 takes a quarter of the memory, and only the rows of a
    batch are ever turned into floats. ``inputs`` is the same in floats.

    Attributes:
        stored: The inputs as they are kept. Images N x C x H x W: uint8 (0 to 255) or float32 (0 to 1).
            Tables N x F: float32.
        targets: N class indices (int64), N or N x D values to regress (float32), or None.

    Raises:
        InputError: The tensors do not have these types, or are not equally long, or there is no example.
    """

    stored: Tensor
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.stored.dtype not in (torch.uint8, torch.float32):
            raise InputError(f"the inputs of a split must be uint8 or float32, but they are {self.stored.dtype}")
        if self.stored.ndim < 2 or not len(self.stored):
            raise InputError(
                f"the inputs of a split must have at least one example along their first dimension and the "
                f"example's own shape after it, but their shape is {tuple(self.stored.shape)}"
            )
        if self.targets is None:
            return
        if self.targets.dtype not in (torch.int64, torch.float32):
            raise InputError(
                f"the targets of a split must be int64 (classes) or float32 (regression), but they are "
                f"{self.targets.dtype}"
            )
        if not self.targets.ndim or len(self.targets) != len(self.stored):
            raise InputError(
                f"a split needs one target per example: there are {len(self.stored)} examples, and the shape "
                f"of the targets is {tuple(self.targets.shape)}"
            )

    @property
    def inputs(self) -> Tensor:
        """All inputs in float32, images in [0, 1]; made anew at each use where bytes are kept."""
        return to_float(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, indices: Tensor) -> Split:
        """The examples at ``indices`` (int64, one dimension), in that order, as a split of its own."""
        return Split(self.stored[indices], None if self.targets is None else self.targets[indices])


def to_float(stored: Tensor) -> Tensor:
    """What a split keeps, in float32: bytes are divided by 255, floats are as they were."""
    return stored.float().div_(255) if stored.dtype == torch.uint8 else stored


def hold_out(split: Split, fraction_or_count: float | int, seed: int) -> tuple[Split, Split]:
    """Divide a split in two at random, each class in proportion.

    Class indices are sorted after a random permutation and every k-th example is taken from a random start
    (systematic sampling): each example has the same chance, and the number held out of a class differs by less
    than one from the exact proportion, also for classes of one example and parts smaller than the class count.

    Args:
        split: What to divide.
        fraction_or_count: A float in (0, 1), the share to hold out; or an integer, the number of examples.
        seed: The same seed gives the same division.

    Returns:
        The rest and the part held out, disjoint, both in the order of ``split``.

    Raises:
        InputError: The fraction or count is out of range, or would leave one of the two empty.
    """
    total = len(split)
    count = _held_count(fraction_or_count, total)
    draws = generator(seed, "hold-out")
    order = torch.randperm(total, generator=draws)
    if split.targets is not None and split.targets.dtype == torch.int64:
        order = order[torch.argsort(split.targets[order], stable=True)]
    start = int(torch.randint(total, (), generator=draws))
    # In whole numbers, so that no rounding can take one example twice.
    picks = (torch.arange(count) * total + start) // count
    held = torch.zeros(total, dtype=torch.bool)
    held[order[picks]] = True
    return split.take((~held).nonzero().flatten()), split.take(held.nonzero().flatten())


def _held_count(fraction_or_count: float | int, total: int) -> int:
    if isinstance(fraction_or_count, bool) or not isinstance(fraction_or_count, int | float):
        raise InputError(f"what to hold out must be a fraction or a count, but it is {fraction_or_count!r}")
    if isinstance(fraction_or_count, float):
        if not 0 < fraction_or_count < 1:
            raise InputError(
                f"the fraction to hold out must lie between 0 and 1, but it is {fraction_or_count}; "
                f"for a number of examples give an integer"
            )
        count = round(fraction_or_count * total)
    else:
        count = fraction_or_count
    if not 0 < count < total:
        raise InputError(
            f"cannot hold {count} of {total} examples out (asked for: {fraction_or_count}); both parts need at "
            f"least one example"
        )
    return count
