"""How good a method is after how much time: what the runs of several lengths say.

Every point is a whole run of its own length, with its own schedule, scored on the held-out examples as everything is chosen:
with its best predictive temperature, or for numbers with its best noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stfbnn.benchmark.records import Candidate, Record
from stfbnn.benchmark.statistics import time_to_reach

TOLERANCE = 0.002
"""Nats by which a run may miss the held-out negative log density of a converged one."""

Course = list[tuple[float, float]]
"""Of runs: seconds, and the held-out negative log density after them."""


def course_of(record: Record) -> Course:
    """The runs of a record, ordered by time; empty where there are none."""
    points = [(one.seconds, held_out_score(one)) for one in record.course]
    return sorted((seconds, score) for seconds, score in points if score is not None)


def held_out_score(candidate: Candidate) -> float | None:
    """What candidates are compared by: the held-out negative log density, with a predictive temperature where there is one."""
    scaled = candidate.held_out_nll_scaled
    return candidate.held_out_nll if scaled is None else scaled


@dataclass(frozen=True)
class Converged:
    """What a method comes to, and how soon.

    Attributes:
        score: Held-out negative log density of its longest run.
        seconds: Until it was there but for `TOLERANCE`.
    """

    score: float
    seconds: float


def converged(course: Course) -> Converged | None:
    """When a method has converged; None where no run tells."""
    if not course:
        return None
    score = course[-1][1]
    seconds = time_to_reach(course, score + TOLERANCE)
    # The longest run itself is there.
    return Converged(score, course[-1][0] if seconds is None else seconds)


@dataclass(frozen=True)
class Race:
    """How much longer others take to get as far, seed by seed.

    Attributes:
        ratios: Seconds of the fastest of the others over ours; where none gets there, the longest of their runs over ours.
        reached: On how many seeds one of them gets there.
    """

    ratios: tuple[float, ...]
    reached: int


def race(ours: Iterable[Record], others: Sequence[Record]) -> Race | None:
    """Compare the time to our converged held-out score; None where a seed has no runs to compare.

    Args:
        ours: One task's records of one method.
        others: Of the same task, all methods that run against it.
    """
    ratios, reached = [], 0
    for record in ours:
        goal = converged(course_of(record))
        courses = [course for other in others if other.seed == record.seed and (course := course_of(other))]
        if goal is None or not courses or goal.seconds <= 0:
            return None
        times = [time_to_reach(course, goal.score + TOLERANCE) for course in courses]
        there = [time for time in times if time is not None]
        reached += bool(there)
        ratios.append((min(there) if there else max(course[-1][0] for course in courses)) / goal.seconds)
    return Race(tuple(ratios), reached) if ratios else None
