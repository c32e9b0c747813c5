"""What bulk prediction reads from: an ordered sequence of named shards, each of which can be opened anew."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, rows, tensors_of
from stfbnn.data import normalise
from stfbnn.errors import DataError, InputError

Transform: TypeAlias = Callable[[Inputs], Inputs]

# Of the start and of the end of a file, what its identity is made of.
_SAMPLED_BYTES = 2**16


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a shard.

    Attributes:
        inputs: B examples, as the model takes them.
        columns: What is passed through to the output, by name: B values each, as Python or numpy values that pyarrow knows.
    """

    inputs: Inputs
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return batch_size(self.inputs)

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` (exclusive)."""
        return Rows(rows(self.inputs, start, stop), {name: values[start:stop] for name, values in self.columns.items()})


class Source(ABC):
    """Named shards in a fixed order, each of which gives its rows in a fixed order as often as it is opened.

    Shards may be opened in several threads and processes at once.
    """

    @abstractmethod
    def shards(self) -> Sequence[str]:
        """The shards' names, in order; every process must be given the same ones."""

    @abstractmethod
    def open(self, name: str, keep: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Read a shard from its start.

        Args:
            name: One of `shards`.
            keep: Columns to pass through.
            batch_size: Rows to give at once, at most.

        Raises:
            DataError: The shard is missing or damaged; the message names it.
        """

    @abstractmethod
    def identity(self, name: str) -> str:
        """What says that a shard is still the same one: predictions of two identities are never mixed.

        Raises:
            DataError: The shard is missing.
        """

    def settings(self) -> Mapping[str, Any]:
        """How the rows are read, as JSON has it: other settings are another source."""
        return {}


@dataclass(frozen=True)
class Normalise:
    """A transform: (inputs − mean) / std, per channel or column.

    Attributes:
        mean: One number, or one a channel (N x C x …) or column (N x F).
        std: Likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, inputs: Inputs) -> Inputs:
        """The inputs, one tensor, normalised.

        Raises:
            InputError: The numbers do not fit the inputs, or these are several tensors.
        """
        if not isinstance(inputs, Tensor):
            raise InputError("Normalise takes inputs of one tensor; give a transform of your own for several")
        return normalise(inputs, self.mean, self.std)


def transformed(inputs: Inputs, transform: Transform | None) -> Inputs:
    """The inputs after ``transform``."""
    return inputs if transform is None else transform(inputs)


def describe(transform: Transform | None) -> str | None:
    """A text by which two transforms are told apart as far as their names or their settings do."""
    if transform is None:
        return None
    name = getattr(transform, "__qualname__", None)
    if name is not None:
        return str(name)
    # The repr of a plain object holds its address, which changes from run to run.
    return repr(transform) if "__repr__" in vars(type(transform)) else type(transform).__qualname__


def file_identity(path: Path) -> str:
    """Size, and a hash of a file's first and last 64 KiB (a parquet file's index is at its end).

    The time of change is left out: it differs between copies on several machines.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for start in (0, max(0, size - _SAMPLED_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLED_BYTES))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return f"{size}-{digest.hexdigest()[:32]}"


def inputs_identity(inputs: Inputs) -> str:
    """A hash of the tensors of a batch: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors_of(inputs):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def find_files(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder with these suffixes, sorted by name; or the files that are named, as they are ordered.

    Hidden files, and those whose names begin with an underscore, are left out of a folder, as other readers do.

    Raises:
        DataError: There is none, one does not exist, or two have the same name.
    """
    named = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(one) for one in path]
    files: list[Path] = []
    for one in named:
        if one.is_dir():
            inside = (file for file in one.iterdir() if file.name.endswith(tuple(suffixes)))
            files += sorted(file for file in inside if not file.name.startswith((".", "_")))
        elif one.is_file():
            files.append(one)
        else:
            raise DataError(f"{one} does not exist; give a file, a folder or a list of files")
    if not files:
        raise DataError(f"{', '.join(map(str, named))} holds no file that ends in {' or '.join(suffixes)}")
    names = [file.name for file in files]
    double = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise DataError(f"two files are called {double}; shards are told apart by their names, so rename one")
    return files
