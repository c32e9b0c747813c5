"""Parquet files: a column of encoded images and one of labels, as the Hugging Face hub keeps them, or a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.images import Encoded, cached, decode, import_pillow, stamp
from stfbnn.data.source import Array, Options, Part, choose_target, find_parts
from stfbnn.errors import DataError

SUFFIX = ".parquet"
_ROWS = 1024


@dataclass(frozen=True)
class _Layout:
    image: str | None
    target: str | None
    columns: tuple[str, ...]
    names: tuple[str, ...] | None


def read(path: Path, options: Options) -> DataSet:
    """Read one file, or the files ``train*.parquet`` and ``test*.parquet`` of a folder (shards are joined).

    With a column of images (bytes, or a struct with ``bytes``) the target is ``options.target`` or the column called
    label, target, class or y; without one, all columns are numbers and the last is the target if none has such a name.

    Raises:
        DataError: pyarrow or Pillow is missing, a file is damaged, a column has another type or gaps, or it is not
            clear which column is the target.
    """
    require_pyarrow()
    train_files, test_files = find_parts(path, (SUFFIX,)) if path.is_dir() else ([path], [])
    layout = _layout(train_files[0], options)
    # Every schema is looked at before anything is decoded.
    for file in (*train_files[1:], *test_files):
        _check_schema(file, layout, train_files[0], needs_target=file in train_files)
    if layout.image is not None:
        import_pillow()
    train = _part(train_files, layout, options)
    test = _part(test_files, layout, options) if test_files else None
    return assemble("parquet", train, test, options, columns=layout.columns, names=layout.names)


def require_pyarrow() -> None:
    """Refuse to go on without the package that reads and writes parquet.

    Raises:
        DataError: It is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise DataError("parquet files need pyarrow: pip install 'stfbnn[data]'") from error


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A parquet file to read from; whatever pyarrow says of damage while it is open becomes a DataError."""
    import pyarrow as pa  # noqa: PLC0415 - optional
    import pyarrow.parquet as pq  # noqa: PLC0415 - optional

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}; it is damaged or cut short") from error


def _layout(path: Path, options: Options) -> _Layout:
    with _open(path) as file:
        schema = file.schema_arrow
        images = [field.name for field in schema if is_image(field.type)]
    if len(images) > 1:
        raise DataError(f"{path} has several columns of images, {', '.join(images)}; keep one of them")
    rest = [field.name for field in schema if field.name not in images]
    if not images:
        if len(rest) < 2:
            raise DataError(f"{path} has the columns {rest}; at least one input and the target are expected")
        target = choose_target(rest, options.target, str(path))
        columns = tuple(name for name in rest if name != target)
        bad = next((name for name in columns if not _is_number(schema.field(name).type)), None)
        if bad is not None:
            raise DataError(
                f"{path} has the column {bad!r} of the type {schema.field(bad).type}; inputs must be numbers, or one "
                f"column of images (bytes): encode or drop the column, or name the target with target= if this is it"
            )
        return _Layout(None, target, columns, _class_names(schema, target))
    target = choose_target(rest, options.target, str(path), last=False)
    if target is None and rest:
        raise DataError(f"{path} has the columns {rest} beside the images; name the target with target=")
    return _Layout(images[0], target, (), _class_names(schema, target))


def _check_schema(path: Path, layout: _Layout, first: Path, needs_target: bool) -> None:
    with _open(path) as file:
        schema = file.schema_arrow
        names = schema.names
    needed = {*layout.columns, *([layout.image] if layout.image else [])}
    if needs_target and layout.target is not None:
        needed.add(layout.target)
    missing = sorted(needed - set(names))
    if missing:
        raise DataError(f"{path} lacks the columns {missing}, which {first.name} has; it has {names}")
    for name in needed - {layout.target}:
        expected = is_image if name == layout.image else _is_number
        if not expected(schema.field(name).type):
            raise DataError(
                f"{path} has the column {name!r} of the type {schema.field(name).type}, unlike {first.name}"
            )


def _part(files: Sequence[Path], layout: _Layout, options: Options) -> Part:
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    targets = _targets(files, layout.target)
    if layout.image is None:
        return Part(_table(files, layout.columns), targets, where)
    total = 0
    for path in files:
        with _open(path) as file:
            total += file.metadata.num_rows
    if not total:
        raise DataError(f"{where} is empty; at least one example is needed")
    count = total if options.limit is None else min(total, options.limit)
    image, size = layout.image, options.image_size
    key = {"files": [stamp(path) for path in files], "column": image, "size": size, "count": count}
    pixels = cached(
        options.cache_dir, key, lambda: decode(_encoded(files, image, count), count, size, options.show_progress)
    )
    return Part(pixels, targets, where, cut=count < total)


def _encoded(files: Sequence[Path], column: str, count: int) -> Iterator[Encoded]:
    for path in files:
        row = 0
        for values in _batches(path, column):
            for value in values:
                if not count:
                    return
                data = value.get("bytes") if isinstance(value, dict) else value
                row += 1
                if not data:
                    raise DataError(
                        f"{path} has no bytes for the image in row {row}; images must be in the file itself"
                    )
                yield f"{path}, row {row}", data
                count -= 1


def _batches(path: Path, column: str) -> Iterator[list[Any]]:
    with _open(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            yield batch.column(0).to_pylist()


def _column(files: Sequence[Path], name: str) -> Any:
    """One column of all files, without gaps."""
    import pyarrow as pa  # noqa: PLC0415 - optional

    found = []
    for path in files:
        with _open(path) as file:
            column = file.read(columns=[name]).column(name)
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy())) + 1
            raise DataError(
                f"{path} has {column.null_count} missing values in column {name!r}, the first in row {row}; fill them "
                f"in or drop these rows"
            )
        found.append(column)
    if len({str(column.type) for column in found}) > 1:
        raise DataError(f"the column {name!r} has different types in {', '.join(path.name for path in files)}")
    return pa.chunked_array([chunk for column in found for chunk in column.chunks], type=found[0].type)


def _targets(files: Sequence[Path], name: str | None) -> Array | None:
    import pyarrow as pa  # noqa: PLC0415 - optional

    if name is None:
        return None
    for path in files:
        with _open(path) as file:
            if name not in file.schema_arrow.names:
                return None
    column = _column(files, name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_number(column.type):
        return np.asarray(column.to_numpy())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    raise DataError(f"{files[0]} has the target {name!r} of the type {column.type}; numbers or texts are expected")


def _table(files: Sequence[Path], columns: Sequence[str]) -> Array:
    return np.column_stack([np.asarray(_column(files, name).to_numpy(), dtype=np.float64) for name in columns])


def _is_number(kind: Any) -> bool:
    import pyarrow as pa  # noqa: PLC0415 - optional

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_image(kind: Any) -> bool:
    """Whether a column of this Arrow type holds image files: bytes, or the struct of the Hugging Face hub with some."""
    import pyarrow as pa  # noqa: PLC0415 - optional

    if pa.types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return "bytes" in names and is_image(kind.field(names.index("bytes")).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: Any, target: str | None) -> tuple[str, ...] | None:
    """The names of the classes, where the file carries them in the way of the Hugging Face hub."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None or target is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][target]["names"]
    except (ValueError, KeyError, TypeError):
        return None  # other features, or another version's form: the labels themselves serve as names
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None
