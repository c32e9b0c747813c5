"""Parquet files as a source: one shard a file, read batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from stfbnn.batches import Inputs
from stfbnn.bulk.source import Rows, Source, Transform, describe, file_identity, find_files, transformed
from stfbnn.bulk.values import as_tensor, columns_side_by_side
from stfbnn.data.parquet import is_image, require_pyarrow
from stfbnn.errors import DataError, InputError

SUFFIX = ".parquet"


class ParquetSource(Source):
    """Parquet files, in the order of their names; each is a shard.

    Args:
        path: A folder, a file, or several files in the order that they are given.
        inputs: A column of numbers, of lists of numbers or of encoded images (bytes, or a struct with ``bytes``); several
            columns of numbers, which become a table; or a mapping from the model's arguments to columns, for a model that is
            called with keywords. None takes the only column of images, else all columns that are not kept and not ``target``.
        target: A column that is neither an input nor kept.
        shape: Shape of one example, for lists that are flattened; None leaves them.
        image_size: (height, width) to which images are resized.
        transform: Called on every batch of inputs (floats are float32; integers of a single tensor become float32 too).

    Raises:
        DataError: pyarrow is missing, there is no file, or the first file is damaged or lacks a column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        inputs: str | Sequence[str] | Mapping[str, str] | None = None,
        target: str | None = None,
        shape: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        require_pyarrow()
        self._files = {file.name: file for file in find_files(path, (SUFFIX,))}
        self._inputs = [inputs] if isinstance(inputs, str) else inputs
        self._target = target
        self._shape = None if shape is None else tuple(shape)
        self._image_size, self._transform = image_size, transform
        named = self._inputs.values() if isinstance(self._inputs, Mapping) else self._inputs or ()
        first = next(iter(self._files.values()))
        with _opened(first) as file:
            self._require(first, named, file.schema_arrow.names)

    def shards(self) -> Sequence[str]:
        """The files' names."""
        return list(self._files)

    def identity(self, name: str) -> str:
        """The file's size and a hash of its ends."""
        return file_identity(self._files[name])

    def settings(self) -> Mapping[str, Any]:
        """The columns and what is done to them."""
        inputs = self._inputs
        return {
            "kind": "parquet",
            "inputs": dict(inputs) if isinstance(inputs, Mapping) else None if inputs is None else list(inputs),
            "target": self._target,
            "shape": None if self._shape is None else list(self._shape),
            "image_size": None if self._image_size is None else list(self._image_size),
            "transform": describe(self._transform),
        }

    def open(self, name: str, keep: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Read a file from its start; see `Source.open`."""
        path, row = self._files[name], 0
        with _opened(path) as file:
            present = file.schema_arrow.names
            chosen = self._chosen(file.schema_arrow, keep)
            columns = list(chosen.values()) if isinstance(chosen, Mapping) else list(chosen)
            self._require(path, [*columns, *keep], present)
            for batch in file.iter_batches(batch_size=batch_size, columns=list(dict.fromkeys([*columns, *keep]))):
                if not batch.num_rows:
                    continue
                tensors = {
                    column: as_tensor(
                        _values(batch.column(column)), f"{path}, column {column!r}", row, self._image_size
                    )
                    for column in columns
                }
                inputs = self._assembled(tensors, chosen, path)
                yield Rows(transformed(inputs, self._transform), {column: batch.column(column) for column in keep})
                row += batch.num_rows

    def _chosen(self, schema: Any, keep: Sequence[str]) -> Mapping[str, str] | Sequence[str]:
        if self._inputs is not None:
            return self._inputs
        rest = [field for field in schema if field.name not in keep and field.name != self._target]
        images = [field.name for field in rest if is_image(field.type)]
        return images if len(images) == 1 else [field.name for field in rest]

    def _assembled(
        self, tensors: Mapping[str, Tensor], chosen: Mapping[str, str] | Sequence[str], path: Path
    ) -> Inputs:
        if isinstance(chosen, Mapping):
            return {argument: tensors[column] for argument, column in chosen.items()}
        whole = columns_side_by_side(list(tensors.values()), list(tensors), str(path)).float()
        if self._shape is None:
            return whole
        try:
            return whole.reshape(len(whole), *self._shape)
        except RuntimeError as error:
            raise InputError(
                f"{path}: {whole[0].numel()} numbers a row cannot be given the shape {self._shape}"
            ) from error

    @staticmethod
    def _require(path: Path, names: Iterable[str], present: Sequence[str]) -> None:
        missing = [name for name in names if name not in present]
        if missing:
            raise DataError(f"{path} lacks the columns {missing}; it has {list(present)}")
        if not present:
            raise DataError(f"{path} has no columns")


def _values(column: Any) -> Any:
    """An Arrow array as numpy has it where that loses nothing, else as a list."""
    import pyarrow as pa  # noqa: PLC0415 - optional

    kind = column.type
    if not column.null_count and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return column.to_numpy(zero_copy_only=False)
    fixed = pa.types.is_fixed_size_list(kind)
    if fixed and not column.null_count and pa.types.is_primitive(kind.value_type):
        flat = column.flatten()
        if not flat.null_count:
            return flat.to_numpy(zero_copy_only=False).reshape(len(column), kind.list_size)
    return column.to_pylist()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415 - optional
    import pyarrow.parquet as pq  # noqa: PLC0415 - optional

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}; it is damaged or cut short") from error
