"""What a data loader tells of itself: how long it is, which rows it reads, and the generators that it draws from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from stfbnn.errors import InputError

_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


def require_rereadable(loader: Iterable[Any]) -> None:
    """Refuse an iterator, which gives its batches once and is empty after that.

    Raises:
        InputError: It is one, or cannot be iterated at all.
    """
    if not isinstance(loader, Iterable):
        raise InputError(f"train_loader must give batches when iterated, but it is a {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise InputError(
            f"train_loader is a {type(loader).__name__}, which can be read only once, but every epoch reads it anew; give a "
            f"DataLoader or a list of batches"
        )


def length(loader: Iterable[Any]) -> int | None:
    """Batches of a loader, or None where it does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def count_examples(loader: Iterable[Any], counted: int, several_ranks: bool = False) -> int:
    """N: the different rows of the data set that a loader reads, else the rows that it gave in one pass.

    Args:
        loader: All the data, not a rank's part of them.
        counted: The rows that were given in one pass.
        several_ranks: Whether they were given to several ranks, some perhaps twice so that all have the same number.
    """
    rows = _sampled_rows(loader)
    most = length(getattr(loader, "sampler", ())) if several_ranks else None
    counted = min(counted, most) if most else counted
    return counted if rows is None else len(set(rows))


def shared_examples(first: Iterable[Any], second: Iterable[Any]) -> int:
    """Examples that two loaders share because they read the same rows of the same data set object."""
    base_first, rows_first = _base_rows(first)
    base_second, rows_second = _base_rows(second)
    if base_first is None or base_first is not base_second:
        return 0
    return len(rows_first & rows_second)


def generator_states(loader: Iterable[Any]) -> list[torch.Tensor]:
    """The states of the generators that a loader and its samplers own; none where they draw from the global one."""
    return [generator.get_state() for generator in _generators(loader)]


def set_generator_states(loader: Iterable[Any], states: Sequence[torch.Tensor]) -> None:
    """Take back what `generator_states` gave."""
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state)


@contextmanager
def kept_generators(loader: Iterable[Any]) -> Iterator[None]:
    """Leave a loader's own generators as they were."""
    states = generator_states(loader)
    try:
        yield
    finally:
        set_generator_states(loader, states)


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    unique = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return list(unique.values())


def _sampled_rows(loader: Iterable[Any]) -> Iterable[int] | None:
    """The rows of ``loader.dataset`` that may come up; None where that cannot be known."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return [int(row) for row in sampler.indices]
    if isinstance(sampler, list | tuple | range):
        return [int(row) for row in sampler]
    if isinstance(sampler, _WHOLE):
        try:
            return range(len(loader.dataset))  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return None
    return None


def _base_rows(loader: Iterable[Any]) -> tuple[object | None, set[int]]:
    """The data set at the bottom of any subsets, and the rows of it."""
    rows, dataset = _sampled_rows(loader), getattr(loader, "dataset", None)
    if rows is None:
        return None, set()
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    return dataset, set(rows)
