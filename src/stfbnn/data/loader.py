"""From a split to batches: rows are fetched together, turned into floats and normalised together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stfbnn.data.split import Split, to_float
from stfbnn.errors import InputError
from stfbnn.randomness import generator

Statistic: TypeAlias = Tensor | Sequence[float] | float
Example: TypeAlias = tuple[Tensor, Tensor] | Tensor


class SplitDataset(Dataset[Example]):
    """A split as a torch data set, normalised on the way out.

    Works with any ``DataLoader``; rows are gathered together, which is many times faster than one by one.

    Args:
        split: The examples.
        mean: Per channel (images) or column (tables), or one number for all; None for no normalisation.
        std: The same for the standard deviation.

    Raises:
        InputError: Only one of ``mean`` and ``std`` is given, their length is not the number of channels or
            columns, or they are not finite, or ``std`` is not positive.
    """

    def __init__(self, split: Split, mean: Statistic | None = None, std: Statistic | None = None) -> None:
        self._split = split
        self._normalisation = _statistics(split.stored, mean, std)

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = index % len(self)
        found = self.batch([row])
        return (found[0][0], found[1][0]) if isinstance(found, tuple) else found[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """The examples one by one, for loaders with a collate function of their own."""
        found = self.batch(indices)
        if isinstance(found, tuple):
            return list(zip(*found, strict=True))
        return list(found)

    def batch(self, indices: Sequence[int]) -> Example:
        """The examples at ``indices`` as one batch: (inputs, targets), or bare inputs without targets."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        inputs = _normalise(to_float(self._split.stored[rows]), self._normalisation)
        targets = self._split.targets
        return inputs if targets is None else (inputs, targets[rows])


class _WholeBatches(Dataset[Example]):
    # DataLoader hands what __getitems__ returns to its collate function, so a whole batch passes untouched.
    def __init__(self, dataset: SplitDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> Example:
        return self._dataset.batch(indices)


def loader(
    split: Split,
    batch_size: int,
    shuffle: bool = False,
    mean: Statistic | None = None,
    std: Statistic | None = None,
    *,
    seed: int | None = None,
    drop_last: bool = False,
) -> DataLoader[Example]:
    """Batches of a split.

    Args:
        split: The examples.
        batch_size: Examples a batch; the last batch may be smaller.
        shuffle: A new order in every pass.
        mean: What to subtract, per channel or column or one number; None for no normalisation.
        std: What to divide by, likewise.
        seed: Where given, the orders of pass 1, 2, … follow from it alone. With None they are drawn from torch's
            global generator, which training seeds for each epoch, so that a resumed run sees the same orders.
        drop_last: Leave out a last batch that is not full.

    Returns:
        A loader of pairs (inputs, targets), or of bare inputs where the split has no targets.

    Raises:
        InputError: The batch size is not a positive integer, or the statistics do not fit (see SplitDataset).
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a positive integer, but it is {batch_size!r}")
    return DataLoader(
        _WholeBatches(SplitDataset(split, mean, std)),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        collate_fn=_as_it_is,
        generator=None if seed is None else generator(seed, "loader"),
    )


def normalise(inputs: Tensor, mean: Statistic, std: Statistic) -> Tensor:
    """``(inputs - mean) / std`` per channel (N x C x …) or column (N x F).

    Raises:
        InputError: The statistics do not fit the inputs.
    """
    return _normalise(inputs, _statistics(inputs, mean, std))


def _normalise(inputs: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    return inputs if statistics is None else (inputs - statistics[0]) / statistics[1]


def _statistics(inputs: Tensor, mean: Statistic | None, std: Statistic | None) -> tuple[Tensor, Tensor] | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("give both mean and std to normalise, or neither")
    centre, scale = (_per_channel(value, name, inputs) for value, name in ((mean, "mean"), (std, "std")))
    if not bool((scale > 0).all()):
        raise InputError(f"std must be positive everywhere, but its smallest value is {float(scale.min())}")
    return centre, scale


def _per_channel(value: Statistic, name: str, inputs: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32, device=inputs.device).flatten()
    if tensor.numel() not in (1, inputs.shape[1]):
        raise InputError(
            f"{name} must be one number or {inputs.shape[1]} (one per channel or column of inputs of shape "
            f"{tuple(inputs.shape)}), but it has {tensor.numel()}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} must be finite, but it is {tensor.tolist()}")
    return tensor.reshape(1, -1, *[1] * (inputs.ndim - 2))


def _as_it_is(batch: Any) -> Any:
    return batch
