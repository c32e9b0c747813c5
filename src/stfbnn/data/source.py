"""What all readers share: the options, what a reader hands on, and how files name their part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stfbnn.errors import DataError, InputError

Array: TypeAlias = NDArray[Any]
Task: TypeAlias = Literal["classification", "regression", "unlabelled"]

TRAIN_NAMES = ("train",)
# A set without a test part is often published with a validation part instead.
TEST_NAMES = ("test", "t10k", "val", "dev")
TARGET_NAMES = ("label", "labels", "target", "targets", "class", "y")


@dataclass(frozen=True)
class Options:
    """How to read; which kinds know which option is said by ``stfbnn.data.load``.

    Attributes:
        split: Number of the train/test split, for the kind "uci".
        task: "classification" or "regression"; None decides by the targets.
        target: Name of the target's column; None decides by the names.
        image_size: (height, width) to which images are resized, or None.
        limit: Read only so many examples of each part, from its start; None reads all.
        cache_dir: Folder for decoded images, or None for none.
        show_progress: Force the progress bar on or off; None shows it on a terminal.
    """

    split: int = 0
    task: Literal["classification", "regression"] | None = None
    target: str | None = None
    image_size: tuple[int, int] | None = None
    limit: int | None = None
    cache_dir: Path | None = None
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        if self.task not in (None, "classification", "regression"):
            raise InputError(f'task must be "classification", "regression" or None, but it is {self.task!r}')
        if isinstance(self.split, bool) or not isinstance(self.split, int) or self.split < 0:
            raise InputError(f"split must be a non-negative integer, but it is {self.split!r}")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise InputError(f"limit must be a positive integer or None, but it is {self.limit!r}")
        size = self.image_size
        if size is not None and (len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size)):
            raise InputError(f"image_size must be (height, width) in pixels, but it is {size!r}")


@dataclass(frozen=True)
class Part:
    """What a reader found for one part.

    Attributes:
        inputs: N x F, N x H x W, N x C x H x W or N x H x W x C.
        targets: One entry (or row) per example, or None.
        where: What to call it in messages.
        cut: The inputs were cut by ``limit`` while they were read. The targets are complete all the same, so that
            the classes of a data set do not depend on how much of it is read.
    """

    inputs: Array
    targets: Array | None
    where: str
    cut: bool = False


def find_parts(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files of the training and of the test part, by the start of their names.

    Returns:
        Both lists, sorted. Where there is only one part, or one file, it is the first, whatever its name.

    Raises:
        DataError: Several files, and none is named after a part.
    """
    files = sorted(path for path in visible(folder) if path.suffix.lower() in suffixes and path.is_file())
    train = _named(files, TRAIN_NAMES)
    test = next((found for name in TEST_NAMES if (found := _named(files, (name,)))), [])
    if train:
        return train, test
    if test or len(files) == 1:
        return test or files, []
    raise DataError(
        f"{folder} holds {listing(files)}, and none is named after a part; name them train* and test* "
        f"({'/'.join(suffixes)}), or give the path of one file"
    )


def only_file(files: Sequence[Path], what: str) -> Path:
    """The one file of a part, for kinds that keep a part in one file.

    Raises:
        DataError: There are several.
    """
    if len(files) != 1:
        raise DataError(
            f"expected one {what} file, but found {len(files)}: {listing(files)}; give the path of the one meant"
        )
    return files[0]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, but for what the system hid there (names that start with ``.`` or ``__``), sorted."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}") from error


def listing(paths: Sequence[Path], most: int = 8) -> str:
    """Names for a message, the first few of them."""
    names = [path.name + ("/" if path.is_dir() else "") for path in paths[:most]]
    if not names:
        return "nothing"
    return ", ".join(names) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def choose_target(columns: Sequence[str], asked: str | None, where: str, last: bool = True) -> str | None:
    """The name of the target's column.

    Args:
        columns: All columns.
        asked: What the user named, or None.
        where: What to call the table in messages.
        last: Fall back on the last column where no name says "target"; else None is returned.

    Raises:
        DataError: The named column is not there, or several have a target's name.
    """
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{where} has no column {asked!r}; it has {', '.join(map(repr, columns))}")
        return asked
    found = [name for name in columns if name.strip().lower() in TARGET_NAMES]
    if len(found) > 1:
        raise DataError(f"{where} has several columns that may be the target, {found}; name one with target=")
    if found:
        return found[0]
    return columns[-1] if last else None


def as_classes_or_numbers(values: Sequence[str]) -> Array:
    """Texts as float64 numbers where all of them are numbers, else as texts."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return np.array([value.strip() for value in values])


def check_finite(values: Array, where: str, columns: Sequence[str] | None = None) -> None:
    """Refuse NaN and infinite values.

    Raises:
        DataError: It names the first row (from 1) and the column.
    """
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    bad = ~np.isfinite(values)
    first = np.unravel_index(int(np.argmax(bad)), values.shape)
    column = ""
    if values.ndim == 2:
        column = f", column {columns[int(first[1])]!r}" if columns is not None else f", column {first[1] + 1}"
    raise DataError(
        f"{where} has {int(bad.sum())} missing, NaN or infinite values, the first ({values[first]}) in row "
        f"{first[0] + 1}{column}; fill them in or drop these rows"
    )


def _named(files: Sequence[Path], names: Sequence[str]) -> list[Path]:
    return [path for path in files if path.name.lower().startswith(tuple(names))]
