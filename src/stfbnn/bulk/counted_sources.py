"""Sources without files: data sets by position, and iterables of batches, cut into shards by count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from stfbnn.batches import TARGET_KEY, Inputs, as_inputs, split_batch
from stfbnn.bulk.source import Rows, Source, Transform, describe, inputs_identity, transformed
from stfbnn.bulk.values import as_tensor, columns_side_by_side
from stfbnn.errors import DataError, InputError

TARGET = "target"


class DatasetSource(Source):
    """A tensor, or a torch data set with positions, cut into shards of ``rows_per_shard`` examples.

    It must give the same example at a position whenever it is asked: augmentation has to be off.

    Args:
        dataset: A tensor (N, …), or a data set whose examples are inputs, (inputs, target), or mappings.
        rows_per_shard: Examples of a shard; the last may have fewer.
        has_targets: False for a data set whose examples are tuples of inputs without a target.
        target_key: The target's entry in mappings.
    """

    def __init__(
        self,
        dataset: Tensor | Dataset[Any],
        rows_per_shard: int = 10_000,
        *,
        has_targets: bool = True,
        target_key: str = TARGET_KEY,
    ) -> None:
        self._dataset: Any = dataset
        self._count = _length(dataset)
        self._rows, self._has_targets, self._target_key = rows_per_shard, has_targets, target_key

    def shards(self) -> Sequence[str]:
        """Their first and last positions."""
        return _ranges(self._count, self._rows)

    def identity(self, name: str) -> str:
        """A hash of the shard's first example, and its name."""
        start, _ = _parsed(name)
        return inputs_identity(self._batch(start, start + 1, ()).inputs)

    def settings(self) -> Mapping[str, Any]:
        """How examples are taken apart."""
        return {"kind": "dataset", "has_targets": self._has_targets, "target_key": self._target_key}

    def open(self, name: str, keep: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Read a shard from its start; see `Source.open`."""
        start, stop = _parsed(name)
        for first in range(start, stop, batch_size):
            yield self._batch(first, min(stop, first + batch_size), keep)

    def _batch(self, start: int, stop: int, keep: Sequence[str]) -> Rows:
        if isinstance(self._dataset, Tensor):
            return _taken_apart(self._dataset[start:stop], keep, True, self._target_key)
        whole = default_collate([self._dataset[index] for index in range(start, stop)])
        return _taken_apart(whole, keep, self._has_targets, self._target_key)


class IterableSource(Source):
    """Any iterable of batches, such as a ``DataLoader``, cut into shards of ``batches_per_shard`` batches.

    Every pass must give the same rows in the same order: no shuffling, no augmentation. A shard that does not follow the one
    before it is reached by passing over the batches before it, so every process reads all of the data.

    Args:
        data: An iterable that can be gone through more than once, or a function that returns a new iterator.
        batches_per_shard: Batches of a shard.
        count: How many batches there are; None asks ``len``, or counts them in a pass.
        has_targets: False for batches that are tuples of inputs without a target.
        target_key: The target's entry in mappings.

    Raises:
        InputError: The data can be gone through only once, or the loader shuffles.
    """

    def __init__(
        self,
        data: Iterable[Any] | Callable[[], Iterator[Any]],
        batches_per_shard: int = 32,
        *,
        count: int | None = None,
        has_targets: bool = True,
        target_key: str = TARGET_KEY,
    ) -> None:
        if isinstance(data, Iterator):
            raise InputError(
                "the source is an iterator, which can be gone through only once; give the iterable itself, or a function "
                "that returns a new iterator"
            )
        if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
            raise InputError("the loader shuffles, so rows have no order to keep; make it with shuffle=False")
        self._data = data
        self._has_targets, self._target_key = has_targets, target_key
        self._size = batches_per_shard
        self._count = _batches(self._begin()) if count is None and not hasattr(data, "__len__") else count
        if self._count is None:
            self._count = _length(data)
        # Passes that stand at the start of a shard, so that consecutive shards are read in one.
        self._parked: list[tuple[int, Iterator[Any]]] = []
        self._lock = threading.Lock()
        first = next(self._begin(), None)
        self._first = None if first is None else inputs_identity(self._rows(first, ()).inputs)

    def shards(self) -> Sequence[str]:
        """The numbers of their first and last batches."""
        return _ranges(self._count or 0, self._size)

    def identity(self, name: str) -> str:
        """A hash of the first batch of all, and the shard's name."""
        return f"{self._first}-{name}"

    def settings(self) -> Mapping[str, Any]:
        """How batches are taken apart, and how many there are."""
        return {
            "kind": "iterable",
            "batches": self._count,
            "has_targets": self._has_targets,
            "target_key": self._target_key,
        }

    def open(self, name: str, keep: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Read a shard from its start; see `Source.open`."""
        start, stop = _parsed(name)
        position, batches = self._pass_before(start)
        next(islice(batches, start - position, start - position), None)
        for number in range(start, stop):
            batch = next(batches, None)
            if batch is None:
                raise DataError(f"the source gave {number} batches, but {self._count} were expected (shard {name!r})")
            whole = self._rows(batch, keep)
            for first in range(0, len(whole), batch_size):
                yield whole.part(first, min(len(whole), first + batch_size))
        with self._lock:
            self._parked = [(stop, batches)]

    def _begin(self) -> Iterator[Any]:
        return iter(self._data() if callable(self._data) and not isinstance(self._data, Iterable) else self._data)

    def _pass_before(self, start: int) -> tuple[int, Iterator[Any]]:
        with self._lock:
            usable = [parked for parked in self._parked if parked[0] <= start]
            if usable:
                best = max(usable, key=lambda parked: parked[0])
                self._parked.remove(best)
                return best
        return 0, self._begin()

    def _rows(self, batch: Any, keep: Sequence[str]) -> Rows:
        return _taken_apart(batch, keep, self._has_targets, self._target_key)


class HuggingFaceSource(Source):
    """A data set of Hugging Face's ``datasets`` (with positions; a streamed one is an iterable), cut into shards by count.

    Nothing of that package is imported: what is used is ``len``, ``column_names`` and slices that give a mapping from columns
    to values.

    Args:
        dataset: The data set.
        rows_per_shard: Examples of a shard; the last may have fewer.
        inputs: As for `ParquetSource`; None takes all columns that are not kept and not ``target``.
        target: A column that is neither an input nor kept.
        image_size: (height, width) to which images are resized.
        transform: Called on every batch of inputs.

    Raises:
        InputError: The data set lacks a column.
    """

    def __init__(
        self,
        dataset: Any,
        rows_per_shard: int = 10_000,
        *,
        inputs: str | Sequence[str] | Mapping[str, str] | None = None,
        target: str | None = None,
        image_size: tuple[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        self._dataset, self._rows = dataset, rows_per_shard
        self._inputs = [inputs] if isinstance(inputs, str) else inputs
        self._target, self._image_size, self._transform = target, image_size, transform
        self._require(self._inputs.values() if isinstance(self._inputs, Mapping) else self._inputs or ())

    def shards(self) -> Sequence[str]:
        """Their first and last positions."""
        return _ranges(len(self._dataset), self._rows)

    def identity(self, name: str) -> str:
        """The data set's own fingerprint, its length, and the shard's name."""
        return f"{getattr(self._dataset, '_fingerprint', None)}-{len(self._dataset)}-{name}"

    def settings(self) -> Mapping[str, Any]:
        """The columns and what is done to them."""
        inputs = self._inputs
        return {
            "kind": "datasets",
            "inputs": dict(inputs) if isinstance(inputs, Mapping) else None if inputs is None else list(inputs),
            "target": self._target,
            "image_size": None if self._image_size is None else list(self._image_size),
            "transform": describe(self._transform),
        }

    def open(self, name: str, keep: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Read a shard from its start; see `Source.open`."""
        self._require(keep)
        start, stop = _parsed(name)
        present = self._dataset.column_names
        chosen = self._inputs or [column for column in present if column not in keep and column != self._target]
        columns = list(chosen.values()) if isinstance(chosen, Mapping) else list(chosen)
        for first in range(start, stop, batch_size):
            found = self._dataset[first : min(stop, first + batch_size)]
            tensors = {
                column: as_tensor(
                    found[column], f"column {column!r} of shard {name!r}", first - start, self._image_size
                )
                for column in columns
            }
            inputs: Inputs
            if isinstance(chosen, Mapping):
                inputs = {argument: tensors[column] for argument, column in chosen.items()}
            else:
                inputs = columns_side_by_side(list(tensors.values()), columns, "the data set").float()
            yield Rows(transformed(inputs, self._transform), {column: _plain(found[column]) for column in keep})

    def _require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in self._dataset.column_names]
        if missing:
            raise InputError(f"the data set lacks the columns {missing}; it has {list(self._dataset.column_names)}")


def _taken_apart(batch: Any, keep: Sequence[str], has_targets: bool, target_key: str) -> Rows:
    """Inputs and kept columns of a batch as loaders give them: a mapping's entries, or ``"target"`` of a pair."""
    if isinstance(batch, Mapping):
        missing = [name for name in keep if name not in batch]
        if missing:
            raise InputError(f"a batch lacks the entries {missing} to keep; it has {sorted(map(str, batch))}")
        rest = {name: value for name, value in batch.items() if name not in keep}
        inputs, _ = split_batch(rest, target_key, has_targets=False)
        return Rows(inputs, {name: _plain(batch[name]) for name in keep})
    if isinstance(batch, Tensor):
        inputs, target = batch, None
    elif isinstance(batch, tuple | list) and len(batch) == 1:
        inputs, target = as_inputs(batch[0]), None
    else:
        inputs, target = split_batch(batch, target_key, has_targets)
    available = {} if target is None else {TARGET: target}
    missing = [name for name in keep if name not in available]
    if missing:
        raise InputError(
            f"keep names {missing}, but of batches that are no mappings only {TARGET!r} can be kept, where they have one"
        )
    return Rows(inputs, {name: _plain(available[name]) for name in keep})


def _plain(values: Any) -> Sequence[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _ranges(count: int, size: int) -> list[str]:
    if size < 1:
        raise InputError(f"a shard must have at least one row or batch, but {size} are asked for")
    digits = max(9, len(str(count)))
    return [f"{start:0{digits}}-{min(count, start + size):0{digits}}" for start in range(0, count, size)]


def _parsed(name: str) -> tuple[int, int]:
    start, _, stop = name.partition("-")
    return int(start), int(stop)


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError as error:
        raise InputError(f"the length of the {type(data).__name__} is not known ({error}); give count=") from error


def _batches(batches: Iterator[Any]) -> int:
    return sum(1 for _ in batches)
