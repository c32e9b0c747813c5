"""What the paper claims, one by one, with our figures beside it and a plain verdict that follows from them by rule."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stfbnn.benchmark.courses import TOLERANCE, converged, course_of, held_out_score, race
from stfbnn.benchmark.records import Cost, Record, Row, succeeded
from stfbnn.report.verdicts import Claim, Verdict

OURS, MIXTURE, NETWORK = "stf-bnn", "stf-bnn-mixture", "network"
VANILLA = ("bnn-scratch", "bnn-scratch-natural", "bnn-pretrained", "bnn-pretrained-natural")
"""The fully Bayesian networks, which the paper compares with."""

ONE_FIT, DEFAULT_CALL, FASTER = 0.10, 0.25, 10.0
OF_TRAINING, OF_VANILLA = 0.6, 0.5
_ELSEWHERE = "this suite does not measure it"


@dataclass(frozen=True)
class _Pair:
    """One task: our figure and the other's, averaged over the seeds that have both."""

    task: str
    ours: float
    other: float

    @property
    def ratio(self) -> float:
        return self.ours / self.other


def claims_of(records: Iterable[Record]) -> list[Claim]:
    """Judge every claim by the records.

    A claim about several tasks holds where it does on all of them, holds in part where it does on some, and does not hold here
    where it does on none.

    Args:
        records: Of any suite.
    """
    found = succeeded(records)
    return [
        _better_than_vanilla(found),
        _best_of_all(found),
        _time_of_training(found),
        _time_of_vanilla(found),
        _memory(found),
        _parameters(found),
        Claim("It is more robust to adversarial examples.", "not measured", "", _ELSEWHERE),
        Claim("It is more private.", "not measured", "", _ELSEWHERE),
        Claim("It comes with guarantees on generalisation and against overconfidence.", "not measured", "", _ELSEWHERE),
    ]


def _better_than_vanilla(records: Sequence[Record]) -> Claim:
    text = "It predicts better than a fully Bayesian network (lower NLL, or higher density)."
    pairs = _pairs(records, OURS, VANILLA, _nll, best=min)
    return _by_task(text, pairs, lambda pair: pair.ours <= pair.other, "NLL {ours:.3f} against {other:.3f}")


def _best_of_all(records: Sequence[Record]) -> Claim:
    text = "Its prediction and uncertainty are state of the art: none of the alternatives has a lower NLL."
    others = tuple(dict.fromkeys(record.method for record in records if record.method not in (OURS, MIXTURE)))
    pairs = _pairs(records, (OURS, MIXTURE), others, _nll, best=min)
    claim = _by_task(
        text, pairs, lambda pair: pair.ours <= pair.other, "NLL {ours:.3f} against the best other's {other:.3f}"
    )
    return Claim(
        claim.text, claim.verdict, claim.evidence, claim.why or "all with a predictive temperature where they have one"
    )


def _time_of_training(records: Sequence[Record]) -> Claim:
    text = (
        f"It needs little time beside training: one fit at a given T at most {ONE_FIT:.0%} of stage one, the default call, "
        f"with its choice of T, at most {DEFAULT_CALL:.0%}, each to within {TOLERANCE} nats of its converged held-out NLL."
    )
    holds, lines = [], []
    for task in _tasks(records):
        ours = [record for record in records if record.task == task and record.method == OURS]
        fit, call, gap = _mean(ours, _one_fit), _mean(ours, _default_call), _mean(ours, _above_converged)
        if fit is not None and call is not None:
            holds.append(fit <= ONE_FIT and call <= DEFAULT_CALL and (gap is None or gap <= TOLERANCE))
            lines.append(f"{task}: {fit:.0%} and {call:.0%}" + ("" if gap is None else f" ({gap:+.3f} nats)"))
    return _judge(text, holds, "; ".join(lines))


def _one_fit(record: Record) -> float | None:
    """Time until it has converged, in stage ones; of the usual length where no other was run."""
    if record.cost is None:
        return None
    soonest = converged(course_of(record))
    return (record.cost.seconds if soonest is None else soonest.seconds) / record.cost.stage_one_seconds


def _default_call(record: Record) -> float | None:
    return None if record.cost is None else record.cost.search_seconds / record.cost.stage_one_seconds


def _above_converged(record: Record) -> float | None:
    """By how much the default call's held-out score misses that of the longest run at its temperature."""
    longest = converged(course_of(record))
    own = None if record.chosen is None else held_out_score(record.candidates[record.chosen[0]])
    return None if longest is None or own is None else own - longest.score


