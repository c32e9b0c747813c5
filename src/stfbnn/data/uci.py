"""The fixed train/test splits of small regression tables on which Bayesian deep learning is compared.

A folder holds ``data.txt`` (numbers between blanks), ``index_features.txt`` and ``index_target.txt`` (columns, from 0)
and, for each split i, ``index_train_i.txt`` and ``index_test_i.txt`` (rows, from 0).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.source import Array, Options, Part, check_finite, visible
from stfbnn.errors import DataError

DATA_FILE = "data.txt"
_TRAIN_FILE = re.compile(r"index_train_(\d+)\.txt")


def read(folder: Path, options: Options) -> DataSet:
    """Read split number ``options.split``; the task is regression unless the options say otherwise.

    Raises:
        DataError: A file is missing or damaged, there is no such split, an index is out of range or occurs twice, or
            a row is in both parts.
    """
    numbers = split_numbers(folder)
    if options.split not in numbers:
        raise DataError(f"{folder} has no split {options.split}; it has {', '.join(map(str, numbers)) or 'none'}")
    table = _numbers(folder / DATA_FILE)
    check_finite(table, str(folder / DATA_FILE))
    features = _indices(folder / "index_features.txt", table.shape[1], "columns")
    target = _indices(folder / "index_target.txt", table.shape[1], "columns")
    if set(features) & set(target):
        raise DataError(f"{folder} names column {int(np.intersect1d(features, target)[0])} as a feature and as target")
    train_file, test_file = (folder / f"index_{part}_{options.split}.txt" for part in ("train", "test"))
    train, test = _indices(train_file, len(table), "rows"), _indices(test_file, len(table), "rows")
    shared = np.intersect1d(train, test)
    if len(shared):
        raise DataError(f"{len(shared)} rows are in both {train_file} and {test_file.name}, the first is {shared[0]}")
    parts = [
        Part(table[np.ix_(rows, features)], table[np.ix_(rows, target)], f"{folder / DATA_FILE} ({file.stem})")
        for rows, file in ((train, train_file), (test, test_file))
    ]
    task: Literal["classification", "regression"] = options.task or "regression"
    columns = [f"column {index}" for index in features]
    return assemble("uci", parts[0], parts[1], Options(task=task, limit=options.limit), columns=columns)


def split_numbers(folder: Path) -> list[int]:
    """The numbers of the splits that a folder has, ascending."""
    matches = (_TRAIN_FILE.fullmatch(path.name) for path in visible(folder))
    return sorted(int(match[1]) for match in matches if match)


def _numbers(path: Path) -> Array:
    if not path.is_file():
        raise DataError(f"{path} is missing; a folder of splits has data.txt, index_features.txt, index_target.txt and "
                        f"index_train_i.txt, index_test_i.txt for each split i")  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an empty file, which is refused below
            table = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no table of numbers between blanks: {error}") from error
    if not table.size:
        raise DataError(f"{path} is empty")
    return table


def _indices(path: Path, size: int, what: str) -> Array:
    values = _numbers(path).flatten()
    # Compared before the conversion, which would turn NaN into some integer.
    if not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise DataError(f"{path} must hold whole numbers, the {what} from 0")
    if values.min() < 0 or values.max() >= size:
        raise DataError(f"{path} names the {what} {values.min():g} to {values.max():g}, but there are {size}, from 0")
    indices = values.astype(np.int64)
    if len(np.unique(indices)) != len(indices):
        raise DataError(f"{path} names some {what} twice")
    return indices
