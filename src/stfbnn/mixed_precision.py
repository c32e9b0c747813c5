"""Mixed precision: the network's forward pass in bfloat16, and everything about the posterior in full precision.

A draw of weights, the KL divergence and an engine's linear algebra lose their meaning at three digits, and gradients are to be
taken outside of ``torch.autocast``; so an autocast that surrounds a call is taken as a wish for the forward passes alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from stfbnn.errors import InputError

Precision = Literal["32-true", "bf16-mixed"]


def autocast_dtype(precision: Precision | None, device: torch.device) -> torch.dtype | None:
    """The dtype that forward passes are to be cast to; None for none.

    Args:
        precision: "32-true" for none, "bf16-mixed" for bfloat16, None for what a surrounding ``torch.autocast`` says.
        device: Of the network.

    Raises:
        InputError: The precision is unknown, or the surrounding autocast is to float16.
    """
    if precision is None:
        if not torch.is_autocast_enabled(device.type):
            return None
        dtype = torch.get_autocast_dtype(device.type)
        if dtype != torch.bfloat16:
            raise InputError(
                f"the surrounding autocast is to {dtype}, whose gradients underflow without loss scaling; use "
                f"torch.autocast({device.type!r}, dtype=torch.bfloat16)"
            )
        return dtype
    if precision not in ("32-true", "bf16-mixed"):
        raise InputError(f'precision must be "32-true", "bf16-mixed" or None, but it is {precision!r}')
    return torch.bfloat16 if precision == "bf16-mixed" else None


def cast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to ``dtype`` within a block; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast within a block."""
    # Asked first, for it is not free and few calls have one around them.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
