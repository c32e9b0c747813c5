"""Records made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from stfbnn.benchmark.records import Candidate, Cost, Kind, Record, Row


def record(
    method: str = "network",
    task: str = "digits",
    seed: int = 0,
    nll: float = 0.5,
    *,
    kind: Kind = "classification",
    scaled: float | None = None,
    seconds: float = 1.0,
    search: float | None = None,
    peak: int | None = 1000,
    parameters: int = 100,
    failed: str | None = None,
    course: Sequence[tuple[float, float]] = (),
) -> Record:
    """A record whose figures are those that a test needs; the course's points are seconds and held-out scores."""
    settings = {"task": {"name": task}, "budget": 1}
    common = {"task": task, "kind": kind, "seed": seed, "method": method, "environment": {}, "settings": settings}
    if failed:
        return Record(**common, failed=failed)
    name = "nll" if kind == "classification" else "mean_log_density"
    sign = 1 if kind == "classification" else -1
    return Record(
        **common,
        candidates=(Candidate({"setting": 1}, nll, scaled, None if scaled is None else 1.5, seconds),),
        chosen=(0, None if scaled is None else 0),
        cost=Cost(10.0, seconds, seconds if search is None else search, 0.1, 2.0, peak, parameters, 8 * parameters),
        raw=Row({name: sign * nll, "accuracy": 0.9}),
        scaled=None if scaled is None else Row({name: sign * scaled, "accuracy": 0.9}, tau=1.5),
        course=tuple(
            Candidate({"epochs": place + 1}, score + 0.01, score, 1.5, spent)
            for place, (spent, score) in enumerate(course)
        ),
    )
