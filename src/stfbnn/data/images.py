"""Encoded images to pixels: decoded by a few threads, kept in a cache where the user names a folder for one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stfbnn.data.source import Array
from stfbnn.errors import DataError
from stfbnn.files import atomic_path
from stfbnn.progress import progress_bar

if TYPE_CHECKING:
    from PIL import Image

Encoded: TypeAlias = tuple[str, bytes | Path]

# Decoding is compiled code that lets other threads run, so threads do and nothing has to be pickled.
_WORKERS = min(8, os.cpu_count() or 1)
_TASK = 64
_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "F")
_CACHE_VERSION = 1


def decode(sources: Iterable[Encoded], total: int, size: tuple[int, int] | None, show_progress: bool | None) -> Array:
    """Decode images to one array.

    Grey images have one channel, all others three (red, green, blue; transparency is dropped). Where a set has both,
    all get three. Resizing is bilinear with antialiasing and does not keep the ratio of the sides.

    Args:
        sources: For each image what to call it in messages, and its encoded bytes or its file.
        total: How many there are.
        size: (height, width) to resize to, or None where all have the same size.
        show_progress: See ``stfbnn.progress.progress_bar``.

    Returns:
        uint8, total x channels x height x width.

    Raises:
        DataError: Pillow is missing, an image is damaged or has more than 8 bits a channel, or sizes differ.
    """
    import_pillow()
    pixels: Array | None = None
    done = 0
    waiting = iter(sources)
    with ThreadPoolExecutor(_WORKERS) as pool, progress_bar("decoding images", total, show_progress) as bar:
        while tasks := [task for _ in range(2 * _WORKERS) if (task := list(islice(waiting, _TASK)))]:
            for decoded in pool.map(lambda task: [_decode(name, source, size) for name, source in task], tasks):
                for name, image in decoded:
                    if pixels is None:
                        pixels = np.empty((total, *image.shape), np.uint8)
                    if image.shape[1:] != pixels.shape[2:]:
                        raise _sizes_differ(name, image.shape[1:], pixels.shape[2:])
                    if image.shape[0] > pixels.shape[1]:
                        pixels = np.repeat(pixels, image.shape[0], axis=1)
                    pixels[done] = image
                    done += 1
                bar.advance(len(decoded))
    if pixels is None or done != total:
        raise DataError(f"expected {total} images, but found {done}")
    return pixels


def check_sizes(sources: Iterable[tuple[str, Path]]) -> None:
    """Compare the sizes in the images' headers, which is quick, before any of them is decoded.

    Raises:
        DataError: They differ, or a file is no image.
    """
    import_pillow()
    first: tuple[int, int] | None = None
    for name, path in sources:
        with _opened(name, path) as image:
            shape = (image.height, image.width)
        if first is None:
            first = shape
        if shape != first:
            raise _sizes_differ(name, shape, first)


def cached(cache_dir: Path | None, key: Mapping[str, Any], compute: Callable[[], Array]) -> Array:
    """Give the array for ``key`` from the cache, or compute it and keep it there.

    Args:
        cache_dir: Where arrays are kept; None computes anew and keeps nothing.
        key: All that the array depends on, such as the files' names, sizes and times of change.
        compute: Gives the array.
    """
    if cache_dir is None:
        return compute()
    text = json.dumps({"version": _CACHE_VERSION, **key}, sort_keys=True, default=str)
    path = cache_dir / f"images-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    try:
        # Opened here, because numpy leaves a damaged file open that it opened itself.
        with path.open("rb") as kept, np.load(kept, allow_pickle=False) as archive:
            return np.asarray(archive["images"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        # Not there yet, or damaged: a cache may always be made anew.
        images = compute()
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, images=images)
    return images


def stamp(path: Path) -> tuple[str, int, int]:
    """What says that a file is still the same: its full name, its size and its time of change in nanoseconds."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def import_pillow() -> None:
    """Check that Pillow is there.

    Raises:
        DataError: It is not; the message says how to install it.
    """
    try:
        import PIL.Image  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'stfbnn[data]'") from error


def _opened(name: str, source: bytes | Path) -> Image.Image:
    from PIL import Image  # noqa: PLC0415 - optional

    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from error


def _decode(name: str, source: bytes | Path, size: tuple[int, int] | None) -> tuple[str, Array]:
    from PIL import Image  # noqa: PLC0415 - optional

    with _opened(name, source) as image:
        if image.mode.startswith(_DEEP_MODES):
            raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
        try:
            plain: Image.Image = image.convert("RGBA") if image.mode == "P" else image
            plain = plain.convert("L" if image.mode in _GREY_MODES else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{name} is damaged: {error}") from error
    if size is not None and (plain.height, plain.width) != size:
        plain = plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(plain)
    return name, pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _sizes_differ(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> DataError:
    return DataError(
        f"{name} is {shape[0]}x{shape[1]} pixels (height x width), but the images before it are "
        f"{expected[0]}x{expected[1]}; pass image_size=(height, width) to resize all of them"
    )
