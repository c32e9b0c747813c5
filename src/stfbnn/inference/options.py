"""What `fit` accepts: its options, checked before any work starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal

from stfbnn.errors import InputError

# Tried in this order, each from the trained weights, until the held-out score got worse twice in a row.
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)
# Where nothing is held out to choose T: T = 1 is Bayes, but a mean-field posterior over a wide first layer underfits there.
DEFAULT_TEMPERATURE = 0.1

EarlyStop = Literal["nll", "free-energy"]


def temperature_schedule(
    temperature: float | Literal["held-out"] | None, grid: Iterable[float], has_held_out: bool
) -> tuple[float, ...]:
    """The temperatures to run, from high to low.

    Raises:
        InputError: They are not positive, are repeated, or are to be chosen without held-out data.
    """
    if not isinstance(grid, Iterable):
        raise InputError(f"temperatures must be numbers to try, such as (1.0, 0.3, 0.1), but it is {grid!r}")
    if temperature is None and not has_held_out:
        warnings.warn(
            f"no temperature was given and nothing is held out to choose it: T={DEFAULT_TEMPERATURE:g} is taken; pass "
            f"val_loader= (data that no stage has seen) or temperature=",
            stacklevel=3,
        )
        return (DEFAULT_TEMPERATURE,)
    if temperature == "held-out" and not has_held_out:
        raise InputError('temperature="held-out" needs val_loader=, data that no stage has seen')
    chosen = grid if temperature in (None, "held-out") else (temperature,)
    values: list[float] = []
    for value in chosen:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f'temperatures must be positive and finite numbers, or "held-out", but one is {value!r}')
        values.append(float(value))
    if not values or len(set(values)) < len(values):
        raise InputError(f"temperatures must be different numbers, at least one, but they are {values}")
    return tuple(sorted(values, reverse=True))


def check_held_out_options(
    predictive_temperature: float | Literal["held-out"],
    early_stop: EarlyStop | None,
    max_seen_share: float,
    has_held_out: bool,
) -> None:
    """Refuse a predictive temperature, a way of stopping early or a share that is unknown or needs held-out data.

    Raises:
        InputError: Says which.
    """
    if predictive_temperature == "held-out":
        if not has_held_out:
            raise InputError('predictive_temperature="held-out" needs val_loader=, data that no stage has seen')
    elif not _is_number(predictive_temperature) or not 0 < predictive_temperature < float("inf"):
        raise InputError(
            f'predictive_temperature must be positive and finite, or "held-out", but it is {predictive_temperature!r}'
        )
    if not _is_number(max_seen_share) or not 0 <= max_seen_share <= 1:
        raise InputError(f"max_seen_share must be a share from 0 to 1, but it is {max_seen_share!r}")
    if early_stop is not None:
        if early_stop not in ("nll", "free-energy"):
            raise InputError(f'early_stop must be "nll", "free-energy" or None, but it is {early_stop!r}')
        if not has_held_out:
            raise InputError("early_stop needs val_loader=, data that no stage has seen")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
