"""Tensors in a safetensors file, used where they lie: the system reads their pages when they are touched and may drop them.

The mapping is shared and read-only, so several processes have one copy of a page between them, and none of it counts as
memory of theirs.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stfbnn.errors import ArtifactError, ModelChangedError
from stfbnn.files import atomic_path
from stfbnn.trunk.fingerprint import raw_bytes

# Where PyTorch's own allocator puts tensors: kernels may round otherwise on operands that lie elsewhere.
_ALIGNMENT = 64
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PADDING = "__padding__:"


def is_storable(tensor: Tensor) -> bool:
    """Whether a file can hold a tensor: a dense one of one of the common dtypes."""
    return tensor.layout is torch.strided and tensor.dtype in _NAMES and not tensor.is_quantized


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, one after another and each at a multiple of 64 bytes; the file appears whole or not at all.

    One tensor at a time is brought to the CPU, and none that is there in row-major order is copied.

    Args:
        path: The file; its folder is created.
        tensors: By name; each is one of which `is_storable` is true.

    Raises:
        OSError: The file cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        if gap := -end % _ALIGNMENT:
            # The format allows no bytes that belong to no tensor.
            header[f"{_PADDING}{name}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(raw_bytes(tensor).cpu().numpy().data)
            file.write(bytes(-file.tell() % _ALIGNMENT))


class TensorFile:
    """A safetensors file whose tensors are mapped; nobody may write to them, for the process would end.

    A deep copy is the same file; what is unpickled from one has no file and no tensors.

    Args:
        path: The file.

    Attributes:
        path: Where it was when it was opened.
        tensors: By name.

    Raises:
        ArtifactError: The file is not there, is truncated or damaged, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self._descriptor: int | None = None
        try:
            self._open()
            self._stamp = self._present()
            # Checks that the header is right and covers the file exactly; reads none of the tensors.
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} cannot be used: it is missing, truncated, damaged, or no safetensors file ({error}); remove it and "
                f"write it again"
            ) from error
        self._map()

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def _present(self) -> tuple[int, int]:
        assert self._descriptor is not None  # noqa: S101 - only of an open file, said for the type checker
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _map(self) -> None:
        assert self._descriptor is not None  # noqa: S101 - only of an open file, said for the type checker
        if sys.byteorder != "little":
            raise ArtifactError(
                f"{self.path} holds little-endian numbers, which this machine cannot use where they lie"
            )
        # The tensors keep it; it goes when they go.
        view = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(view[:8], "little")
        header = json.loads(view[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if not name.startswith(_PADDING):
                self.tensors[name] = self._tensor(view, 8 + length, name, entry)

    def _tensor(self, view: mmap.mmap, origin: int, name: str, entry: Mapping[str, Any]) -> Tensor:
        if entry["dtype"] not in _DTYPES:
            raise ArtifactError(f"{self.path}: tensor {name!r} is of the type {entry['dtype']}, which is not supported")
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        offset = origin + entry["data_offsets"][0]
        if offset % dtype.itemsize:
            # Files of other writers may be packed so tightly that numbers lie across their natural places.
            return torch.frombuffer(bytearray(view[offset : origin + entry["data_offsets"][1]]), dtype=dtype).view(
                shape
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.frombuffer(view, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def check(self) -> None:
        """Refuse to go on where the file was written or cut since it was opened; one that was replaced whole is still there.

        Raises:
            ModelChangedError: It was.
        """
        if self._descriptor is not None and self._present() != self._stamp:
            raise ModelChangedError(
                f"{self.path}, which holds the frozen trunk, was written or truncated while it was in use; remove it and "
                f"offload the trunk again from the trained model"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorFile:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_file, (self.path,)


def _no_file(path: Path) -> TensorFile:
    file = TensorFile.__new__(TensorFile)
    file.path, file.tensors, file._descriptor = path, {}, None
    return file
