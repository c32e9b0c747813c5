"""The idx format of MNIST and its successors: four files in one folder, plain or gzipped.

A file is two zero bytes, one byte for the type, one for the number of dimensions, the sizes as big-endian unsigned
32-bit integers, then the values in big-endian order (http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.source import Array, Options, Part, listing, visible
from stfbnn.errors import DataError

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CANONICAL = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_BLOCK = 1 << 24
_GZIP_MAGIC = b"\x1f\x8b"


def spellings(name: str) -> tuple[str, ...]:
    """The file names under which ``name`` is found: some unpackers write a dot before "idx"."""
    dotted = name.replace("-idx", ".idx")
    return name, f"{name}.gz", dotted, f"{dotted}.gz"


def read(folder: Path, options: Options) -> DataSet:
    """Read a folder with the canonical file names.

    Raises:
        DataError: Files are missing or damaged, or the counts of images and labels disagree.
    """
    parts = [part for name in CANONICAL if (part := _part(folder, name)) is not None]
    if not parts:
        names = [name for pair in CANONICAL.values() for name in pair]
        raise DataError(f"{folder} holds none of {', '.join(names)} (plain or .gz); found {listing(visible(folder))}")
    return assemble("idx", parts[0], parts[1] if len(parts) > 1 else None, options)


def read_file(path: Path) -> Array:
    """Read one idx file, gzipped or not (which is told by its first bytes), into an array of native byte order.

    Raises:
        DataError: It is not an idx file, shorter or longer than its header says, or its gzip check sum is wrong.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not zipped:
                return _parse(raw, path)
            with gzip.open(raw) as unzipped:
                return _parse(unzipped, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; it is damaged or cut short, get it again") from error


def _parse(stream: IO[bytes] | gzip.GzipFile, path: Path) -> Array:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in TYPES or not head[3]:
        raise DataError(
            f"{path} is no idx file: it starts with {head.hex() or 'nothing'} instead of 0000, type and rank"
        )
    rank = head[3]
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{path} is cut short: its header of {4 + 4 * rank} bytes ends after {4 + len(sizes)}")
    shape = struct.unpack(f">{rank}I", sizes)
    dtype = np.dtype(TYPES[head[2]])
    expected = math.prod(shape) * dtype.itemsize
    # Read in blocks: a damaged header may announce more than fits in memory, long before the file ends.
    data = bytearray()
    while len(data) < expected and (block := stream.read(min(_BLOCK, expected - len(data)))):
        data += block
    # One byte more: finds what is too long, and lets gzip reach its check sum.
    if len(data) < expected or stream.read(1):
        length = f"only {len(data)}" if len(data) < expected else "more"
        raise DataError(
            f"{path} is damaged: its header says {'x'.join(map(str, shape))} values, {expected} bytes, but it holds "
            f"{length}; get it again"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _part(folder: Path, name: str) -> Part | None:
    image_name, label_name = CANONICAL[name]
    images, labels = _find(folder, image_name), _find(folder, label_name)
    if images is None:
        if labels is None:
            return None
        raise DataError(
            f"{folder} holds {labels.name} without its images; looked for {', '.join(spellings(image_name))}"
        )
    pixels = read_file(images)
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images} has {pixels.ndim} dimensions, but images have 3, or 4 with channels")
    if labels is None:
        return Part(pixels, None, str(images))
    values = read_file(labels)
    if values.ndim != 1:
        raise DataError(f"{labels} has {values.ndim} dimensions, but labels have 1")
    if len(values) != len(pixels):
        raise DataError(f"{images} has {len(pixels)} images, but {labels.name} has {len(values)} labels")
    return Part(pixels, values, str(images))


def _find(folder: Path, name: str) -> Path | None:
    return next((folder / spelling for spelling in spellings(name) if (folder / spelling).is_file()), None)
