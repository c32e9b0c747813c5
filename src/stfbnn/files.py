"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stfbnn.errors import StorageError


@contextmanager
def storing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says when something cannot be written into an error that names it and what to do.

    Args:
        path: What the block is to bring about, whatever the names of the temporary files on the way to it.

    Raises:
        StorageError: The block raised an `OSError`. Of blocks within each other the outermost is what the user asked for.
    """
    try:
        yield
    except OSError as raised:
        error = raised.__cause__ if isinstance(raised, StorageError) else raised
        assert isinstance(error, OSError)  # noqa: S101 - said for the type checker; from the line below
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path} cannot be written: {reason}; {_remedy(error)}. What was there before is as it was"
        ) from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it replaces ``path``, on any error it is removed.

    A reader sees the old file or the new one, never a half-written one, whatever kills the process.

    Args:
        path: The file that is to appear. Its folder is created.

    Yields:
        The path to write to, in the same folder (so that the final rename stays on one file system).

    Raises:
        StorageError: It cannot be written, such as on a full disk or in a folder without permission.
    """
    with storing(path), _replacing(Path(path)) as temporary:
        yield temporary


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable; where folders cannot be opened (Windows) the system sees to it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused, for they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON has it: tensors and arrays become lists, paths text, and what JSON has not (NaN, infinities) None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    # Without an import of torch, which takes seconds that a command's --help should not.
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space there, or raise the limit, and run again; or give another place"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable, or give another place"
    return "see to that and run again, or give another place"


def _umask() -> int:
    # The only way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
