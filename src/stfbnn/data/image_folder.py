"""Folders of image files, one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.images import cached, check_sizes, decode, import_pillow, stamp
from stfbnn.data.source import Options, Part, listing, visible
from stfbnn.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True)
class _Found:
    folder: Path
    files: list[Path]
    labels: list[str] | None


def has_images(folder: Path, depth: int = 2) -> bool:
    """Whether a folder, or one at most ``depth`` levels below it, has an image file."""
    entries = visible(folder)
    if any(path.suffix.lower() in SUFFIXES and path.is_file() for path in entries):
        return True
    return depth > 0 and any(has_images(path, depth - 1) for path in entries if path.is_dir())


def read(folder: Path, options: Options) -> DataSet:
    """Read ``folder/train/<class>/*.png`` and ``folder/test/…`` (or val), or ``folder/<class>/*.png`` as training.

    Classes are the folders' names in the order of their characters (so "10" comes before "2"), the same order that
    torchvision uses. A folder with images and no folders is a set without labels. ``limit`` takes images evenly
    spread over the classes.

    Raises:
        DataError: Pillow is missing, there are no images, images lie beside class folders, a class has no training
            image, an image is damaged, or sizes differ and ``image_size`` is not given.
    """
    import_pillow()
    parts = {path.name.lower(): path for path in visible(folder) if path.is_dir()}
    train_folder = next((parts[name] for name in TRAIN_FOLDERS if name in parts), None)
    test_folder = next((parts[name] for name in TEST_FOLDERS if name in parts), None) if train_folder else None
    train = _find(train_folder or folder, needs_all=True)
    test = None if test_folder is None else _find(test_folder, needs_all=False)
    classes = None if train.labels is None else sorted(set(train.labels))
    if test is not None and test.labels is not None:
        unknown = sorted(set(test.labels) - set(classes or ()))
        if unknown:
            raise DataError(
                f"{test.folder} has folders for the classes {unknown}, which {train.folder} has not; it has "
                f"{listing(visible(train.folder))}"
            )
    found = [_limited(part, options.limit) for part in (train, test) if part is not None]
    if options.image_size is None:
        check_sizes((str(path), path) for part in found for path in part.files)
    read_parts = [_decoded(part, classes, options) for part in found]
    return assemble(
        "image-folder", read_parts[0], read_parts[1] if len(read_parts) > 1 else None, options, names=classes
    )


def _find(folder: Path, needs_all: bool) -> _Found:
    entries = visible(folder)
    loose = _images(entries)
    classes = [path for path in entries if path.is_dir()]
    if loose and classes:
        raise DataError(
            f"{folder} has the image {loose[0].name} beside the folders {listing(classes)}; images belong either all "
            f"in class folders or all in one folder without labels"
        )
    if loose:
        return _Found(folder, loose, None)
    files: list[Path] = []
    labels: list[str] = []
    for path in classes:
        images = _images(sorted(path.rglob("*")))
        if needs_all and not images:
            raise DataError(f"{path} has no images ({', '.join(SUFFIXES)}); fill the class or remove its folder")
        files += images
        labels += [path.name] * len(images)
    if not files:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}); it holds {listing(entries)}")
    return _Found(folder, files, labels)


def _images(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()]


def _limited(part: _Found, limit: int | None) -> _Found:
    total = len(part.files)
    if limit is None or limit >= total:
        return part
    # Files lie class by class: the first ones would all be of one class.
    picks = [index * total // limit for index in range(limit)]
    labels = None if part.labels is None else [part.labels[index] for index in picks]
    return _Found(part.folder, [part.files[index] for index in picks], labels)


def _decoded(part: _Found, classes: Sequence[str] | None, options: Options) -> Part:
    size = options.image_size
    key = {"files": [stamp(path) for path in part.files], "size": size}
    pixels = cached(
        options.cache_dir,
        key,
        lambda: decode(((str(path), path) for path in part.files), len(part.files), size, options.show_progress),
    )
    labels = None
    if part.labels is not None and classes is not None:
        places = {name: index for index, name in enumerate(classes)}
        labels = np.array([places[name] for name in part.labels])
    return Part(pixels, labels, str(part.folder))
