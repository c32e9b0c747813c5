"""A network's weights from what a user names on the command line: files in the forms in which frameworks leave them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stfbnn.checkpoint import read_checkpoint
from stfbnn.cli.record import WEIGHTS
from stfbnn.errors import InputError
from stfbnn.files import atomic_path
from stfbnn.provenance import Provenance, attach

# Where frameworks put the state dict in what they save.
_NESTED = ("state_dict", "model_state_dict", "model")
# What wrappers put before every name: DataParallel, torch.compile, a Lightning module with the attribute "model".
_PREFIXES = ("module.", "_orig_mod.", "model.")
_LISTED = 6
_CHECKPOINT_START = b"stfbnn-checkpoint-"


def load_weights(model: nn.Module, path: Path) -> None:
    """Put weights from a file into a network; every tensor must have its place.

    Args:
        model: The network.
        path: A state dict (``.safetensors``, else what ``torch.save`` wrote), nested or with a wrapper's prefixes; a
            checkpoint of ``stfbnn train``; or the folder that it wrote.

    Raises:
        InputError: The file is missing or unreadable, or its tensors are not those of the network; says which.
    """
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise InputError(f"there is no file {path} with the network's weights; give it with --checkpoint")
    state = _without_prefixes(_state_dict(_content(path), path), model)
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    problems = [
        f"  {what} ({len(names)}): {_some(names)}"
        for what, names in (("missing in the file", missing), ("unknown to the model", unexpected))
        if names
    ]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(expected[name].shape)} in the model"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"  other shapes ({len(shapes)}): {'; '.join(shapes[:_LISTED])}")
    if problems:
        raise InputError(
            f"{path} does not fit the model {type(model).__name__}:\n"
            + "\n".join(problems)
            + "\ngive the factory, its --model-args and the file of one and the same network"
        )
    model.load_state_dict(state)


def save_seen(provenance: Provenance, path: Path) -> None:
    """Write which examples a network was trained on, as hashes, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.torch.save({"seen": provenance.to_tensor()}))


def attach_seen(model: nn.Module, path: Path) -> None:
    """Note on a network which examples it was trained on, if ``path``, from `save_seen`, is there.

    Raises:
        InputError: The file is damaged.
    """
    if not path.is_file():
        return
    try:
        attach(model, Provenance.from_tensor(safetensors.torch.load_file(path)["seen"]))
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or train anew") from error


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}; it is damaged or no such file") from error
    with path.open("rb") as file:
        own = file.read(len(_CHECKPOINT_START)) == _CHECKPOINT_START
    if own:
        return _training_state(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds Python objects, which are never loaded, for loading them executes code (or it is no file of "
            f"torch.save); save the weights alone: torch.save(model.state_dict(), …)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read by torch.load: {str(error).splitlines()[0]}; is it damaged?"
        ) from error


def _training_state(path: Path) -> Any:
    state = read_checkpoint(path)
    if "model" not in state:
        raise InputError(
            f"{path} is a checkpoint of stage two, which holds no network; give the trained network's file"
        )
    # With keep_best the run ends with the best epoch's parameters, not the last one's.
    best = state.get("best")
    return state["model"] if best is None else best["model"]


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} holds a {type(content).__name__} and no state dict; save model.state_dict()")
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise InputError(
            f"{path} is no state dict: {_some(other)} are no tensors; save model.state_dict(), bare or under 'state_dict'"
        )
    return {str(name): value for name, value in content.items()}


def _without_prefixes(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict().keys()
    prefix: str | None = ""
    while prefix is not None:
        state = {name[len(prefix) :]: value for name, value in state.items()}
        prefix = next(
            (
                candidate
                for candidate in _PREFIXES
                if all(name.startswith(candidate) for name in state)
                and not any(name.startswith(candidate) for name in own)
            ),
            None,
        )
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
