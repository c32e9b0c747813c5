"""Are the attacks themselves to be trusted? What gives away gradients that lead nowhere, and attacks that are too weak.

The checks are those of Athalye, Carlini and Wagner (2018, arXiv 1802.00420, section 3.1) and of Carlini et al. (2019, arXiv
1902.06705), and for what draws at random of Tramèr et al. (2020, arXiv 2002.08347). That all pass is no proof that the
accuracies under attack are right; that one fails means that they are likely too high.

"Significantly more" is said of the same examples: of those that only one of two attacks fools, too many are fooled by the one
for a fair coin (McNemar's test in its exact form), at ``LEVEL``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from scipy.stats import binomtest
from torch import Tensor

from stfbnn.draws import chunk_rows
from stfbnn.robustness.gradient import input_gradient
from stfbnn.robustness.result import DrawsCurve, Finding, Kind, Outcome, show_epsilon
from stfbnn.robustness.victim import Victim

LEVEL = 0.01
"""Of every test."""

GRADIENT_SHARE = 0.01
"""Rows whose gradient is zero or not finite, at the inputs themselves, as a share of all."""

LEFT_RIGHT = 0.01
"""The accuracy that an unbounded attack may leave: with the whole space to choose from, there is always a wrong answer."""


def fools_more(one: Sequence[bool], other: Sequence[bool]) -> float:
    """How likely so large a lead is if both attacks are as good: P(Bin(b + c, ½) ≥ b), one-sided.

    Args:
        one: For each example whether the one attack fools it.
        other: The same of the other; b are those that only the one fools, c those that only the other does.
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    if not only_one:
        return 1.0
    return float(binomtest(only_one, only_one + only_other, 0.5, alternative="greater").pvalue)


def falls_no_more(before: Outcome, after: Outcome) -> bool:
    """Whether the accuracy falls by no more than a standard error of the difference if there is none, √(b + c) / N.

    b are the examples that only the one attack fools, c those that only the other does, as in McNemar's test.
    """
    lost = sum(new and not old for old, new in zip(before.fooled, after.fooled, strict=True))
    won = sum(old and not new for old, new in zip(before.fooled, after.fooled, strict=True))
    return lost - won <= math.sqrt(lost + won)


def one_step_beats_many(outcomes: Sequence[Outcome]) -> Finding:
    """Does one step fool more than many, which could have begun with it?"""
    return _lead(
        "one-step-beats-many",
        outcomes,
        ("one step",),
        "with one step",
        "the best with many",
        "many steps that do worse than one follow gradients that lead nowhere: take smaller or larger steps, another loss, or "
        "random starts",
    )


def black_box_beats_white_box(outcomes: Sequence[Outcome]) -> Finding:
    """Does an attack without the victim's gradients fool more than the best with them?"""
    return _lead(
        "black-box-beats-white-box",
        outcomes,
        ("black box",),
        "without its gradients",
        "the best with them",
        "the victim's gradients are masked or the attacks that use them too weak: their figures are too high",
    )


def gradients_exist(victim: Victim, inputs: Tensor, targets: Tensor) -> Finding:
    """Is there a gradient at the inputs themselves, of the deployed members' mean −log p(target)?

    Args:
        victim: Who is attacked.
        inputs: (N, …) in its space.
        targets: (N,).
    """
    members = victim.deployed()
    zero = broken = 0
    rows = chunk_rows(inputs, victim.device)
    for chunk, labels in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
        given, labelled = chunk.detach().to(victim.device), labels.to(victim.device).long()
        flat = input_gradient(victim, given, labelled, members)[0].flatten(1)
        finite = flat.isfinite().all(dim=1)
        broken += int((~finite).sum())
        zero += int((finite & (flat == 0).all(dim=1)).sum())
    share = (zero + broken) / len(inputs)
    seen = (
        f"at {zero} of {len(inputs)} inputs the loss has no slope in any direction, and at {broken} none that is finite"
    )
    if share > GRADIENT_SHARE:
        seen += (
            "; attacks that follow gradients cannot set out from there (rounding, saturation of a softmax, or steps that have "
            "no derivative): what they leave right is no robustness"
        )
    numbers = {"zero": float(zero), "not_finite": float(broken), "share": share}
    return Finding("no-gradients", share <= GRADIENT_SHARE, numbers, seen)


def unbounded_attack(outcome: Outcome | None) -> Finding:
    """Does an attack that may change everything fool (almost) every example?

    Args:
        outcome: Of an attack whose ε is the whole space; None where there was none with gradients.
    """
    name = "unbounded-attack-fails"
    if outcome is None:
        return Finding(name, None, {}, "there is no attack that follows the victim's gradients")
    count = len(outcome.fooled)
    left = count - sum(outcome.fooled)
    p_value = float(binomtest(left, count, LEFT_RIGHT, alternative="greater").pvalue)
    passed = p_value > LEVEL
    seen = f"{outcome.attack} may change everything and leaves {left} of {count} right"
    if not passed:
        seen += ", though with the whole space to choose from none should be: the attack does not find what is there"
    return Finding(name, passed, {"accuracy": outcome.accuracy.value, "p_value": p_value}, seen)


