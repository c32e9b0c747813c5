"""WebDataset tar files as a source: one shard a file, one example for each group of members with a common key.

Members called ``00017.png``, ``00017.cls`` and ``00017.json`` are one example with the key ``00017``: the key ends at the first
dot of the member's name. Only formats that execute nothing are decoded; pickles (``.pyd``, ``.pickle``, ``.pth``) are refused.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from stfbnn.bulk.source import Rows, Source, Transform, describe, file_identity, find_files, transformed
from stfbnn.bulk.values import IMAGE_SUFFIXES, as_tensor
from stfbnn.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
KEY = "__key__"

_END = bytes(2 * tarfile.BLOCKSIZE)
_Sample = dict[str, bytes]


class TarSource(Source):
    """WebDataset tar files (``.tar``, ``.tar.gz``, ``.tgz``), in the order of their names; each is a shard.

    What can be kept is ``__key__`` and the extensions: ``cls`` gives integers, ``txt`` texts, ``json`` the JSON text, ``npy``
    numbers or lists.

    Args:
        path: A folder, a file, or several files in the order that they are given.
        inputs: The extension of the inputs, ``"npy"`` or an image's; None takes the only one of these in the first example.
        image_size: (height, width) to which images are resized.
        transform: Called on every batch of inputs, which are float32; images are in 0 … 1.

    Raises:
        DataError: There is no file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        inputs: str | None = None,
        image_size: tuple[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        self._files = {file.name: file for file in find_files(path, SUFFIXES)}
        self._inputs, self._image_size, self._transform = inputs, image_size, transform

    def shards(self) -> Sequence[str]:
        """The files' names."""
        return list(self._files)

    def identity(self, name: str) -> str:
        """The file's size and a hash of its ends."""
        return file_identity(self._files[name])

    def settings(self) -> Mapping[str, Any]:
        """The extension of the inputs and what is done to them."""
        return {
            "kind": "webdataset",
            "inputs": self._inputs,
            "image_size": None if self._image_size is None else list(self._image_size),
            "transform": describe(self._transform),
        }

    def open(self, name: str, keep: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Read a file from its start; see `Source.open`."""
        path, row = self._files[name], 0
        batch: list[tuple[str, _Sample]] = []
        for sample in _samples(path):
            batch.append(sample)
            if len(batch) == batch_size:
                yield self._rows(path, batch, keep, row)
                row += len(batch)
                batch = []
        if batch:
            yield self._rows(path, batch, keep, row)

    def _rows(self, path: Path, batch: Sequence[tuple[str, _Sample]], keep: Sequence[str], row: int) -> Rows:
        extension = self._inputs or _input_extension(path, *batch[0], keep)
        values = [_member(path, key, sample, extension) for key, sample in batch]
        if extension.rsplit(".", 1)[-1] not in IMAGE_SUFFIXES:
            values = [_decoded(path, key, extension, value) for (key, _), value in zip(batch, values, strict=True)]
        inputs = as_tensor(values, f"{path}, members .{extension}", row, self._image_size).float()
        columns = {
            name: [
                key if name == KEY else _kept(path, key, name, _member(path, key, sample, name))
                for key, sample in batch
            ]
            for name in keep
        }
        return Rows(transformed(inputs, self._transform), columns)


class _Tail(io.RawIOBase):
    """A stream that remembers the last bytes that were read of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.last = (self.last + data)[-len(_END) :]
        return data


def _samples(path: Path) -> Iterator[tuple[str, _Sample]]:
    """The examples of a file, as keys and undecoded members.

    Raises:
        DataError: The file is damaged or cut short.
    """
    key: str | None = None
    sample: _Sample = {}
    try:
        with _opened(path) as stream:
            tail = _Tail(stream)
            with tarfile.open(fileobj=tail, mode="r|") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    found, extension = _split(path, member.name)
                    if key is not None and found != key:
                        yield key, sample
                        sample = {}
                    key = found
                    if extension in sample:
                        raise DataError(f"{path} has two members {member.name!r} in one example")
                    extracted = archive.extractfile(member)
                    sample[extension] = extracted.read() if extracted is not None else b""
            # To the end, so that gzip's checksum is looked at.
            while tail.read(2**16):
                pass
            # tarfile takes a file that ends between two members, or within a header, for a whole one.
            if tail.last != _END:
                raise DataError(f"{path} has no end-of-archive mark; it is cut short, or was not closed when written")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a tar file: {error}; it is damaged or cut short") from error
    if key is not None:
        yield key, sample


def _opened(path: Path) -> IO[bytes]:
    # gzip's own reader and not tarfile's, which takes a stream that is cut short for a whole one.
    return cast(IO[bytes], gzip.open(path)) if path.name.endswith("gz") else path.open("rb")


def _split(path: Path, member: str) -> tuple[str, str]:
    folder, slash, name = member.rpartition("/")
    stem, dot, extension = name.partition(".")
    if not dot or not stem:
        raise DataError(
            f"{path} has the member {member!r}, whose name is not KEY.EXTENSION; examples are told apart by keys"
        )
    return f"{folder}{slash}{stem}", extension.lower()


def _input_extension(path: Path, key: str, sample: _Sample, keep: Sequence[str]) -> str:
    known = ("npy", *IMAGE_SUFFIXES)
    found = [extension for extension in sample if extension.rsplit(".", 1)[-1] in known and extension not in keep]
    if len(found) != 1:
        raise DataError(
            f"{path}: the example {key!r} has the members {sorted(sample)}, of which {found or 'none'} can be inputs; name the "
            f"extension of the inputs, TarSource(…, inputs=): an array (npy) or an image"
        )
    return found[0]


def _member(path: Path, key: str, sample: _Sample, extension: str) -> bytes:
    if extension not in sample:
        raise DataError(f"{path}: the example {key!r} has no member .{extension}; it has {sorted(sample)}")
    return sample[extension]


def _decoded(path: Path, key: str, extension: str, data: bytes) -> Any:
    kind = extension.rsplit(".", 1)[-1]
    try:
        if kind == "npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
        if kind == "cls":
            return int(data)
        if kind == "txt":
            return data.decode("utf-8")
        if kind == "json":
            return json.loads(data)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: the member .{extension} of the example {key!r} is damaged: {error}") from error
    raise DataError(
        f"{path}: members .{extension} are not read (the example {key!r}); npy, cls, txt, json and images are, and "
        f"pickles never, for they can execute code"
    )


def _kept(path: Path, key: str, extension: str, data: bytes) -> Any:
    value = _decoded(path, key, extension, data)
    if isinstance(value, np.ndarray):
        return value.tolist()
    # JSON of several forms has no one Arrow type.
    return json.dumps(value) if extension.rsplit(".", 1)[-1] == "json" else value
