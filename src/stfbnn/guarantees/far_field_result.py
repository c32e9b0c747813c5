"""How sure a network is far from the data: limits with their bounds, direction by direction, and what that says in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from stfbnn.decision.bounds import interval, upper_limit
from stfbnn.errors import InputError
from stfbnn.files import plain

Kind = Literal["data", "random"]
"""Directions that the caller gave, or random ones."""

CONFIDENCE = 0.95
"""Of the intervals of shares."""


@dataclass(frozen=True)
class Direction:
    """One ray from the origin of the network's input space.

    Attributes:
        kind: Where it comes from.
        counts: n_k for each class k: the draws of weights that are sure of it in the limit.
        ties: n_0, the draws whose limit is tied or zero, so that it says nothing.
        bound: What the averaged confidence's limit exceeds with a probability of at most δ over the draws.
        trained: The class that the trained network becomes sure of, its confidence tending to 1; None if its limit is tied.
        mean: The same at the posterior mean.
    """

    kind: Kind
    counts: tuple[int, ...]
    ties: int
    bound: float
    trained: int | None
    mean: int | None

    @property
    def limit(self) -> float:
        """max_k (n_k + n_0)/S: the estimate of what the averaged confidence's limit is at most."""
        return (max(self.counts) + self.ties) / (sum(self.counts) + self.ties)

    @property
    def low(self) -> float:
        """max_k n_k/S: the estimate of what it is at least; equal to ``limit`` where no draw is tied."""
        return max(self.counts) / (sum(self.counts) + self.ties)

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing, for all draws agree or are tied."""
        return self.bound >= 1


@dataclass(frozen=True)
class Share:
    """Of directions of one kind, those whose bound is below a threshold.

    Attributes:
        below: Their number.
        count: Of how many.
        low: Lower limit of the interval of Clopper and Pearson (1934) at ``CONFIDENCE`` for the share among all directions of
            which these are a random sample.
        high: Upper limit.
    """

    below: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share."""
        return self.below / self.count

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class FarField:
    """The limit of the averaged predictive's confidence at infinity, for each of some directions.

    Attributes:
        directions: Those that were given, then the random ones.
        draws: S, independent draws of the first layer's weights, the same for all directions.
        level: δ: each direction's bound holds with a probability of at least 1 − δ over the draws.
        threshold: The confidence that a limit is held against.
        check: The largest relative distance of f(αx)/α from its limit at α = 10⁶ where it was checked.
        settings: What was asked for.
    """

    directions: tuple[Direction, ...]
    draws: int
    level: float
    threshold: float
    check: float
    settings: Mapping[str, Any]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of directions that there are."""
        return tuple(dict.fromkeys(one.kind for one in self.directions))

    def of(self, kind: Kind) -> tuple[Direction, ...]:
        """The directions of one kind.

        Raises:
            InputError: There are none.
        """
        found = tuple(one for one in self.directions if one.kind == kind)
        if not found:
            raise InputError(f"there are no directions of the kind {kind!r}; there are {', '.join(self.kinds)}")
        return found

    def share(self, kind: Kind) -> Share:
        """Directions whose bound is below the threshold.

        Its interval is for directions drawn like these, given the draws of weights. Among the directions of the share at most δ
        of all are expected whose limit is not below the threshold after all.

        Raises:
            InputError: There are no directions of this kind.
        """
        flags = [one.bound < self.threshold for one in self.of(kind)]
        return Share(sum(flags), len(flags), *interval(sum(flags), len(flags), CONFIDENCE, whole=True))

    def table(self) -> Table:
        """A line for each kind of direction, for a terminal; figures are averages over directions."""
        table = Table(
            title=f"Confidence far from the data, {self.draws} draws, δ = {self.level:g}", title_justify="left"
        )
        heads = ("kind", "number", "limit", "bound", "tied draws", "vacuous", f"bound < {self.threshold:g}")
        for head in (*heads, "trained → 1"):
            table.add_column(head, justify="left" if head == "kind" else "right", overflow="fold")
        for kind in self.kinds:
            some = self.of(kind)
            cells = (
                f"{statistics.fmean(one.limit for one in some):.4f}",
                f"{statistics.fmean(one.bound for one in some):.4f}",
                f"{statistics.fmean(one.ties for one in some) / self.draws:.2%}",
                str(sum(one.vacuous for one in some)),
                str(self.share(kind)),
                f"{sum(one.trained is not None for one in some)} of {len(some)}",
            )
            table.add_row(kind, str(len(some)), *cells)
        return table

    def verdict(self) -> str:
        """What was found, in words with the numbers that carry it."""
        return "\n".join(map(self._verdict, self.kinds))

    def _verdict(self, kind: Kind) -> str:
        some = self.of(kind)
        sure, vacuous = sum(one.trained is not None for one in some), sum(one.vacuous for one in some)
        name = "directions from data" if kind == "data" else "random directions"
        limit, bound = (statistics.fmean(getattr(one, figure) for one in some) for figure in ("limit", "bound"))
        said = (
            f"Along {len(some)} {name} the averaged predictive's confidence tends to at most {limit:.3f} on average (bound "
            f"{bound:.3f}, each at level {1 - self.level:g}), that of the trained network to 1 along {sure} of them"
        )
        said += f" and is tied or zero along {len(some) - sure}. " if sure < len(some) else ". "
        said += f"The bound is below {self.threshold:g} along {self.share(kind)} of them"
        if vacuous == len(some):
            return said + ": it is vacuous along all of them, for all draws agree or are tied, and nothing is shown."
        return said + (f"; it is vacuous along {vacuous}, where all draws agree or are tied." if vacuous else ".")

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        directions = [
            {**asdict(one), "limit": one.limit, "low": one.low, "vacuous": one.vacuous} for one in self.directions
        ]
        shares = {kind: {**asdict(self.share(kind)), "value": self.share(kind).value} for kind in self.kinds}
        found: dict[str, Any] = plain(
            {
                "draws": self.draws,
                "level": self.level,
                "threshold": self.threshold,
                "check": self.check,
                "settings": self.settings,
                "shares": shares,
                "directions": directions,
                "verdict": self.verdict(),
            }
        )
        return found


def limit_bound(counts: Sequence[int], ties: int, level: float) -> float:
    """An upper bound of max_k (P_k + P_0), by Clopper and Pearson (1934) for each class and Bonferroni over the K of them.

    Args:
        counts: n_k, independent draws that are sure of class k.
        ties: n_0, those that are tied.
        level: δ, the probability over the draws that the bound is too low.
    """
    draws = sum(counts) + ties
    # The limit rises with the count, so that of the largest is the largest.
    return upper_limit(max(counts) + ties, draws, level / len(counts), whole=True)


@dataclass(frozen=True)
class ConfidenceAlong:
    """Measured confidence at some distances along some directions.

    Attributes:
        distances: Euclidean distances from the origin of the rays, rising.
        averaged: The averaged predictive's confidence, a tuple for each direction with a value for each distance.
        trained: The trained network's, likewise.
        samples: The draws averaged.
    """

    distances: tuple[float, ...]
    averaged: tuple[tuple[float, ...], ...]
    trained: tuple[tuple[float, ...], ...]
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        found: dict[str, Any] = plain(asdict(self))
        return found
