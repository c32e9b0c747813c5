"""RMIA: did the model gain more on this example than on others, compared with what reference models give it?

Zarifzadeh, Liu and Shokri, "Low-cost high-power membership inference attacks", 2024. It needs few reference models, even one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike
from stfbnn.privacy.lira import Mode, checked_shadows, require_sides
from stfbnn.privacy.scores import as_membership


def rmia(
    target_log_p: ArrayLike,
    shadow_log_p: ArrayLike,
    shadow_member: ArrayLike,
    *,
    mode: Mode = "online",
    gamma: float = 2.0,
    a: float = 0.3,
    population: ArrayLike | None = None,
) -> Tensor:
    """The share of population points z that x beats by the factor γ: [p(x|θ) / p(x)] / [p(z|θ) / p(z)] ≥ γ.

    p(x) is what reference models give: online the average of the mean over those that had x and of the mean over those that
    had not; offline ½ ((1 + a) p_out(x) + (1 − a)), which guesses from the latter what the former would give, by
    p_in ≈ a p_out + 1 − a. Population points are treated alike.

    With one population for all examples the score is a growing step function of the ratio p(x|θ) / p(x); the population and
    γ only decide how finely it is told. A γ above 1 can give one score to members with a ratio of 2 and to others with 1.8, so
    with all examples as the population γ = 1 has every point of the ROC curve that a larger γ has, and more. Data that serve
    as population alone are given along with the examples, and their scores left aside.

    Args:
        target_log_p: log p_y of each example under the attacked model, (N,).
        shadow_log_p: The same under M reference models, (M, N). The attacked model must not be among them.
        shadow_member: Which of them had which example, (M, N) bool.
        mode: "online" or "offline"; offline, reference models that had an example are not looked at.
        gamma: γ, at least 1; 2 in the paper.
        a: From 0 to 1; how far reference models with and without an example agree, offline.
        population: Which examples are population points, (N,) bool; None for all, of which an attacker need not
            know who is a member. An example is never compared with itself.

    Returns:
        (N,) in float64, from 0 to 1.

    Raises:
        InputError: Numbers are not finite or not logarithms of probabilities, shapes disagree, an example has no reference
            model of a kind that is needed, the population is too small, or γ, ``a`` or the mode is out of range.
    """
    target, shadows, member = checked_shadows(target_log_p, shadow_log_p, shadow_member)
    sides = require_sides(member, mode)
    if max(float(target.max()), float(shadows.max())) > 1e-3:
        raise InputError(
            "RMIA needs log p_y, at most 0, but some are positive: are they φ, or losses of the other sign?"
        )
    if not 1 <= gamma < math.inf or not 0 <= a <= 1:
        raise InputError(f"gamma must be finite and at least 1, and a from 0 to 1, but they are {gamma} and {a}")
    count = len(target)
    points = (
        torch.ones(count, dtype=torch.bool) if population is None else as_membership(population, (count,), "population")
    )
    if int(points.sum()) < 2:
        raise InputError(
            f"the population must have at least two of the {count} examples, but it has {int(points.sum())}"
        )
    ratios = target - _log_reference(shadows, sides, a)
    beaten = torch.searchsorted(ratios[points].sort().values, ratios - math.log(gamma), right=True)
    # An example beats itself by the factor 1.
    itself = points & (gamma == 1)
    return (beaten - itself.long()).double() / (points.sum() - points.long()).double()


def _log_reference(shadows: Tensor, sides: tuple[Tensor, ...], a: float) -> Tensor:
    """log p(x) of each example, (N,)."""
    means = [shadows.masked_fill(~side, -math.inf).logsumexp(dim=0) - side.sum(dim=0).log() for side in sides]
    if len(means) == 2:
        return torch.logaddexp(means[0], means[1]) - math.log(2)
    certain = torch.full_like(means[0], math.log((1 - a) / 2) if a < 1 else -math.inf)
    return torch.logaddexp(means[0] + math.log((1 + a) / 2), certain)
