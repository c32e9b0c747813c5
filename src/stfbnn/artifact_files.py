"""The folder of a saved posterior as files: written whole or not at all, and read only if no byte has changed.

This module knows nothing of networks; what the entries of ``config.json`` mean is said in ``artifact``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from stfbnn.errors import ArtifactError, InputError
from stfbnn.files import atomic_path, storing, sync_folder, write_text

CONFIG, TENSORS, CARD = "config.json", "posterior.safetensors", "README.md"
FORMAT = "stfbnn-posterior"
# Major.minor: a higher minor version adds entries that a reader may ignore, another major version may not be read.
_MAJOR, _MINOR = 1, 0
FORMAT_VERSION = f"{_MAJOR}.{_MINOR}"

_NO_DIGEST = "0" * 64


class Config:
    """The entries of a ``config.json``, each checked for its type when it is read.

    Args:
        entries: The parsed JSON object.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    def get(self, path: str, *kinds: type) -> Any:
        """The entry at a dotted path, such as ``"layer.name"``.

        Args:
            path: Names joined by dots.
            kinds: The types that it may have; ``type(None)`` for null.

        Raises:
            ArtifactError: It is missing or has another type.
        """
        value: Any = self._entries
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise ArtifactError(f"{CONFIG} has no entry {path!r}; the file is not a whole {FORMAT} description")
            value = value[name]
        # JSON's true is an int to Python.
        if type(value) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ArtifactError(f"{CONFIG}: {path!r} is {value!r}, but it must be of type {wanted}")
        return value

    def text(self, path: str) -> str:
        """A string."""
        value: str = self.get(path, str)
        return value

    def texts(self, path: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.get(path, list)
        if not all(type(value) is str for value in values):
            raise ArtifactError(f"{CONFIG}: {path!r} must be a list of strings, but it is {values!r}")
        return tuple(values)

    def mapping(self, path: str) -> dict[str, Any]:
        """A JSON object."""
        value: dict[str, Any] = self.get(path, dict)
        return value

    def positive(self, path: str) -> float:
        """A positive finite number."""
        value = self.get(path, int, float)
        if not 0 < value < math.inf:
            raise ArtifactError(f"{CONFIG}: {path!r} must be positive and finite, but it is {value!r}")
        return float(value)

    def positives(self, path: str) -> list[float]:
        """A list of positive finite numbers."""
        values = self.get(path, list)
        if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
            raise ArtifactError(
                f"{CONFIG}: {path!r} must be a list of positive and finite numbers, but it is {values!r}"
            )
        return [float(value) for value in values]


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor, JSON-able."""
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not finite.

    Raises:
        ArtifactError: Names the first one.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArtifactError(f"the posterior's tensor {name!r} holds {bad} NaN or infinite values")


def write_folder(
    directory: str | os.PathLike[str],
    entries: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    overwrite: bool = False,
) -> None:
    """Write the three files to a new folder beside ``directory``, then put it in that place.

    Args:
        directory: The folder that is to appear.
        entries: Entries of ``config.json``; those that describe the files themselves are added.
        tensors: What goes into ``posterior.safetensors``.
        card: The text of ``README.md``.
        overwrite: Replace an artifact that is there.

    Raises:
        InputError: See `check_target`.
        StorageError: The disk is full, or the place cannot be written to.
    """
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    file = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": tensor_specs(tensors)}
    config = signed({"format": FORMAT, "format_version": FORMAT_VERSION, **entries, "file": file})
    with _new_folder(check_target(directory, overwrite)) as folder:
        _write_bytes(folder / TENSORS, data)
        _write_bytes(folder / CONFIG, config)
        write_text(folder / CARD, card)


def signed(entries: Mapping[str, Any]) -> bytes:
    """The bytes of a ``config.json``: the entries as JSON and, as the last one, the checksum of the file itself.

    The checksum is the SHA-256 of the file's bytes with 64 zeros in the checksum's place. It is over bytes and not over
    values, so that a reader in another language need not write numbers as Python does.
    """
    text = json.dumps({**entries, "checksum": _NO_DIGEST}, indent=2, allow_nan=False) + "\n"
    before, _, after = text.rpartition(_NO_DIGEST)
    return f"{before}{hashlib.sha256(text.encode()).hexdigest()}{after}".encode()


def read_folder(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """Read and verify an artifact's files.

    Returns:
        The entries of ``config.json``, and the tensors on the CPU: all finite, and of the names, shapes and dtypes that
        ``config.json`` says.

    Raises:
        ArtifactError: A file is missing or is not, byte for byte, what was written; or the format is another one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}{_left_aside(folder)}")
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{folder} is not a saved posterior, or not all of one: it has no {' and no '.join(missing)}"
        )
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / TENSORS, config)
    check_values(tensors)
    return config, tensors