def more_draws(curve: DrawsCurve | None, used: int | None) -> Finding:
    """Do more draws in a gradient fool more than as many as the attacks of the table took?

    Args:
        curve: The attack with more and more draws; None where nothing is drawn.
        used: The most draws of an attack in the table; None where none of them draws its own.
    """
    name = "more-draws-fool-more"
    if curve is None or used is None:
        missing = "the victim draws nothing" if curve is None else "no attack draws members of its own"
        return Finding(name, None, {}, missing)
    first, last = curve.outcomes[0], curve.outcomes[-1]
    # The curve may stop below the table's count, or leave it out.
    place = max((index for index, count in enumerate(curve.counts) if count <= used), default=0)
    held = curve.outcomes[place]
    p_value = fools_more(last.fooled, held.fooled)
    passed = p_value > LEVEL
    numbers = {
        "first_draws": float(curve.counts[0]),
        "first_accuracy": first.accuracy.value,
        "held_draws": float(curve.counts[place]),
        "held_accuracy": held.accuracy.value,
        "most_draws": float(curve.counts[-1]),
        "most_accuracy": last.accuracy.value,
        "p_value": p_value,
    }
    seen = (
        f"the attacks average at most {used} draw{'s' if used > 1 else ''} a step; at ε = {show_epsilon(curve.epsilon)} "
        f"{_right(first)} right with {curve.counts[0]}, {_right(held)} with {curve.counts[place]} and {_right(last)} with "
        f"{curve.counts[-1]}"
    )
    if not passed:
        enough = (
            f"from {curve.needed} on it no longer falls"
            if curve.needed
            else f"at {curve.counts[-1]} it was still falling"
        )
        seen += f": part of the robustness is noise that the attack did not average out; take more draws ({enough})"
    return Finding(name, passed, numbers, seen)


def falls_with_epsilon(outcomes: Sequence[Outcome]) -> Finding:
    """Does every attack fool more where it may change more?

    Attacks of one step are left out: a long step may overshoot on any network.
    """
    name = "accuracy-rises-with-epsilon"
    judged = [one for one in outcomes if one.kind != "one step"]
    pairs = [
        (fools_more(small.fooled, large.fooled), small, large)
        for small in judged
        for large in judged
        if small.attack == large.attack and small.epsilon < large.epsilon
    ]
    if not pairs:
        return Finding(name, None, {}, "no attack of several steps was made at two values of ε")
    p_value, small, large = min(pairs, key=lambda pair: pair[0])
    numbers = {
        "small_epsilon": small.epsilon,
        "small_accuracy": small.accuracy.value,
        "large_epsilon": large.epsilon,
        "large_accuracy": large.accuracy.value,
        "p_value": p_value,
    }
    if p_value > LEVEL:
        return Finding(name, True, numbers, "no attack fools significantly fewer examples where it may change more")
    seen = (
        f"{small.attack} leaves {_right(small)} right at ε = {show_epsilon(small.epsilon)} but {_right(large)} at ε = "
        f"{show_epsilon(large.epsilon)}, though what it found within the smaller lies within the larger: its steps do not fit ε"
    )
    return Finding(name, False, numbers, seen)


def strongest(outcomes: Iterable[Outcome], kinds: Sequence[Kind]) -> Outcome | None:
    """The attack of these kinds that fools most; of equals the first; None where there is none."""
    return max((one for one in outcomes if one.kind in kinds), key=lambda one: sum(one.fooled), default=None)


def _lead(name: str, outcomes: Sequence[Outcome], kinds: Sequence[Kind], led: str, held: str, meaning: str) -> Finding:
    """Is an attack of these kinds ahead of the best with many steps, at any ε?"""
    # Only what follows the victim's gradients for many steps is held to be the strong attack.
    compared = [
        (fools_more(one.fooled, best.fooled), one, best)
        for one in outcomes
        if one.kind in kinds
        and (best := strongest([other for other in outcomes if other.epsilon == one.epsilon], ["many steps"]))
    ]
    if not compared:
        return Finding(name, None, {}, f"there is no attack {led}, or none of many steps to hold it against")
    p_value, one, best = min(compared, key=lambda entry: entry[0])
    numbers = {
        "epsilon": one.epsilon,
        "accuracy": one.accuracy.value,
        "held_against": best.accuracy.value,
        "p_value": p_value,
    }
    if p_value > LEVEL:
        return Finding(name, True, numbers, f"no attack {led} fools significantly more than {held}")
    seen = (
        f"at ε = {show_epsilon(one.epsilon)} the attack {led} ({one.attack}) leaves {_right(one)} right, {held} "
        f"({best.attack}) {_right(best)}: {meaning}"
    )
    return Finding(name, False, numbers, seen)


def _right(outcome: Outcome) -> str:
    return f"{100 * outcome.accuracy.value:.1f} %"
