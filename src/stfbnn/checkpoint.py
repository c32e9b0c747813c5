"""Checkpoints: one file from which a killed run goes on, refused rather than trusted when it is damaged.

A file is a fixed header (format name, length and SHA-256 of what follows) and then one ``torch.save`` archive that
holds plain containers, numbers, strings and tensors. It is read with ``weights_only=True``, so that loading never
executes code. The signature of the run (its settings) travels inside; a run with other settings is refused.

Writing keeps the last good file as ``<path>.previous``. At any moment, whatever kills the process, ``<path>`` is a
whole checkpoint or absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import CheckpointError, InputError
from stfbnn.files import atomic_path, storing

_MAGIC = b"stfbnn-checkpoint-1\n"
_LENGTH_BYTES = 8
_DIGEST_BYTES = hashlib.sha256().digest_size
_PROBE_BYTES = 4096
_HEADER_BYTES = len(_MAGIC) + _LENGTH_BYTES + _DIGEST_BYTES


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any], signature: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, keeping the one before it as ``<path>.previous``.

    A file at ``path`` that is damaged does not become the previous one, so a good one is never lost to it.

    Args:
        path: The file; its folder is created.
        state: What the run needs to go on: mappings, lists, tuples, strings, bytes, numbers, None and tensors of
            any device (they are stored as CPU tensors; a view is stored without the rest of its storage).
        signature: The settings that must be the same on resume, JSON values under string keys; may be nested.

    Raises:
        InputError: ``state`` holds something else, or ``signature`` is not JSON. Nothing has been written then.
        CheckpointError: ``path`` is a folder.
        StorageError: It cannot be written, such as on a full disk; ``path`` and the previous one are as they were.
    """
    target = Path(path)
    _refuse_folder(target)
    content = {"signature": _canonical(signature), "state": _portable(state, "state")}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    header = _MAGIC + len(payload).to_bytes(_LENGTH_BYTES, "little") + hashlib.sha256(payload).digest()
    with storing(target):
        _remove_leftovers(target)
        with atomic_path(target) as temporary:
            with temporary.open("wb") as file:
                file.write(header)
                file.write(payload)
            if target.exists() and _damage(target) is None:
                _copy(target, previous_path(target))


def prepare_checkpoint(path: str | os.PathLike[str], signature: Mapping[str, Any]) -> None:
    """Find out before a long run whether its checkpoints can be written.

    Raises:
        InputError: The signature is not JSON.
        CheckpointError: ``path`` is a folder, or its folder cannot be made or written to.
    """
    _canonical(signature)
    target = Path(path)
    _refuse_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            # A full disk takes a file, but nothing into it.
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint can be written to {target.parent}: {error.strerror or error}; make it writable, free some space, "
            f"or give another path"
        ) from error


def load_checkpoint(path: str | os.PathLike[str], signature: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the newest whole checkpoint, if there is one.

    Where ``path`` is damaged and ``<path>.previous`` is not, the latter is used and a warning says so. Where ``path``
    is missing, ``<path>.previous`` is not looked at: deleting ``path`` is how a run is started anew.

    Args:
        path: The file that ``save_checkpoint`` was given.
        signature: The settings of the run that wants to go on.

    Returns:
        The state, its tensors on the CPU and its mappings as dicts, or None where there is no file.

    Raises:
        CheckpointError: The file and its predecessor are damaged, or were written with another signature; every
            setting that differs is named with both values.
    """
    target = Path(path)
    _refuse_folder(target)
    if not target.exists():
        return None
    damage = _damage(target)
    source = target
    if damage is not None:
        source = previous_path(target)
        if not source.exists() or _damage(source) is not None:
            raise CheckpointError(
                f"the checkpoint {target} is damaged ({damage}) and there is no whole {source.name} beside it; "
                f"delete it to start anew, or restore it from a backup"
            )
        warnings.warn(
            f"the checkpoint {target} is damaged ({damage}); going on from {source.name}, the one before it",
            UserWarning,
            stacklevel=2,
        )
    content = _read(source)
    _require_same(content["signature"], _canonical(signature), source)
    state: dict[str, Any] = content["state"]
    return state


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one checkpoint whatever run it belongs to, without looking at its predecessor.

    Raises:
        CheckpointError: The file is damaged.
    """
    source = Path(path)
    damage = _damage(source)
    if damage is not None:
        raise CheckpointError(f"the checkpoint {source} is damaged ({damage}); {source.name}.previous may be whole")
    state: dict[str, Any] = _read(source)["state"]
    return state


def previous_path(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    target = Path(path)
    return target.with_name(target.name + ".previous")


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(_HEADER_BYTES)
        payload = io.BytesIO(file.read())
    try:
        content = torch.load(payload, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} has a valid checksum but cannot be read as plain tensors ({error}); it was not written by "
            f"stfbnn, or by a newer torch"
        ) from error
    if not isinstance(content, dict) or not {"signature", "state"} <= content.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this library: it has no signature and state")
    return content


def _damage(path: Path) -> str | None:
    """What is wrong with a file, or None where its checksum holds."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        if not header.startswith(_MAGIC):
            return "it does not begin as a checkpoint of this version does"
        if len(header) < _HEADER_BYTES:
            return "its header is cut off"
        length = int.from_bytes(header[len(_MAGIC) : len(_MAGIC) + _LENGTH_BYTES], "little")
        found = os.fstat(file.fileno()).st_size - _HEADER_BYTES
        if found != length:
            return f"it has {found} bytes of content instead of {length}"
        if hashlib.file_digest(file, "sha256").digest() != header[-_DIGEST_BYTES:]:
            return "its checksum does not match"
    return None


def _canonical(signature: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(signature), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"a checkpoint's signature must be made of JSON values under string keys: {error}") from error


def _require_same(saved: str, wanted: str, path: Path) -> None:
    if saved == wanted:
        return
    before, now = _flat(json.loads(saved)), _flat(json.loads(wanted))
    differences = [
        f"  {name}: {before.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    raise CheckpointError(
        f"{path} was written by a run with other settings:\n"
        + "\n".join(differences)
        + "\nGive the run the settings that it was started with, or another checkpoint path, or delete the file"
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names, each value as JSON text (text, so that NaN equals NaN)."""
    entries: dict[str, str] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            entries |= _flat(entry, f"{prefix}{key}.")
        else:
            entries[prefix + key] = json.dumps(entry, sort_keys=True)
    return entries


def _portable(value: Any, where: str) -> Any:
    """A copy of the containers of ``value`` that ``weights_only`` loading accepts, or an error naming the culprit."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        # torch.save writes a view's whole storage: a row of a large matrix would cost the matrix.
        whole = tensor.layout != torch.strided or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        return tensor if whole else tensor.clone()
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise InputError(f"{where} of a checkpoint has the key {key!r}; keys must be strings or integers")
        return {key: _portable(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_portable(entry, f"{where}[{index}]") for index, entry in enumerate(value))
    raise InputError(
        f"{where} of a checkpoint is a {type(value).__name__}, which cannot be loaded without executing code; "
        f"give tensors, numbers, strings, lists, tuples and mappings (arrays by torch.as_tensor, scalars by .item())"
    )


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            # A hard link costs nothing and leaves ``source`` in place; some file systems have none.
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _remove_leftovers(path: Path) -> None:
    """Remove the half-written files of runs that were killed while they wrote this checkpoint."""
    pattern = re.compile(rf"\.{re.escape(path.name)}(\.previous)?\.[a-z0-9_]{{8}}\.tmp")
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"the checkpoint path {path} is a folder; give the name of a file in it")
