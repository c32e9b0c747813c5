"""Where to draw the line: how many of the safest held-out examples a rule may answer, for a stated risk.

Held-out examples are sorted by score, the safest first, and "rank m" stands for answering the m safest. What is proved
about the ranks that come out is in ``docs/decision.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stfbnn.decision.bounds import Floats, PValues, least_rejectable


@dataclass(frozen=True)
class Certified:
    """A rank that passed.

    Attributes:
        rank: How many of the safest held-out examples are answered; 0 where nothing could be certified.
        level: Of its test, a part of 1 − confidence; 0 where nothing could be certified.
    """

    rank: int
    level: float


def starts(count: int, max_risk: float, confidence: float) -> list[tuple[int, float]]:
    """Where sequences of tests start, and at which level each is run: known before any score or label is.

    The j-th starts at rank n/2^j with the share 3/4^j of 1 − confidence; these sum to no more than 1. Those that could not
    reject anything, even without errors, are left out; the first then starts where it can. The shares are fixed, so that a rule
    for errors never answers less when a higher risk or a lower confidence is asked for.

    Args:
        count: Held-out examples n.
        max_risk: In (0, 1).
        confidence: In (0, 1).

    Returns:
        Ranks, at least 1 and below n, and levels; none where there are too few examples.
    """
    found = []
    share = (1 - confidence) * 3 / 4
    rank = max(-(-count // 2), least_rejectable(max_risk, share))
    while least_rejectable(max_risk, share) <= rank < count:
        found.append((rank, share))
        rank, share = rank // 2, share / 4
    return found


def fewest_for_selective(max_risk: float, confidence: float) -> int:
    """Held-out examples without which `certify` could not certify anything, even if the network made no error."""
    return least_rejectable(max_risk, (1 - confidence) * 3 / 4) + 1


def fewest_for_marginal(max_risk: float) -> int:
    """The same for `control_marginal`: the smallest n with 1 ≤ max_risk·(n + 1)."""
    fewest = max(1, int(1 / max_risk) - 2)
    while max_risk * (fewest + 1) < 1:
        fewest += 1
    return fewest


def certify(
    scores: Floats, losses: Floats, max_risk: float, confidence: float, p_values: PValues, seed: int = 0
) -> Certified:
    """The largest rank whose selective risk is certified, by fixed-sequence tests from several starts.

    From each start the hypotheses "the risk among the answered is above ``max_risk``" are tested rank by rank, each at the
    sequence's full level, until the first that is not rejected. Every rank is tested, also within ties, whose order is
    drawn: the proof needs that; but only a rank between ties, after the start, can be chosen.

    Args:
        scores: Of n held-out examples, the lower the safer.
        losses: Of the same, in [0, 1].
        max_risk: In (0, 1).
        confidence: In (0, 1).
        p_values: Of the hypothesis, from sums of losses.
        seed: Of the order within ties.
    """
    order, between = _sorted(scores, seed)
    sums, count = np.cumsum(losses[order]), len(scores)
    best = Certified(0, 0.0)
    for start, level in starts(count, max_risk, confidence):
        ranks = np.arange(start, count + 1)
        failed = p_values(sums[start - 1 :], ranks, max_risk) > level
        end = start + int(failed.argmax()) if failed.any() else count + 1
        # Ranks start, …, end − 1 passed.
        eligible = start + 1 + np.flatnonzero(between[start : end - 1])
        if eligible.size and eligible[-1] > best.rank:
            best = Certified(int(eligible[-1]), level)
    return best


def control_marginal(scores: Floats, losses: Floats, max_risk: float) -> int:
    """The largest rank m between ties with (losses of the m safest + 1) / (n + 1) ≤ max_risk; 0 where there is none.

    Conformal risk control (Angelopoulos et al., arXiv 2208.02814) of loss·1(answered), which grows with the threshold.

    Args:
        scores: Of n held-out examples, the lower the safer.
        losses: Of the same, in [0, 1].
        max_risk: In (0, 1).
    """
    order, between = _sorted(scores, 0)
    allowed = np.cumsum(losses[order]) + 1 <= max_risk * (len(scores) + 1)
    passed = np.flatnonzero(between & allowed)
    return int(passed[-1]) + 1 if passed.size else 0


def _sorted(scores: Floats, seed: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The order from the safest on, ties in an order drawn at random, and whether rank i + 1 ends a tie."""
    # Not by the order of the data: those of one class may come together.
    drawn = np.random.default_rng(seed).permutation(len(scores))
    order = np.lexsort((drawn, scores))
    return order, np.append(np.diff(scores[order]) > 0, True)
