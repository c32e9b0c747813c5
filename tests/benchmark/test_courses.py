"""How soon a method is as good as it gets, and how much longer others take."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_records import record

from stfbnn.benchmark.courses import TOLERANCE, converged, course_of, race

SCORES = st.floats(0.0, 2.0)


def test_a_course_is_ordered_by_time_and_leaves_out_what_has_no_score() -> None:
    one = record("stf-bnn", course=[(4.0, 0.3), (1.0, 0.5), (2.0, 0.4)])
    assert course_of(one) == [(1.0, 0.5), (2.0, 0.4), (4.0, 0.3)]
    assert course_of(record("stf-bnn")) == []
    assert converged([]) is None


@given(st.lists(SCORES, min_size=1, max_size=6))
def test_convergence_is_the_first_time_within_the_tolerance_of_the_longest_run(scores: list[float]) -> None:
    course = [(float(place + 1), score) for place, score in enumerate(scores)]
    found = converged(course)
    assert found is not None
    assert found.score == scores[-1]
    goal = scores[-1] + TOLERANCE
    first = next(place for place, score in enumerate(scores) if score <= goal)
    assert first <= found.seconds <= first + 1
    # On the line between both runs it is just there.
    if first and math.isfinite(scores[first - 1]):
        share = found.seconds - first
        assert scores[first - 1] + share * (scores[first] - scores[first - 1]) == pytest.approx(goal, abs=1e-9)


def test_a_race_needs_runs_of_both_on_every_seed() -> None:
    ours = [record("stf-bnn", seed=seed, course=[(1.0, 0.3)]) for seed in (0, 1)]
    theirs = [record("bnn", seed=seed, course=[(2.0, 0.4), (4.0, 0.2)]) for seed in (0, 1)]
    found = race(ours, theirs)
    assert found is not None
    assert found.reached == 2
    assert found.ratios == pytest.approx([2 + 2 * (0.4 - 0.302) / 0.2] * 2)
    assert race(ours, theirs[:1]) is None
    assert race([*ours, record("stf-bnn", seed=2)], theirs) is None
    assert race([], theirs) is None