def _time_of_vanilla(records: Sequence[Record]) -> Claim:
    text = (
        f"A fully Bayesian network needs at least {FASTER:.0f} times as much extra time to come to the same held-out NLL, "
        "each at the temperature that was chosen for it."
    )
    holds, lines = [], []
    for task in _tasks(records):
        here = [record for record in records if record.task == task]
        found = race(
            [record for record in here if record.method == OURS],
            [record for record in here if record.method in VANILLA],
        )
        if found is None:
            continue
        ratio, seeds = statistics.fmean(found.ratios), len(found.ratios)
        # Where it does not get there, the ratio is that of its longest run: not to get there in less time proves nothing.
        holds.append(ratio >= FASTER)
        there = "" if found.reached == seeds else f", reached on {found.reached} of {seeds} seeds"
        lines.append(f"{task}: {'' if found.reached == seeds else 'over '}{ratio:.1f} times{there}")
    return _judge(text, holds, "; ".join(lines))


def _memory(records: Sequence[Record]) -> Claim:
    text = f"Its peak memory is at most {OF_TRAINING} of ordinary training's and {OF_VANILLA} of a fully Bayesian network's."
    training = {pair.task: pair for pair in _pairs(records, OURS, (NETWORK,), _cost(_peak))}
    vanilla = {pair.task: pair for pair in _pairs(records, OURS, VANILLA, _cost(_peak), best=min)}
    holds, lines = [], []
    for task, pair in training.items():
        other = vanilla.get(task)
        holds.append(pair.ratio <= OF_TRAINING and (other is None or other.ratio <= OF_VANILLA))
        lines.append(f"{task}: {pair.ratio:.2f}" + ("" if other is None else f" and {other.ratio:.2f}"))
    return _judge(text, holds, "; ".join(lines))


def _parameters(records: Sequence[Record]) -> Claim:
    text = "It trains far fewer parameters than a fully Bayesian network."
    pairs = _pairs(records, OURS, VANILLA, _cost(lambda cost: float(cost.trainable_parameters)), best=min)
    return _by_task(text, pairs, lambda pair: pair.ratio < 0.5, "{ratio:.1%} of its")


Figure = Callable[[Record], float | None]


def _row(record: Record) -> Row:
    """The better of both rows of a method: the scaled one where there is one."""
    row = record.scaled or record.raw
    assert row is not None  # noqa: S101 - records that failed are left out
    return row


def _nll(record: Record) -> float | None:
    metrics = _row(record).metrics
    density = metrics.get("mean_log_density")
    return metrics.get("nll") if density is None else -density


def _cost(of: Callable[[Cost], float | None]) -> Figure:
    return lambda record: None if record.cost is None else of(record.cost)


def _peak(cost: Cost) -> float | None:
    return None if cost.peak_bytes is None else float(cost.peak_bytes)


def _tasks(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.task for record in records))


def _mean(records: Sequence[Record], figure: Figure) -> float | None:
    values = [figure(record) for record in records]
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(values) else None


def _pairs(
    records: Sequence[Record],
    ours: str | tuple[str, ...],
    others: tuple[str, ...],
    figure: Figure,
    of_other: Figure | None = None,
    best: Callable[[list[float]], float] = min,
) -> list[_Pair]:
    """Our figure and the best other's on every task that has both."""
    pairs = []
    for task in _tasks(records):
        here = [record for record in records if record.task == task]

        def of(names: Sequence[str], what: Figure, here: Sequence[Record] = here) -> float | None:
            means = [_mean([record for record in here if record.method == name], what) for name in names]
            present = [mean for mean in means if mean is not None]
            return best(present) if present else None

        own, other = of((ours,) if isinstance(ours, str) else ours, figure), of(others, of_other or figure)
        if own is not None and other is not None:
            pairs.append(_Pair(task, own, other))
    return pairs


def _by_task(text: str, pairs: Sequence[_Pair], holds: Callable[[_Pair], bool], line: str) -> Claim:
    evidence = "; ".join(
        f"{pair.task}: " + line.format(ours=pair.ours, other=pair.other, ratio=pair.ratio if pair.other else 0.0)
        for pair in pairs
    )
    return _judge(text, [holds(pair) for pair in pairs], evidence)


def _judge(text: str, holds: Sequence[bool], evidence: str, why: str = "") -> Claim:
    if not holds:
        return Claim(text, "not measured", "", "no task has both methods")
    verdict: Verdict = "holds" if all(holds) else "holds in part" if any(holds) else "does not hold here"
    counted = f"on {sum(holds)} of {len(holds)} tasks" + (f", {why}" if why else "")
    return Claim(text, verdict, evidence, counted)
