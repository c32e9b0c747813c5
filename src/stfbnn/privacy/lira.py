"""LiRA: is this example's confidence rather that of networks trained with it, or of networks trained without it?

Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership inference attacks from first principles", 2022. Some examples are
easy and get a high confidence from any network; shadow models say what is usual for each, and so the attack finds single
members without false alarms, which is where thresholds common to all examples fail.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite
from stfbnn.privacy.scores import as_membership

Mode = Literal["online", "offline"]
Variance = Literal["auto", "per-example", "global"]

PER_EXAMPLE_FROM = 64
"""From so many shadow models on, "auto" estimates a variance for each example (Carlini et al. 2022)."""

SMALLEST_VARIANCE = 1e-12
"""Of φ, where all shadows agree: below the rounding of a network in float32."""


def lira(
    target_scores: ArrayLike,
    shadow_scores: ArrayLike,
    shadow_member: ArrayLike,
    *,
    mode: Mode = "online",
    variance: Variance = "auto",
) -> Tensor:
    """The likelihood-ratio attack, one score an example, higher for members.

    Online it is log N(φ; μ_in, σ²_in) − log N(φ; μ_out, σ²_out), with the moments of the shadows that had the example and of
    those that had not. Offline it is −log P(φ_out > φ) under the second Gaussian alone; shadows that had the example
    are not looked at.

    A global variance is pooled *within* examples, Σ (φ − its example's mean)² / Σ (count − 1): examples differ far more in how
    easy they are than one of them does from network to network.

    Args:
        target_scores: φ of each example under the attacked model, (N,); see ``scores.scaled_confidence``.
        shadow_scores: The same under M shadow models, (M, N). The attacked model must not be among them.
        shadow_member: Which shadows had which example, (M, N) bool.
        mode: "online" or "offline".
        variance: "per-example"; "global", one for those with and one for those without; or "auto", per example
            where there are `PER_EXAMPLE_FROM` shadows and at least two of each kind that is needed for every example.

    Returns:
        (N,) in float64.

    Raises:
        InputError: Scores are not finite, shapes disagree, an example has no shadow of a kind that is needed (or, for its own
            variance, only one), or a mode or variance is unknown.
    """
    target, shadows, member = checked_shadows(target_scores, shadow_scores, shadow_member)
    if variance not in ("auto", "per-example", "global"):
        raise InputError(f'variance must be "auto", "per-example" or "global", but it is {variance!r}')
    sides = require_sides(member, mode)
    fewest = min(int(side.sum(dim=0).min()) for side in sides)
    own = variance == "per-example" or (variance == "auto" and len(shadows) >= PER_EXAMPLE_FROM and fewest >= 2)
    if own and fewest < 2:
        lacking = int(torch.stack([side.sum(dim=0) < 2 for side in sides]).any(dim=0).sum())
        raise InputError(
            f"a variance for each example needs two shadow models of each kind, but {lacking} of {len(target)} examples have "
            f'fewer: train more shadows, or use variance="global"'
        )
    outside = _moments(shadows, sides[0], own)
    if mode == "offline":
        standardised = (target - outside[0]) / outside[1].sqrt()
        # Not log Φ(z): that is the same order, but it rounds to 0 for the very examples that are found with certainty.
        surprise: Tensor = -torch.special.log_ndtr(-standardised)
        return surprise
    inside = _moments(shadows, sides[1], own)
    return _log_density(target, *inside) - _log_density(target, *outside)


def checked_shadows(target: ArrayLike, shadow: ArrayLike, member: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
    """Take what an attack with shadow models needs: (N,), (M, N) and (M, N) bool.

    Raises:
        InputError: Numbers are not finite, or shapes disagree.
    """
    one, many = as_finite(target, "target scores"), as_finite(shadow, "shadow scores")
    if one.ndim != 1 or many.ndim != 2 or many.shape[1] != len(one):
        raise InputError(
            f"an attack with M shadow models needs N target scores and M x N shadow scores, but their shapes are "
            f"{tuple(one.shape)} and {tuple(many.shape)}"
        )
    return one, many, as_membership(member, tuple(many.shape), "shadow membership")


def require_sides(member: Tensor, mode: str) -> tuple[Tensor, ...]:
    """The shadows that are used, as (M, N) bool: those without each example, and online also those with it.

    Raises:
        InputError: The mode is unknown, or an example has no shadow of a kind that is needed.
    """
    if mode not in ("online", "offline"):
        raise InputError(f'mode must be "online" or "offline", but it is {mode!r}')
    sides = (~member, member) if mode == "online" else (~member,)
    for kind, side in zip(("without", "with"), sides, strict=False):
        lacking = int((~side.any(dim=0)).sum())
        if lacking:
            advice = ' or attack with mode="offline"' if kind == "with" else ""
            raise InputError(
                f"{lacking} of {side.shape[1]} examples have no shadow model trained {kind} them, of {len(side)} shadows: "
                f"give every example to about half of the shadows{advice}"
            )
    return sides


def _moments(shadows: Tensor, side: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of each example over the shadows of one side, (N,) and (N,) or ()."""
    counts = side.sum(dim=0)
    mean = (shadows * side).sum(dim=0) / counts
    squares = ((shadows - mean).square() * side).sum(dim=0)
    if own:
        variance = squares / (counts - 1)
    else:
        freedom = int((counts - 1).sum())
        if not freedom:
            raise InputError(
                "no example has two shadow models of a kind, so nothing says how much their scores vary: train more shadows"
            )
        variance = squares.sum() / freedom
    return mean, variance.clamp_min(SMALLEST_VARIANCE)


def _log_density(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((values - mean).square() / variance + variance.log() + math.log(2 * math.pi))
