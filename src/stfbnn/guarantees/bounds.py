"""PAC-Bayes bounds of a risk in [0, 1], as numbers, and as tensors with gradients for objectives.

Notation: r̂ the empirical risk R̂_S(Q) of the sampled classifier on n ≥ 8 i.i.d. examples, KL = KL(Q‖P) in nats for a prior P
that does not depend on them. Each bound holds with probability 1 − δ for all Q at once. All follow from Maurer's
kl(r̂‖R) ≤ B, B = (KL + ln(2√n/δ))/n, so that `maurer_seeger`, which inverts kl numerically, is never above the others; those
are its relaxations by kl ≥ (R−r̂)²/(2R) (`quadratic_bound`, whose square roots `lambda_bound` linearises) and by Pinsker's
kl ≥ 2(R−r̂)² (`mcallester`).

Maurer 2004, "A note on the PAC Bayesian theorem" (cs/0411099), theorem 5; Seeger 2002; Thiemann, Igel, Wintenberger and Seldin
2017; Rivasplata et al. 2019; Pérez-Ortiz et al. 2021; McAllester 1999; Langford and Caruana 2002 for the Monte-Carlo part.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.guarantees.kl_inversion import differentiable_upper_inverse, upper_inverse

Number = TypeVar("Number", float, Tensor)

# Maurer's theorem needs as many examples.
FEWEST_EXAMPLES = 8


def budget(kl: Number, n: int, delta: float, priors: int = 1) -> Number:
    """B = (KL + ln(2√n/δ) + ln k)/n, by which kl(r̂‖R) is bounded.

    Args:
        kl: KL(Q‖P), nats, at least 0.
        n: Examples, at least 8.
        delta: The probability δ in (0, 1) with which the bound may fail.
        priors: k, the number of priors among which P was picked on the certified examples: each is charged δ/k.

    Raises:
        InputError: An argument is out of range.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < FEWEST_EXAMPLES:
        raise InputError(f"a PAC-Bayes bound needs at least {FEWEST_EXAMPLES} examples, but n is {n!r}")
    if isinstance(priors, bool) or not isinstance(priors, int) or priors < 1:
        raise InputError(f"the number of priors considered must be a positive integer, but it is {priors!r}")
    require_level(delta, "delta")
    if not isinstance(kl, Tensor) and not kl >= 0:
        raise InputError(f"a KL divergence must be at least 0, but it is {kl}")
    return (kl + math.log(2 * math.sqrt(n) / delta) + math.log(priors)) / n


def maurer_seeger(empirical_risk: Number, kl: Number, n: int, delta: float, priors: int = 1) -> Number:
    """R ≤ kl⁻¹(r̂, B): the largest risk whose kl from r̂ is at most B; never above 1.

    Args:
        empirical_risk: r̂ in [0, 1].
        kl: As for `budget`, and so all that follow.
        n: Examples.
        delta: δ.
        priors: k.

    Raises:
        InputError: An argument is out of range.
    """
    allowed = budget(kl, n, delta, priors)
    if isinstance(allowed, Tensor):
        return differentiable_upper_inverse(torch.as_tensor(empirical_risk).to(allowed), allowed)
    return float(upper_inverse(empirical_risk, allowed))


def lambda_bound(empirical_risk: Number, kl: Number, n: int, delta: float, lam: Number, priors: int = 1) -> Number:
    """R ≤ r̂/(1 − λ/2) + B/(λ(1 − λ/2)), for all λ in (0, 2) at once (Thiemann et al. 2017, theorem 3).

    Linear in r̂ and KL for a fixed λ; may be above 1. λ may be minimised over, for Q and λ in turn: see `best_lambda`.

    Args:
        empirical_risk: r̂.
        kl: KL(Q‖P), nats.
        n: Examples.
        delta: δ.
        lam: λ.
        priors: k.

    Raises:
        InputError: An argument is out of range.
    """
    allowed = budget(kl, n, delta, priors)
    given = float(lam.detach() if isinstance(lam, Tensor) else lam)
    if not 0 < given < 2:
        raise InputError(f"lam must lie between 0 and 2, but it is {given}")
    return empirical_risk / (1 - lam / 2) + allowed / (lam * (1 - lam / 2))


def best_lambda(empirical_risk: float, kl: float, n: int, delta: float, priors: int = 1) -> float:
    """The λ at which `lambda_bound` is least: 2/(√(2 r̂/B + 1) + 1), in (0, 1]; the bound is then `quadratic_bound`'s.

    Args:
        empirical_risk: r̂ in [0, 1].
        kl: KL(Q‖P), nats.
        n: Examples.
        delta: δ.
        priors: k.

    Raises:
        InputError: An argument is out of range.
    """
    return 2 / (math.sqrt(2 * empirical_risk / budget(kl, n, delta, priors) + 1) + 1)


def quadratic_bound(empirical_risk: Number, kl: Number, n: int, delta: float, priors: int = 1) -> Number:
    """R ≤ (√(r̂ + B/2) + √(B/2))² (Rivasplata et al. 2019; Pérez-Ortiz et al. 2021, "f_quad"); may be above 1.

    Args:
        empirical_risk: r̂.
        kl: KL(Q‖P), nats.
        n: Examples.
        delta: δ.
        priors: k.

    Raises:
        InputError: An argument is out of range.
    """
    half = budget(kl, n, delta, priors) / 2
    root: Number = (empirical_risk + half) ** 0.5 + half**0.5
    return root * root


def mcallester(empirical_risk: Number, kl: Number, n: int, delta: float, priors: int = 1) -> Number:
    """R ≤ r̂ + √(B/2), with Maurer's constant; may be above 1.

    Args:
        empirical_risk: r̂.
        kl: KL(Q‖P), nats.
        n: Examples.
        delta: δ.
        priors: k.

    Raises:
        InputError: An argument is out of range.
    """
    root: Number = (budget(kl, n, delta, priors) / 2) ** 0.5
    return empirical_risk + root


def monte_carlo_upper(total: float, draws: int, delta: float) -> float:
    """An upper limit of R̂_S(Q) from a Monte-Carlo estimate of it: kl⁻¹(total/M, ln(2/δ')/M).

    The M losses have to be independent and in [0, 1]; their expectations may differ, as those of different examples do, as
    long as these average to R̂_S(Q) (Hoeffding 1963, theorem 1). So one weight draw an example makes M = n.

    Args:
        total: The sum of the losses.
        draws: M, at least 1.
        delta: The probability δ' in (0, 1) with which the limit may fail.

    Raises:
        InputError: An argument is out of range.
    """
    require_level(delta, "delta_monte_carlo")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise InputError(f"the number of draws must be a positive integer, but it is {draws!r}")
    if not 0 <= total <= draws:
        raise InputError(f"{draws} losses in [0, 1] cannot sum to {total}")
    return float(upper_inverse(total / draws, math.log(2 / delta) / draws))


def require_level(delta: float, name: str) -> None:
    """Refuse what is no probability of failure.

    Raises:
        InputError: It is not a number strictly between 0 and 1.
    """
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
        raise InputError(f"{name} must be a probability between 0 and 1, but it is {delta!r}")
