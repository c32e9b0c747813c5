"""The binary Kullback–Leibler divergence and its inverses, stable from c = 0 on and for q near 0 and 1.

kl(q‖p) = q ln(q/p) + (1−q) ln((1−q)/(1−p)) cancels badly where p is near q, which is where a tight bound lives. With
d = p − q it is q h(d/q) + (1−q) h(−d/(1−q)), h(x) = x − ln(1+x) ≥ 0: the linear terms drop out exactly, and what is left is a
sum of two numbers that are not negative. The inverses are found as d, so that they are exact to the last digits of d.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from stfbnn.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

# Newton's method needs about ten steps; as many halvings as this would do alone, down to 2^-130.
_STEPS = 130
# Where a step changes d by no more than this share of it, what is left is rounding.
_ROUNDING = 4 * float(np.finfo(np.float64).eps)
# Below it, h is summed as a series in x/(2+x), at most 1/3; these terms leave an error below 1e-17.
_SERIES_BELOW, _TERMS = 0.5, 17
# Where the empirical risk is 0 the slope of the inverse is infinite; a step of an optimiser takes that at this risk.
_LEAST_RISK = 1e-12


def binary_kl(q: ArrayLike, p: ArrayLike) -> Floats:
    """kl(q‖p) of two Bernoulli distributions, nats.

    Args:
        q: Probabilities in [0, 1].
        p: The same, of a shape that goes with that of ``q``.

    Returns:
        float64 of their common shape; infinite where p is 0 or 1 and q is not.

    Raises:
        InputError: A number is not in [0, 1].
    """
    first, second = np.broadcast_arrays(_probabilities(q, "q"), _probabilities(p, "p"))
    up = _divergence(first, 1 - first, second - first, 1 - second)
    down = _divergence(1 - first, first, first - second, second)
    found: Floats = np.where(second >= first, up, down)
    return found


def binary_kl_gradients(q: ArrayLike, p: ArrayLike) -> tuple[Floats, Floats]:
    """The derivatives of kl(q‖p): by q, ln(q/p) − ln((1−q)/(1−p)), and by p, (p−q)/(p(1−p)).

    Args:
        q: As for `binary_kl`.
        p: As for `binary_kl`.

    Returns:
        Both, float64; infinite at the ends, and 0 where q = p.

    Raises:
        InputError: A number is not in [0, 1].
    """
    first, second = np.broadcast_arrays(_probabilities(q, "q"), _probabilities(p, "p"))
    apart = second - first
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        by_q = np.log1p(-apart / (1 - first)) - np.log1p(apart / first)
        by_p = apart / second / (1 - second)
    same = apart == 0
    return np.where(same, 0.0, by_q), np.where(same, 0.0, by_p)


def upper_inverse(q: ArrayLike, c: ArrayLike) -> Floats:
    """The largest p with kl(q‖p) ≤ c.

    Args:
        q: Probabilities in [0, 1].
        c: Divergences in nats, at least 0, of a shape that goes with that of ``q``; infinity is allowed.

    Returns:
        float64 of their common shape, within 1e-14; 1 − e^(−c) where q = 0, q where c = 0, and 1 where q = 1.

    Raises:
        InputError: A probability is not in [0, 1], or a divergence is negative or NaN.
    """
    first, budget = _checked(q, c)
    step = _step(first, 1 - first, budget)
    return np.where(first == 0, -np.expm1(-budget), np.minimum(first + step, 1.0))


def lower_inverse(q: ArrayLike, c: ArrayLike) -> Floats:
    """The smallest p with kl(q‖p) ≤ c; see `upper_inverse`.

    Args:
        q: Probabilities in [0, 1].
        c: Divergences in nats, at least 0.

    Returns:
        float64 of their common shape; e^(−c) where q = 1, q where c = 0, and 0 where q = 0.

    Raises:
        InputError: As for `upper_inverse`.
    """
    first, budget = _checked(q, c)
    step = _step(1 - first, first, budget)
    return np.where(first == 1, np.exp(-budget), np.maximum(first - step, 0.0))


def upper_inverse_gradients(q: ArrayLike, c: ArrayLike) -> tuple[Floats, Floats]:
    """The derivatives of `upper_inverse` by q and by c, by the implicit function theorem (Reeb et al. 2018, appendix A).

    With p the inverse, dp/dc = p(1−p)/(p−q), and dp/dq = [ln(p/q) − ln((1−p)/(1−q))]·dp/dc.

    Args:
        q: As for `upper_inverse`.
        c: As for `upper_inverse`.

    Returns:
        Both, float64: 1 and infinity at c = 0; infinity by q at q = 0; 0 where p is 1.

    Raises:
        InputError: As for `upper_inverse`.
    """
    first, budget = _checked(q, c)
    step = np.where(first == 0, -np.expm1(-budget), _step(first, 1 - first, budget))
    rest = np.where(first == 0, np.exp(-budget), np.maximum(1 - first - step, 0.0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        by_c = (first + step) * rest / step
        by_q = (np.log1p(step / first) - np.log1p(-step / (1 - first))) * by_c
    none, full = step == 0, rest == 0
    by_q, by_c = np.where(none, 1.0, by_q), np.where(none, np.inf, by_c)
    return np.where(full, 0.0, by_q), np.where(full, 0.0, by_c)


def differentiable_upper_inverse(q: Tensor, c: Tensor) -> Tensor:
    """`upper_inverse` of tensors, with gradients, for objectives.

    Args:
        q: Probabilities in [0, 1].
        c: Divergences in nats, at least 0, of a shape that goes with that of ``q``.

    Returns:
        Of their common shape, in the dtype of ``q``; computed in double. Where q is below 1e-12 its gradient is that at
        1e-12, for at 0 it is infinite.

    Raises:
        InputError: As for `upper_inverse`.
    """
    first, budget = torch.broadcast_tensors(q, c)  # type: ignore[no-untyped-call]
    found: Tensor = _UpperInverse.apply(first, budget)  # type: ignore[no-untyped-call]
    return found


class _UpperInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, c: Tensor) -> Tensor:
        first, budget = (value.detach().cpu().double().numpy() for value in (q, c))
        ctx.slopes = upper_inverse_gradients(np.clip(first, _LEAST_RISK, 1.0), budget)
        ctx.like = q, c
        return torch.from_numpy(np.asarray(upper_inverse(first, budget))).to(q)

    @staticmethod
    def backward(ctx: Any, *ahead: Tensor) -> tuple[Tensor, ...]:
        by_q, by_c = (torch.from_numpy(np.asarray(slope)) for slope in ctx.slopes)
        return tuple(ahead[0] * slope.to(like) for slope, like in zip((by_q, by_c), ctx.like, strict=True))


def _step(near: Floats, far: Floats, budget: Floats) -> Floats:
    """The largest d in [0, far] with kl ≤ budget, d being moved from a probability ``far`` = 1 − ``near`` to the other."""
    low = np.zeros_like(near)
    # Pinsker: kl ≥ 2 d². From above, Newton's steps do not pass the root, for kl is convex in d; halving where they leave.
    at = high = np.minimum(far, np.sqrt(budget / 2) * (1 + 1e-12))
    for _ in range(_STEPS):
        value = _divergence(near, far, at) - budget
        low, high = np.where(value <= 0, at, low), np.where(value <= 0, high, at)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            newton = at - value * (near + at) * (far - at) / at
        settled = np.abs(newton - at) <= _ROUNDING * at
        following = np.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
        following = np.where(settled, at, following)
        if bool((np.abs(following - at) <= _ROUNDING * at).all()):
            break
        at = following
    # On the safe side of what rounding leaves open.
    return np.minimum(at * (1 + 2 * _ROUNDING), far)


def _divergence(near: Floats, far: Floats, step: Floats, rest: Floats | None = None) -> Floats:
    """Kl, where ``step`` in [0, far] of the probability ``far`` = 1 − ``near`` moves to the other outcome.

    ``rest`` is far − step where it is known to more digits than that difference has.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        gained, lost = step / near, np.maximum(-step / far, -1.0)
        # near·h(step/near), where the ratio leaves the range: the logarithms of both are still in it.
        huge = step - near * (np.log(step) - np.log(near))
        rising = np.where(gained < 1e300, near * _excess(np.minimum(gained, 1e300)), huge)
        falling = far * _excess(lost)
        if rest is not None:
            falling = np.where(lost < -_SERIES_BELOW, -step - far * np.log(rest / far), falling)
    rising = np.where(near == 0, step, rising)
    return np.where(step <= 0, 0.0, rising + np.where(far == 0, 0.0, falling))


