"""Reading ahead of the network: a thread with a bounded queue, so that a slow network holds the reader back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch

from stfbnn.batches import batch_size, tensors_of
from stfbnn.bulk.source import Rows, Source
from stfbnn.errors import DataError, InputError, StfbnnError

# How often a thread that waits for room looks whether anyone still wants its rows, in seconds.
_POLL = 0.05


class UnreadableShardError(DataError):
    """A shard cannot be read, or its rows cannot be used; the message names the shard."""


class _End:
    pass


_Item: TypeAlias = "Rows | Exception | _End"


class ShardReader:
    """Reads one shard in a thread of its own, at most ``depth`` batches ahead (and one in its hands).

    Args:
        source: What holds the shard.
        name: Which shard.
        keep: Columns to pass through.
        size: Rows a batch, at most.
        skip: Rows at the shard's start that are not wanted.
        depth: Batches that may wait.
    """

    def __init__(self, source: Source, name: str, keep: Sequence[str], size: int, skip: int, depth: int) -> None:
        self._source, self._name, self._keep = source, name, tuple(keep)
        self._size, self._skip = size, skip
        self._queue: queue.Queue[_Item] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"reader of {name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Rows]:
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join()

    def _run(self) -> None:
        try:
            start = 0
            for batch in self._source.open(self._name, self._keep, self._size):
                stop = start + len(batch)
                self._check_columns(batch)
                if stop > self._skip:
                    wanted = batch.part(max(0, self._skip - start), len(batch))
                    self._check_finite(wanted, max(start, self._skip))
                    if not self._put(wanted):
                        return
                start = stop
            self._put(_End())
        except Exception as error:
            self._put(self._named(error))

    def _put(self, item: _Item) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False

    def _check_columns(self, batch: Rows) -> None:
        lengths = {name: len(values) for name, values in batch.columns.items()}
        if set(lengths) != set(self._keep) or any(length != len(batch) for length in lengths.values()):
            raise InputError(
                f"the source gave the columns {lengths} beside {len(batch)} rows; {list(self._keep)} are to be kept, with one "
                f"value a row"
            )

    def _check_finite(self, batch: Rows, first: int) -> None:
        for tensor in tensors_of(batch.inputs):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                good = torch.isfinite(tensor).reshape(batch_size(batch.inputs), -1).all(dim=1)
                bad = int(torch.nonzero(~good)[0])
                raise DataError(
                    f"row {first + bad} (the first is 0) of {self._name!r} holds NaN or infinite inputs; clean it or drop it"
                )

    def _named(self, error: Exception) -> Exception:
        said = str(error)
        text = said if self._name in said else f"shard {self._name!r}: {said}"
        if isinstance(error, InputError):
            named: Exception = InputError(text)
        elif isinstance(error, StfbnnError):
            named = UnreadableShardError(text)
        else:
            named = UnreadableShardError(f"shard {self._name!r} cannot be read: {type(error).__name__}: {said}")
        named.__cause__ = error
        return named


class Cursor:
    """A place in a shard's rows, from which a number of them can be taken.

    Args:
        batches: The rows that are left.
    """

    def __init__(self, batches: Iterator[Rows]) -> None:
        self._batches = batches
        self._next: Rows | None = None

    def peek(self) -> Rows | None:
        """The rows that come next, some of them; None at the end."""
        if self._next is None:
            self._next = next(self._batches, None)
        return self._next

    def take(self, count: int) -> Iterator[Rows]:
        """The next ``count`` rows, or what is left."""
        while count and (batch := self.peek()) is not None:
            size = len(batch)
            if size <= count:
                self._next = None
                yield batch
            else:
                self._next = batch.part(count, size)
                yield batch.part(0, count)
            count -= min(size, count)
