"""How well a membership score tells members from others: areas, advantages, and rates of true positives at few false ones.

Higher scores mean "member" throughout, and an example is taken for a member where its score is at least the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite, as_labels, as_log_probabilities
from stfbnn.privacy.intervals import Estimated, Floats, area, mean_difference, rate, rate_difference
from stfbnn.privacy.roc import Counts, Roc, greatest_advantage, held_out_advantage
from stfbnn.privacy.scores import as_membership, correctness_score, loss_score
from stfbnn.randomness import derive_seed

RESOLVING = 10
"""A false-positive rate is resolved where it amounts to so many of the others."""


@dataclass(frozen=True)
class OperatingPoint:
    """What an attacker gets who accepts few false alarms.

    Attributes:
        limit: The false-positive rate that must not be exceeded.
        threshold: The lowest score that occurs and keeps it; None where even the highest one does not.
        tpr: Share of the members found, with Clopper and Pearson's interval *given the threshold*.
        fpr: Share of the others taken for members, likewise: how sure it is that the limit is kept.
        resolved: Whether there are at least ``RESOLVING / limit`` others. If not, the threshold hangs on a few
            of them, and ``tpr`` says more of these than of the attack.
    """

    limit: float
    threshold: float | None
    tpr: Estimated
    fpr: Estimated
    resolved: bool


@dataclass(frozen=True, eq=False)
class MembershipFigures:
    """All figures of one attack on one model.

    Attributes:
        members: How many members were attacked.
        non_members: How many others.
        confidence: Coverage of every interval, each for itself.
        auc: Probability that a member scores above another; .5 is chance.
        advantage: max (TPR − FPR) over thresholds. The threshold is chosen on the data it is measured on, which flatters; the
            interval is a band around the whole curve, from the bootstrap, and so allows for the choice.
        held_out_advantage: TPR − FPR at a threshold chosen on one half and measured on the other, both ways round: what an
            attacker gets. It can be negative.
        tpr_at: Operating points, in the order of the rates asked for.
        roc: The curve.
    """

    members: int
    non_members: int
    confidence: float
    auc: Estimated
    advantage: Estimated
    held_out_advantage: Estimated
    tpr_at: tuple[OperatingPoint, ...]
    roc: Roc

    @property
    def balanced_accuracy(self) -> Estimated:
        """Share of right answers, members and others counting alike, at the thresholds of ``held_out_advantage``."""
        return self.held_out_advantage.shifted(lambda advantage: (1 + advantage) / 2)

    def notes(self) -> tuple[str, ...]:
        """What limits the figures, in words."""
        return tuple(
            f"{self.non_members:,} non-members cannot resolve a false-positive rate of {_percent(point.limit)}: that takes "
            f"{math.ceil(RESOLVING / point.limit):,}"
            for point in self.tpr_at
            if not point.resolved
        )

    def table(self, name: str = "attack") -> Table:
        """The figures as one row, for a terminal."""
        return membership_table({name: self})

    def as_dict(self, points: int = 200) -> dict[str, Any]:
        """All figures as plain values, for JSON, with about so many ``points`` of the curve, all of which occur."""
        roc = self.roc.thinned(points)
        return {
            "members": self.members,
            "non_members": self.non_members,
            "confidence": self.confidence,
            "auc": asdict(self.auc),
            "advantage": asdict(self.advantage),
            "held_out_advantage": asdict(self.held_out_advantage),
            "balanced_accuracy": asdict(self.balanced_accuracy),
            "tpr_at": [asdict(point) for point in self.tpr_at],
            "roc": {"fpr": roc.fpr.tolist(), "tpr": roc.tpr.tolist()},
            "notes": list(self.notes()),
        }


def membership_figures(
    scores: ArrayLike,
    member: ArrayLike,
    *,
    fprs: Sequence[float] = (0.01, 0.001),
    confidence: float = 0.95,
    seed: int = 0,
    bootstrap: int = 1000,
) -> MembershipFigures:
    """Measure a membership score.

    Args:
        scores: One an example, higher for members, (N,), finite.
        member: Who was in the training data, (N,) bool; at least two were, and two were not.
        fprs: False-positive rates at which the rate of true positives is told, each in (0, 1).
        confidence: Coverage of the intervals, in (0, 1).
        seed: Of the halves, and of the bootstrap.
        bootstrap: Resamples, at least 100.

    Returns:
        The figures.

    Raises:
        InputError: Scores are not N finite numbers, ``member`` is not N truth values with two of each kind, or a rate or
            number is out of range.
    """
    inside, outside = _groups(scores, member)
    if len(inside) < 2 or len(outside) < 2:
        raise InputError(
            f"membership figures need at least two members and two others, but there are {len(inside)} and {len(outside)}"
        )
    if not 0 < confidence < 1 or not all(0 < limit < 1 for limit in fprs):
        raise InputError(f"confidence and fprs must be in (0, 1), but they are {confidence} and {list(fprs)}")
    if bootstrap < 100:
        raise InputError(f"an interval from the bootstrap needs at least 100 resamples, not {bootstrap}")
    random = np.random.default_rng(derive_seed(seed, "membership figures"))
    counts = Counts.of(inside, outside)
    return MembershipFigures(
        members=len(inside),
        non_members=len(outside),
        confidence=confidence,
        auc=area(inside, outside, confidence),
        advantage=greatest_advantage(counts, confidence, bootstrap, random),
        held_out_advantage=held_out_advantage(inside, outside, confidence, random),
        tpr_at=tuple(_operating_point(counts, limit, confidence) for limit in fprs),
        roc=counts.roc(),
    )


def membership_table(figures: Mapping[str, MembershipFigures], title: str = "") -> Table:
    """One row an attack (or a method), for a terminal; what cannot be resolved is marked by a question mark.

    Raises:
        InputError: There are no rows, or their false-positive rates differ.
    """
    limits = {tuple(point.limit for point in one.tpr_at) for one in figures.values()}
    if len(limits) != 1:
        raise InputError(f"a table needs figures at the same false-positive rates, but there are {sorted(limits)}")
    table = Table(title=title or None, title_justify="left")
    heads = ("AUC", "advantage", "held out", *(f"TPR at {_percent(limit)} FPR" for limit in limits.pop()))
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    for name, one in figures.items():
        rates = [point.tpr.show() + ("" if point.resolved else " ?") for point in one.tpr_at]
        table.add_row(name, one.auc.show(), one.advantage.show(), one.held_out_advantage.show(), *rates)
    return table


@dataclass(frozen=True)
class ClassFigures:
    """One class: how well its members are told, and how differently the model treats them; None where it cannot be told.

    Attributes:
        label: The class.
        members: How many of its examples were in the training data.
        non_members: How many were not.
        auc: Of the score, within the class.
        advantage: The held-out one, within the class.
        score_gap: Mean score of members less that of others, with Welch's interval.
        accuracy_gap: Accuracy on members less that on others, with Newcombe's interval.
        loss_gap: Mean −log p_y on others less that on members, with Welch's interval; positive where members fit better.
    """

    label: int
    members: int
    non_members: int
    auc: Estimated | None
    advantage: Estimated | None
    score_gap: Estimated | None
    accuracy_gap: Estimated | None
    loss_gap: Estimated | None


@dataclass(frozen=True)
class ByClass:
    """The member gap of each class.

    Each interval is for itself: of ten classes that do not differ, one or two may well look as if they did.

    Attributes:
        classes: One entry a class that occurs, in their order.
        confidence: Coverage of each interval.
    """

    classes: tuple[ClassFigures, ...]
    confidence: float

    def table(self, title: str = "") -> Table:
        """One row a class, for a terminal; a dash where nothing can be told."""
        table = Table(title=title or None, title_justify="left")
        for head in ("class", "members", "others", "AUC", "advantage", "score gap", "accuracy gap", "loss gap"):
            table.add_column(head, justify="right")
        for one in self.classes:
            shown = (one.auc, one.advantage, one.score_gap, one.accuracy_gap, one.loss_gap)
            cells = ["–" if figure is None else figure.show() for figure in shown]
            table.add_row(str(one.label), f"{one.members:,}", f"{one.non_members:,}", *cells)
        return table

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        return {"confidence": self.confidence, "classes": [asdict(one) for one in self.classes]}


def by_class(
    scores: ArrayLike,
    member: ArrayLike,
    labels: ArrayLike,
    *,
    log_probs: ArrayLike | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> ByClass:
    """Measure a membership score, and the member gap, in each class.

    Args:
        scores: One an example, higher for members, (N,), finite.
        member: Who was in the training data, (N,) bool.
        labels: Classes, (N,).
        log_probs: log p(k | x) of the attacked predictive, (N, K), for the gaps of accuracy and loss; None for without.
        confidence: Coverage of each interval, in (0, 1).
        seed: Of the halves for the held-out advantage.

    Returns:
        The figures of each class that occurs; those of a class with fewer than two members or two others are None.

    Raises:
        InputError: Shapes do not fit, numbers are not finite, labels are no classes, or ``confidence`` is out of range.
    """
    values = as_finite(scores, "membership scores")
    _groups(values, member)
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1), but it is {confidence}")
    chosen = as_membership(member, (len(values),))
    highest = (
        int(as_finite(labels, "labels").max()) if log_probs is None else as_log_probabilities(log_probs).shape[1] - 1
    )
    classes = as_labels(labels, len(values), highest + 1)
    right = None if log_probs is None else correctness_score(log_probs, classes)
    fits = None if log_probs is None else loss_score(log_probs, classes)
    random = np.random.default_rng(derive_seed(seed, "membership by class"))
    found = []
    for label in sorted(set(classes.tolist())):
        inside, outside = (classes == label) & chosen, (classes == label) & ~chosen
        counts = int(inside.sum()), int(outside.sum())
        auc = advantage = score_gap = accuracy_gap = loss_gap = None
        if min(counts) >= 2:
            groups = values[inside].numpy(), values[outside].numpy()
            auc, score_gap = area(*groups, confidence), mean_difference(*groups, confidence)
            advantage = held_out_advantage(*groups, confidence, random)
            if right is not None and fits is not None:
                hits = int(right[inside].sum()), int(right[outside].sum())
                accuracy_gap = rate_difference(hits, counts, confidence)
                loss_gap = mean_difference(fits[inside].numpy(), fits[outside].numpy(), confidence)
        found.append(ClassFigures(label, *counts, auc, advantage, score_gap, accuracy_gap, loss_gap))
    return ByClass(tuple(found), confidence)


def _groups(scores: ArrayLike, member: ArrayLike) -> tuple[Floats, Floats]:
    values = as_finite(scores, "membership scores")
    if values.ndim != 1:
        raise InputError(f"membership scores must be one number an example, but have shape {tuple(values.shape)}")
    chosen = as_membership(member, (len(values),))
    return values[chosen].numpy(), values[~chosen].numpy()


def _operating_point(counts: Counts, limit: float, confidence: float) -> OperatingPoint:
    members, others = int(counts.members[-1]), int(counts.others[-1])
    kept = int((counts.others / others <= limit).sum())
    found, false = (int(counts.members[kept - 1]), int(counts.others[kept - 1])) if kept else (0, 0)
    return OperatingPoint(
        limit=limit,
        threshold=float(counts.thresholds[kept - 1]) if kept else None,
        tpr=rate(found, members, confidence),
        fpr=rate(false, others, confidence),
        resolved=others * limit >= RESOLVING * (1 - 1e-12),
    )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
