"""The way in: find what the user names, recognise its kind, read it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stfbnn.data import csv_table, digits, idx, image_folder, npz, parquet, uci
from stfbnn.data.assembly import DataSet
from stfbnn.data.source import Options, listing, visible
from stfbnn.errors import DataError, InputError

ROOT_VARIABLE = "STFBNN_DATA"
DIGITS = "digits"


@dataclass(frozen=True)
class _Kind:
    read: Callable[[Path, Options], DataSet]
    options: frozenset[str]
    looks_like: str


_KINDS = {
    "idx": _Kind(idx.read, frozenset({"task"}), "a folder with train-images-idx3-ubyte[.gz] and its three companions"),
    "npz": _Kind(
        npz.read, frozenset({"task"}), "a .npz file with x_train, y_train, x_test, y_test or x, y, or *-imgs.npz"
    ),
    "parquet": _Kind(
        parquet.read,
        frozenset({"task", "target", "image_size", "cache_dir"}),
        "a .parquet file or a folder with train*.parquet and test*.parquet",
    ),
    "csv": _Kind(
        csv_table.read,
        frozenset({"task", "target"}),
        "a .csv or .tsv file with a header or a folder with train.csv and test.csv",
    ),
    "image-folder": _Kind(
        image_folder.read,
        frozenset({"image_size", "cache_dir"}),
        "folders train/<class>/ and test/<class>/, or <class>/",
    ),
    "uci": _Kind(uci.read, frozenset({"task", "split"}), "a folder with data.txt and index_train_0.txt"),
}


def data_root() -> Path | None:
    """The folder with data sets that the environment variable STFBNN_DATA names, or None where it is unset.

    Raises:
        DataError: It names something that is no folder.
    """
    name = os.environ.get(ROOT_VARIABLE)
    if not name:
        return None
    root = Path(name)
    if not root.is_dir():
        raise DataError(f"{ROOT_VARIABLE} names {root}, which is no folder; correct or unset it")
    return root


def recognise(path: str | os.PathLike[str]) -> str:
    """Say of which kind a file or folder is, by the names in it; nothing of it is read.

    Args:
        path: A file or folder, also relative to the folder that STFBNN_DATA names.

    Returns:
        "idx", "npz", "parquet", "csv", "image-folder" or "uci".

    Raises:
        DataError: There is no such path, it is of none of the kinds, or of several at once.
    """
    return _recognise(_locate(path))


def load(
    source: str | os.PathLike[str],
    kind: str | None = None,
    *,
    split: int = 0,
    task: Literal["classification", "regression"] | None = None,
    target: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    show_progress: bool | None = None,
) -> DataSet:
    """Load a data set from a file or folder.

    A source with one part only (one CSV file, test images alone) gives it as ``train``, and ``test`` is None.

    Args:
        source: A file or folder, also relative to the folder that STFBNN_DATA names; or "digits" for the digits of
            scikit-learn (a folder of that name is reached as "./digits").
        kind: See ``recognise``; None recognises it.
        split: Kind "uci": number of the train/test split.
        task: What the targets are, where ``DataSet.task`` would not be what is meant: a table's whole-number target is
            taken for classes where it has at most 20 distinct values, each twice on average, and the target of the
            kind "uci" always for a quantity. Not for image folders and digits, which are classes.
        target: Kinds "csv" and "parquet": the target's column.
        image_size: Kinds "parquet" and "image-folder": resize images to (height, width), or a square of this side.
        limit: Only so many examples of each part: the first ones, or evenly spread ones for image folders. The classes
            are those of the whole set all the same.
        cache_dir: Kinds "parquet" and "image-folder": keep decoded images in this folder and take them from there the
            next time. None keeps nothing.
        show_progress: Force the progress bar of decoding on or off; None shows it on a terminal.

    Raises:
        DataError: Nothing is found, it is of no known kind, or damaged, empty or contradictory.
        InputError: An option is out of range, or the kind does not know it.
    """
    options = Options(
        split=split,
        task=task,
        target=target,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        limit=limit,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        show_progress=show_progress,
    )
    if kind not in (None, DIGITS, *_KINDS):
        raise InputError(f"kind must be one of {', '.join(map(repr, (*_KINDS, DIGITS)))} or None, but it is {kind!r}")
    given = {"split": split or None, "task": task, "target": target, "image_size": image_size, "cache_dir": cache_dir}
    if kind == DIGITS or (kind is None and os.fspath(source) == DIGITS):
        _refuse_unknown(DIGITS, given, frozenset())
        return digits.read(options)
    path = _locate(source)
    found = kind or _recognise(path)
    _refuse_unknown(found, given, _KINDS[found].options)
    if path.is_file() and found in ("idx", "uci", "image-folder"):
        raise DataError(f"{path} is a file, but the kind {found!r} is {_KINDS[found].looks_like}; give the folder")
    return _KINDS[found].read(path, options)


def _locate(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    looked = [path]
    root = data_root()
    if root is not None and not path.is_absolute():
        looked.append(root / path)
    for candidate in looked:
        if candidate.exists():
            return candidate
    hint = "" if root is not None else f"; the folder of your data sets may be named by {ROOT_VARIABLE}"
    raise DataError(f"there is no file or folder {' or '.join(str(candidate) for candidate in looked)}{hint}")


def _recognise(path: Path) -> str:
    kinds = _kinds_of_folder(path) if path.is_dir() else _kinds_of_file(path)
    if len(kinds) == 1:
        return kinds[0]
    holds = f"holds {listing(visible(path))}" if path.is_dir() else f"has the suffix {path.suffix!r}"
    if kinds:
        raise DataError(f"{path} {holds} and may be any of {', '.join(kinds)}; say which with kind=")
    supported = "; ".join(f"{name}: {kind.looks_like}" for name, kind in _KINDS.items())
    raise DataError(f"{path} is not recognised: it {holds}. Supported are {supported}")


def _kinds_of_file(path: Path) -> list[str]:
    by_suffix = {".npz": "npz", parquet.SUFFIX: "parquet", **dict.fromkeys(csv_table.SUFFIXES, "csv")}
    kind = by_suffix.get(path.suffix.lower())
    return [] if kind is None else [kind]


def _kinds_of_folder(path: Path) -> list[str]:
    entries = visible(path)
    names = {entry.name for entry in entries}
    suffixes = {entry.suffix.lower() for entry in entries if entry.is_file()}
    canonical = {spelling for pair in idx.CANONICAL.values() for name in pair for spelling in idx.spellings(name)}
    signs = {
        "uci": uci.DATA_FILE in names and bool(uci.split_numbers(path)),
        "idx": bool(names & canonical),
        "parquet": parquet.SUFFIX in suffixes,
        "npz": ".npz" in suffixes,
        "csv": bool(suffixes & set(csv_table.SUFFIXES)),
        "image-folder": image_folder.has_images(path),
    }
    return [kind for kind, there in signs.items() if there]


def _refuse_unknown(kind: str, given: Mapping[str, object], known: frozenset[str]) -> None:
    unknown = [name for name, value in given.items() if value is not None and name not in known]
    if unknown:
        raise InputError(
            f"the kind {kind!r} has no option {', '.join(unknown)}; it knows {', '.join(sorted(known | {'limit'}))}"
        )
