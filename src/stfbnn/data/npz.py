"""numpy archives: one file with named arrays, or the layout of KMNIST with one array a file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.source import Array, Options, Part, find_parts, listing, only_file, visible
from stfbnn.errors import DataError

INPUT_NAMES = ("x", "inputs", "images", "data")
TARGET_NAMES = ("y", "targets", "target", "labels", "label")
_IMAGES, _LABELS = "-imgs", "-labels"


def read(path: Path, options: Options) -> DataSet:
    """Read a ``.npz`` file, or a folder with one, or a folder with ``*-imgs.npz`` and ``*-labels.npz``.

    In one file the arrays are called x_train, y_train, x_test, y_test, or train_images, …, or x and y: one of x,
    inputs, images, data and one of y, targets, labels, with "train" or "test" before or after, in any case.

    Raises:
        DataError: The archive is damaged, holds Python objects, or has no arrays of these names.
    """
    if path.is_dir():
        if any(file.name.endswith(f"{_IMAGES}.npz") for file in visible(path)):
            return _read_pairs(path, options)
        path = only_file(find_parts(path, (".npz",))[0], ".npz")
    arrays = read_arrays(path)
    train = _pick(arrays, "train", path)
    test = _pick(arrays, "test", path)
    whole = _pick(arrays, "", path)
    parts = [part for part in (train, test) if part is not None] or [part for part in (whole,) if part is not None]
    if not parts:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise DataError(
            f"{path} has no inputs: looked for x_train and x_test or x (or {', '.join(INPUT_NAMES[1:])} for x) and "
            f"{', '.join(TARGET_NAMES)} for the targets; it holds {found}"
        )
    return assemble("npz", parts[0], parts[1] if len(parts) > 1 else None, options)


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an archive, by name; code in it (pickled objects) is refused, never run.

    Raises:
        DataError: It is no archive, is damaged, or holds Python objects.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                raise DataError(f"{path} is no .npz archive; write one with numpy.savez")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read: {error}; it is damaged, or holds Python objects, which are never loaded"
        ) from error


def _pick(arrays: dict[str, Array], part: str, path: Path) -> Part | None:
    where = f"{path} ({part})" if part else str(path)
    inputs = _named(arrays, INPUT_NAMES, part, where)
    targets = _named(arrays, TARGET_NAMES, part, where)
    if inputs is None:
        if targets is not None:
            raise DataError(f"{where} has targets but no inputs; it holds {', '.join(arrays)}")
        return None
    return Part(inputs, targets, where)


def _named(arrays: dict[str, Array], names: tuple[str, ...], part: str, where: str) -> Array | None:
    wanted = {spelling for name in names for spelling in (f"{name}_{part}", f"{part}_{name}")} if part else set(names)
    found = [name for name in arrays if name.lower() in wanted]
    if len(found) > 1:
        raise DataError(f"{where} has several arrays for one thing, {', '.join(found)}; keep one of them")
    return np.atleast_1d(arrays[found[0]]) if found else None


def _read_pairs(folder: Path, options: Options) -> DataSet:
    images = [file for file in visible(folder) if file.name.endswith(f"{_IMAGES}.npz")]
    train = [file for file in images if "train" in file.name.lower()]
    test = [file for file in images if "test" in file.name.lower()]
    if not train and not test:
        train = images
    first = _pair(only_file(train or test, f"*{_IMAGES}.npz"))
    second = _pair(only_file(test, f"*{_IMAGES}.npz")) if train and test else None
    return assemble("npz", first, second, options)


def _pair(images: Path) -> Part:
    labels = images.with_name(images.name.removesuffix(f"{_IMAGES}.npz") + f"{_LABELS}.npz")
    if not labels.is_file():
        raise DataError(f"{images} has no labels: looked for {labels.name}, found {listing(visible(images.parent))}")
    return Part(_single(images), _single(labels), str(images))


def _single(path: Path) -> Array:
    arrays = read_arrays(path)
    if "arr_0" not in arrays and len(arrays) != 1:
        raise DataError(f"{path} must hold one array (arr_0), but it holds {', '.join(arrays) or 'nothing'}")
    return arrays["arr_0"] if "arr_0" in arrays else next(iter(arrays.values()))
