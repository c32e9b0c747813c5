"""Which kind of source something is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from stfbnn.bulk.counted_sources import DatasetSource, HuggingFaceSource, IterableSource
from stfbnn.bulk.parquet_source import SUFFIX, ParquetSource
from stfbnn.bulk.source import Source, Transform
from stfbnn.bulk.tar_source import SUFFIXES, TarSource
from stfbnn.errors import DataError, InputError


def as_source(source: Any, rows_per_shard: int, has_targets: bool = True) -> Source:
    """Take whatever holds rows as a source.

    Args:
        source: A `Source`; a folder or files of parquet or tar; a tensor; a torch data set; a data set of Hugging Face's
            ``datasets``; or an iterable of batches, or a function that returns an iterator of them.
        rows_per_shard: Rows of the shards into which what has no files is cut; of an iterable, about so many.
        has_targets: False for batches and examples that are tuples of inputs without a target.

    Raises:
        DataError: Files are missing or of no known kind.
        InputError: It is nothing of these.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str | os.PathLike) or _are_paths(source):
        return file_source(source)
    if isinstance(source, Tensor):
        return DatasetSource(source, rows_per_shard)
    if all(hasattr(source, name) for name in ("column_names", "shard", "__getitem__", "__len__")):
        return HuggingFaceSource(source, rows_per_shard)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return DatasetSource(source, rows_per_shard, has_targets=has_targets)
    if (isinstance(source, Iterable) and not isinstance(source, dict | tuple)) or callable(source):
        return _iterable_source(source, rows_per_shard, has_targets)
    raise InputError(
        f"the source is a {type(source).__name__}; give a folder or files of parquet or tar, a tensor, a data set, or an "
        f"iterable of batches"
    )


def file_source(
    path: Any,
    *,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    shape: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
    transform: Transform | None = None,
) -> Source:
    """Parquet or tar files as a source; which of them, their names say.

    Args:
        path: A folder, a file, or several files.
        inputs: Columns of parquet files.
        target: A column of parquet files that is no input.
        shape: Of one example, for lists in parquet files that are flattened.
        image_size: (height, width) to which images are resized.
        transform: Called on every batch of inputs.

    Raises:
        DataError: They are of no known kind, or of both.
    """
    named = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(one) for one in path]
    names = [file.name for one in named for file in (one.iterdir() if one.is_dir() else [one])]
    parquet = any(name.endswith(SUFFIX) for name in names)
    tar = any(name.endswith(SUFFIXES) for name in names)
    where = ", ".join(map(str, named[:3]))
    if parquet == tar:
        found = "both parquet and tar files" if parquet else f"no file that ends in {', '.join((SUFFIX, *SUFFIXES))}"
        raise DataError(f"{where} holds {found}; give a folder or a list of files of one kind")
    if parquet:
        return ParquetSource(
            path, inputs=inputs, target=target, shape=shape, image_size=image_size, transform=transform
        )
    return TarSource(path, image_size=image_size, transform=transform)


def _iterable_source(
    source: Iterable[Any] | Callable[[], Any], rows_per_shard: int, has_targets: bool
) -> IterableSource:
    probe = IterableSource(source, 1, has_targets=has_targets)
    first = next(iter(probe.open(probe.shards()[0], (), rows_per_shard)), None) if probe.shards() else None
    if first is None:
        return probe
    return IterableSource(
        source, max(1, rows_per_shard // len(first)), count=len(probe.shards()), has_targets=has_targets
    )


def _are_paths(source: Any) -> bool:
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(one, str | Path) for one in source)