def _excess(x: Floats) -> Floats:
    """x − ln(1 + x) for x ≥ −1, to full relative accuracy."""
    small = np.abs(x) < _SERIES_BELOW
    inside = np.where(small, x, 0.0)
    ratio = inside / (2 + inside)
    square, series = ratio * ratio, np.zeros_like(ratio)
    # ln(1+x) = 2 artanh(s), s = x/(2+x), and x − 2s = x s.
    for term in range(_TERMS, 0, -1):
        series = series * square + 1 / (2 * term + 1)
    near_zero = inside * ratio - 2 * ratio * square * series
    found: Floats = np.where(small, near_zero, x - np.log1p(x))
    return found


def _checked(q: ArrayLike, c: ArrayLike) -> tuple[Floats, Floats]:
    budget = np.asarray(c, np.float64)
    if not bool((budget >= 0).all()):
        raise InputError(f"a divergence c must be at least 0 and not NaN, but the least given is {np.min(budget)}")
    # A finite number in place of infinity, of which none can be subtracted; beyond 1e3 all give the same.
    first, second = np.broadcast_arrays(_probabilities(q, "q"), np.minimum(budget, 1e300))
    return first, second


def _probabilities(values: ArrayLike, name: str) -> Floats:
    found = np.asarray(values, np.float64)
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise InputError(f"{name} must be probabilities in [0, 1], but they go from {np.min(found)} to {np.max(found)}")
    return found
