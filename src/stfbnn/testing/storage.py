"""Clauses on what is kept of a posterior: its tensors and settings in a file, its state in a checkpoint, and copies."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import ArtifactError
from stfbnn.posterior import Posterior
from stfbnn.testing.setting import Setting, require


def config_is_json(setting: Setting) -> None:
    """config is a mapping that JSON keeps as it is."""
    config = setting.posterior().config()
    require(isinstance(config, dict), f"config is a {type(config).__name__}")
    try:
        again = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        require(False, f"config {config!r} is not JSON: {error}")
    require(again == config, f"through JSON, config {config!r} becomes {again!r}")


def tensors_are_copies(setting: Setting) -> None:
    """tensors are detached, contiguous and of a memory of their own, as a file needs."""
    posterior = setting.posterior()
    before = _state(posterior)
    tensors = posterior.tensors()
    places = set()
    for name, tensor in tensors.items():
        require(not tensor.requires_grad, f"the tensor {name!r} is not detached")
        require(tensor.is_contiguous(), f"the tensor {name!r} is not contiguous")
        if tensor.numel():
            places.add(tensor.untyped_storage().data_ptr())
            tensor.fill_(1)
    filled = sum(1 for tensor in tensors.values() if tensor.numel())
    require(len(places) == filled, "two of the tensors share memory")
    _require_state(posterior, before, "writing to what tensors returned changes the posterior")


def tensors_and_config_rebuild(setting: Setting) -> None:
    """The recipe's class with config builds a posterior that, with the tensors, gives the very same draws."""
    posterior = setting.posterior()
    recipe: Any = type(setting.family)
    prior = setting.prior()
    try:
        other = recipe(**posterior.config()).build(setting.layout, torch.zeros_like(setting.mean), prior)
    except TypeError as error:
        require(False, f"{recipe.__name__} does not take config, {posterior.config()!r}: {error}")
    other.load_tensors(posterior.tensors())
    _require_same(setting, posterior, other, "a posterior that was rebuilt from config and tensors")


def foreign_tensors_are_refused(setting: Setting) -> None:
    """load_tensors refuses missing and unknown tensors, other shapes and dtypes, by ArtifactError, and changes nothing then."""
    posterior = setting.posterior()
    before = _state(posterior)
    good = posterior.tensors()
    bad: dict[str, Mapping[str, Tensor]] = {"an unknown tensor": {**good, "no such tensor": torch.zeros(1)}}
    for name, tensor in good.items():
        other_dtype = torch.float16 if tensor.dtype != torch.float16 else torch.float32
        changed = {key: torch.zeros_like(value) for key, value in good.items()}
        bad[f"no {name!r}"] = {key: value for key, value in changed.items() if key != name}
        bad[f"{name!r} of another shape"] = {**changed, name: tensor.unsqueeze(0)}
        bad[f"{name!r} of another dtype"] = {**changed, name: tensor.to(other_dtype)}
    for what, tensors in bad.items():
        try:
            posterior.load_tensors(tensors)
        except ArtifactError:
            _require_state(posterior, before, f"load_tensors refuses {what}, but has changed the posterior by then")
        else:
            require(False, f"load_tensors accepts {what}")


def state_dict_round_trips(setting: Setting) -> None:
    """The state dict holds all that differs from a new posterior."""
    posterior, other = setting.posterior(), setting.built()
    other.load_state_dict(posterior.state_dict())
    _require_same(setting, posterior, other, "a posterior that took the state dict")


def copies_are_independent(setting: Setting) -> None:
    """A deep copy is the same, and changes alone."""
    posterior = setting.posterior()
    before = _state(posterior)
    other = copy.deepcopy(posterior)
    _require_same(setting, posterior, other, "a deep copy")
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    _require_state(posterior, before, "changing a deep copy changes the posterior")


def _require_same(setting: Setting, one: Posterior, other: Posterior, what: str) -> None:
    noise = setting.noise(one, 9)
    require(other.noise_size == one.noise_size, f"{what} takes noise of {other.noise_size}, not {one.noise_size}")
    for name, mine, theirs in (
        ("draws", one.draw(noise), other.draw(noise)),
        ("means", one.mean_vector(), other.mean_vector()),
        ("standard deviations", one.std_vector(), other.std_vector()),
    ):
        require(torch.equal(mine, theirs), f"{what} has other {name}")


def _state(posterior: Posterior) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in posterior.state_dict().items()}


def _require_state(posterior: Posterior, state: Mapping[str, Tensor], message: str) -> None:
    require(all(torch.equal(value, state[name]) for name, value in posterior.state_dict().items()), message)


CLAUSES = (
    config_is_json,
    tensors_are_copies,
    tensors_and_config_rebuild,
    foreign_tensors_are_refused,
    state_dict_round_trips,
    copies_are_independent,
)
