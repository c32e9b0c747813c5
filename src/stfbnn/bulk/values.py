"""From the values of a column to a tensor: numbers, lists of numbers, arrays, tensors, encoded or decoded images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stfbnn.data.images import decode
from stfbnn.errors import DataError, InputError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")


def as_tensor(values: Any, where: str, first_row: int, image_size: tuple[int, int] | None = None) -> Tensor:
    """One column's values of consecutive rows as a tensor (B, …).

    Images become floats in 0 … 1, B x channels x height x width; other floats become float32, integers int64.

    Args:
        values: B values of one kind, or an array or tensor of them.
        where: What to call the column and its shard in messages.
        first_row: The number of the first of the rows, from 0, for messages.
        image_size: (height, width) to which images are resized; None where all have one size.

    Raises:
        DataError: A value is missing, of another length than the others, not a number, or a damaged image.
    """
    if isinstance(values, Tensor):
        return _as_number(values)
    if isinstance(values, np.ndarray) and values.dtype != object:
        return _number_array(values, where)
    listed: Sequence[Any] = list(values)
    missing = next((index for index, value in enumerate(listed) if _is_missing(value)), None)
    if missing is not None:
        raise DataError(f"{where} has no value in row {first_row + missing}; fill it in or drop the row")
    first = listed[0]
    if isinstance(first, bytes | dict):
        encoded = [value["bytes"] if isinstance(value, dict) else value for value in listed]
        named = ((f"{where}, row {first_row + index}", value) for index, value in enumerate(encoded))
        return torch.from_numpy(decode(named, len(encoded), image_size, show_progress=False)).float() / 255
    if isinstance(first, Tensor):
        _require_one_shape([tuple(value.shape) for value in listed], where, first_row)
        return _as_number(torch.stack(list(listed)))
    if hasattr(first, "convert"):
        return _pictures(listed, where, first_row, image_size)
    try:
        array = np.asarray(listed)
    except ValueError as error:  # numpy's word for lists of several lengths
        _require_one_shape([np.shape(value) for value in listed], where, first_row)
        raise DataError(f"{where} cannot be read as numbers: {error}") from error
    return _number_array(array, where)


def columns_side_by_side(columns: Sequence[Tensor], names: Sequence[str], where: str) -> Tensor:
    """Columns of numbers as one table, (B, columns); a single one as it is, but (B, 1) for plain numbers.

    Raises:
        InputError: Several columns are given of which one holds more than a number a row.
    """
    if len(columns) == 1:
        return columns[0].unsqueeze(1) if columns[0].ndim == 1 else columns[0]
    bad = next((name for name, column in zip(names, columns, strict=True) if column.ndim != 1), None)
    if bad is not None:
        raise InputError(
            f"{where}: the column {bad!r} holds lists or images, and stands beside others; name it alone as inputs=, or give "
            f"a mapping from the model's arguments to columns"
        )
    return torch.stack([column.float() for column in columns], dim=1)


def _as_number(values: Tensor) -> Tensor:
    if values.is_floating_point():
        return values.float()
    return values.float() / 255 if values.dtype == torch.uint8 and values.ndim == 4 else values.long()


def _number_array(values: Any, where: str) -> Tensor:
    if values.dtype.kind not in "fiub":
        raise DataError(
            f"{where} holds values of the type {values.dtype}; inputs must be numbers, or images as bytes. What is no "
            f"input can be named in keep=, or left out by a source's inputs="
        )
    return _as_number(torch.from_numpy(np.array(values, np.uint8 if values.dtype == np.uint8 else _wide(values))))


def _wide(values: Any) -> Any:
    return np.float32 if values.dtype.kind == "f" else np.int64


def _pictures(listed: Sequence[Any], where: str, first_row: int, size: tuple[int, int] | None) -> Tensor:
    """Pictures of Pillow, as data sets of images give them."""
    arrays = []
    for picture in listed:
        plain = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
        if size is not None and (plain.height, plain.width) != size:
            plain = plain.resize((size[1], size[0]), 2)  # bilinear
        pixels = np.array(plain)
        arrays.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    _require_one_shape([array.shape for array in arrays], where, first_row)
    return torch.from_numpy(np.stack(arrays)).float() / 255


def _require_one_shape(shapes: Sequence[tuple[int, ...]], where: str, first_row: int) -> None:
    other = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise DataError(
            f"{where} has the shape {shapes[other]} in row {first_row + other}, but {shapes[0]} before it; all rows of a batch "
            f"must have one shape"
        )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not value.get("bytes"))
