"""The ROC curve of a membership score, and the greatest TPR − FPR on it, with intervals that allow for choosing the threshold.

An example is taken for a member where its score is at least the threshold. Only thresholds that occur are looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stfbnn.privacy.intervals import Estimated, Floats, identical, rate_difference

_AT_ONCE = 50_000
"""Numbers drawn in one step of the bootstrap."""


@dataclass(frozen=True, eq=False)
class Roc:
    """The points of a ROC curve, one for each threshold that occurs, from none taken for a member to all.

    Attributes:
        fpr: Share of the others at or above each threshold, (T + 1,), from 0 to 1.
        tpr: Share of the members, (T + 1,).
        thresholds: (T + 1,), falling; the first one is infinite.
    """

    fpr: Tensor
    tpr: Tensor
    thresholds: Tensor

    def thinned(self, count: int = 200) -> Roc:
        """Not many more than ``count`` of these points, as evenly as they lie on a logarithmic axis; first and last included.

        A point chosen has the highest TPR of its FPR.
        """
        positive = self.fpr[self.fpr > 0]
        wished = torch.logspace(float(positive[0].log10()), 0, count, dtype=torch.float64)
        wished = torch.cat([torch.zeros(1, dtype=torch.float64), wished * (1 + 1e-12)])
        last = torch.searchsorted(self.fpr, wished, right=True) - 1
        chosen = sorted({0, *last.tolist()})
        return Roc(self.fpr[chosen], self.tpr[chosen], self.thresholds[chosen])


@dataclass(frozen=True, eq=False)
class Counts:
    """How many score at least as high as each distinct score.

    Attributes:
        thresholds: The distinct scores, (T,), falling.
        members: How many members score at least that, (T,).
        others: How many others, (T,).
    """

    thresholds: Floats
    members: NDArray[np.int64]
    others: NDArray[np.int64]

    @classmethod
    def of(cls, inside: Floats, outside: Floats) -> Counts:
        """Count the scores of members, (m,), and of others, (n,)."""
        levels, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
        ahead = [
            np.bincount(part, minlength=len(levels))[::-1].cumsum()
            for part in (place[: len(inside)], place[len(inside) :])
        ]
        return cls(levels[::-1], ahead[0], ahead[1])

    def gains(self) -> Floats:
        """TPR − FPR at each threshold."""
        gains: Floats = self.members / self.members[-1] - self.others / self.others[-1]
        return gains

    def roc(self) -> Roc:
        """The same as rates."""
        return Roc(
            torch.from_numpy(np.r_[0.0, self.others / self.others[-1]]),
            torch.from_numpy(np.r_[0.0, self.members / self.members[-1]]),
            torch.from_numpy(np.r_[np.inf, self.thresholds]),
        )


def greatest_advantage(counts: Counts, confidence: float, bootstrap: int, random: np.random.Generator) -> Estimated:
    """The greatest TPR − FPR, and a band that holds the whole curve of it.

    The quantile of sup |curve of a resample − curve| bounds how far the greatest value of the true curve is from that of the
    observed one, wherever either is: no threshold is taken as given.

    Args:
        counts: The observed curve.
        confidence: Coverage.
        bootstrap: Resamples.
        random: What they are drawn with.
    """
    curve = counts.gains()
    # Examples as the places of their thresholds, members and others.
    groups = [np.repeat(np.arange(len(curve)), np.diff(ahead, prepend=0)) for ahead in (counts.members, counts.others)]
    distances = []
    for rows in _blocks(bootstrap, max(1, _AT_ONCE // sum(map(len, groups)))):
        members, others = (_resampled(group, rows, len(curve), random) for group in groups)
        distances.append(np.abs(members - others - curve).max(axis=1))
    # Where all scores are one the resamples are too.
    unseen = 1 - identical(min(map(len, groups)), confidence)
    reach = max(float(np.quantile(np.concatenate(distances), confidence)), unseen)
    value = max(0.0, float(curve.max()))
    return Estimated(value, max(0.0, value - reach), min(1.0, value + reach))


def held_out_advantage(inside: Floats, outside: Floats, confidence: float, random: np.random.Generator) -> Estimated:
    """TPR − FPR at the best threshold of one half, measured on the other, both ways round.

    Args:
        inside: Scores of at least two members.
        outside: Scores of at least two others.
        confidence: Coverage.
        random: What divides them.
    """
    halves = [
        (group[: len(group) // 2], group[len(group) // 2 :]) for group in map(random.permutation, (inside, outside))
    ]
    hits = [0, 0]
    for chosen, measured in ((0, 1), (1, 0)):
        counts = Counts.of(halves[0][chosen], halves[1][chosen])
        gains = counts.gains()
        # Where no threshold does better than none, nobody is taken for a member.
        threshold = counts.thresholds[gains.argmax()] if gains.max() > 0 else math.inf
        for kind in (0, 1):
            hits[kind] += int((halves[kind][measured] >= threshold).sum())
    return rate_difference((hits[0], hits[1]), (len(inside), len(outside)), confidence)


def _blocks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _resampled(places: NDArray[np.int64], rows: int, levels: int, random: np.random.Generator) -> Floats:
    """Shares at or above each threshold in ``rows`` resamples of a group, (rows, levels)."""
    drawn = places[random.integers(len(places), size=(rows, len(places)))] + levels * np.arange(rows)[:, None]
    counted = np.bincount(drawn.ravel(), minlength=rows * levels).reshape(rows, levels)
    shares: Floats = counted.cumsum(axis=1) / len(places)
    return shares