def _read_config(path: Path) -> Config:
    raw = path.read_bytes()
    try:
        entries = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is not JSON ({error}); copy the folder again") from error
    if not isinstance(entries, dict):
        raise ArtifactError(f"{path} is not a {FORMAT} description: it holds no JSON object")
    config = Config(entries)
    if entries.get("format") != FORMAT:
        raise ArtifactError(f'{path} is not a {FORMAT} description: its "format" is {entries.get("format")!r}')
    stored = config.text("checksum")
    digest = stored.encode()
    zeroed = raw.replace(digest, _NO_DIGEST.encode()) if re.fullmatch("[0-9a-f]{64}", stored) else b""
    if raw.count(digest) != 1 or hashlib.sha256(zeroed).hexdigest() != stored:
        raise ArtifactError(
            f"{path} is damaged or was edited: its checksum does not match; copy the folder again, or save it anew"
        )
    version = config.text("format_version")
    if version.partition(".")[0] != str(_MAJOR):
        raise ArtifactError(
            f"{path} has format version {version}, but this library reads {_MAJOR}.x; it was "
            f"written by stfbnn {entries.get('library_version')}: install that version"
        )
    return config


def _read_tensors(path: Path, config: Config) -> dict[str, Tensor]:
    data = path.read_bytes()
    length = config.get("file.bytes", int)
    if len(data) != length:
        raise ArtifactError(f"{path} is damaged: it has {len(data)} bytes instead of {length}; copy the folder again")
    if hashlib.sha256(data).hexdigest() != config.text("file.sha256"):
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}; copy the folder again")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors ({error})") from error
    found, said = tensor_specs(tensors), config.mapping("file.tensors")
    if found != said:
        different = sorted(name for name in found.keys() | said.keys() if found.get(name) != said.get(name))
        raise ArtifactError(
            f"{path} and {CONFIG} do not belong together: they differ in the tensors {different}, which are "
            f"{[found.get(name) for name in different]} and should be {[said.get(name) for name in different]}"
        )
    return tensors


def check_target(directory: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse a place where an artifact cannot be put; to be called before anything long begins.

    Returns:
        The absolute path, links resolved.

    Raises:
        InputError: The folder is there and not empty without ``overwrite``, or holds something else than an artifact's
            files, which replacing it would delete; or the path is a file.
    """
    target = Path(directory).resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise InputError(f"{target} is a file; give the name of a folder")
    names = sorted(entry.name for entry in target.iterdir())
    if names and not overwrite:
        raise InputError(f"{target} exists; choose another folder, or pass overwrite=True to replace it")
    foreign = [name for name in names if name not in (CONFIG, TENSORS, CARD)]
    if foreign:
        raise InputError(
            f"{target} holds more than a saved posterior ({', '.join(foreign[:5])}), which overwriting would delete; "
            f"choose another folder, or move those away"
        )
    return target


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target``; on success it takes its place, on any error it is removed."""
    token = secrets.token_hex(4)
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            sync_folder(temporary)
            _put_in_place(temporary, target, token)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path, token: str) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    # No portable call exchanges two folders, so the old one steps aside, and back if its successor cannot take its place.
    aside = target.with_name(f".{target.name}.{token}.old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _left_aside(folder: Path) -> str:
    """Where a process was killed between the two renames, the old artifact is whole, under another name."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.old")
    with suppress(OSError):
        for entry in folder.absolute().parent.iterdir():
            if pattern.fullmatch(entry.name):
                return f"; a save was killed while it replaced it, and what was there is whole in {entry}: rename that"
    return ""


def _write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
