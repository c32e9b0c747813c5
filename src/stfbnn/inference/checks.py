"""Checks of settings that engines, estimators and `fit` share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from stfbnn.errors import InputError


def require_positive(**settings: float) -> None:
    """Refuse settings that are not positive and finite, by name.

    Raises:
        InputError: One is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{name} must be positive and finite, but it is {value!r}")


def require_count(**settings: int) -> None:
    """Refuse settings that are not positive integers, by name.

    Raises:
        InputError: One is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, but it is {value!r}")


def require_gradients(posterior: nn.Module) -> None:
    """Refuse to infer under ``torch.inference_mode``, and what was made under it: neither knows gradients.

    Raises:
        InputError: It is so.
    """
    if torch.is_inference_mode_enabled() or any(one.is_inference() for one in posterior.state_dict().values()):
        raise InputError(
            "inference of a posterior takes gradients, which there are none of under torch.inference_mode(): call "
            "bayesianize or load, and what infers, outside of it (torch.no_grad() is no hindrance)"
        )


def require_options(what: str, function: Callable[..., Any], options: Iterable[str], own: Iterable[str] = ()) -> None:
    """Refuse keyword arguments that a function does not take, or that are not the user's to give.

    Args:
        what: The function's name, for the message.
        function: It.
        options: Names of the arguments.
        own: Those that the caller gives itself.

    Raises:
        InputError: One is not known.
    """
    known = set(inspect.signature(function).parameters) - set(own)
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"{what} takes no {', '.join(unknown)} here; it takes {', '.join(sorted(known))}")
