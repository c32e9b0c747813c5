"""Checks of settings that engines, estimators and `fit` share."""

from __future__ import annotations

import math

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
