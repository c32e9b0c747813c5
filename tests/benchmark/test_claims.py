"""The verdicts follow from the figures by rule, in every direction."""

from __future__ import annotations

from made_records import record

from stfbnn.benchmark.claims import VANILLA, claims_of
from stfbnn.benchmark.records import Record
from stfbnn.report.verdicts import Claim


def found(records: list[Record], word: str) -> Claim:
    return next(claim for claim in claims_of(records) if word in claim.text)


def one_task(task: str, ours: float, vanilla: float, seconds: float = 1.0, peak: int = 500) -> list[Record]:
    return [
        record("network", task, nll=0.5, peak=1000, parameters=1000),
        record("stf-bnn", task, nll=ours, scaled=ours, seconds=seconds, search=2 * seconds, peak=peak, parameters=100),
        record(VANILLA[0], task, nll=vanilla, scaled=vanilla, seconds=50.0, search=60.0, peak=2000, parameters=2000),
    ]


def test_better_on_all_tasks_holds_on_some_in_part_on_none_not() -> None:
    good, bad = one_task("a", 0.3, 0.4), one_task("b", 0.4, 0.3)
    word = "better than a fully Bayesian"
    assert found(good, word).verdict == "holds"
    assert found([*good, *bad], word).verdict == "holds in part"
    assert found(bad, word).verdict == "does not hold here"
    assert "0.400 against 0.300" in found(bad, word).evidence


def test_without_the_other_method_nothing_is_measured() -> None:
    claims = claims_of([record("network"), record("stf-bnn", failed="broke")])
    assert {claim.verdict for claim in claims} == {"not measured"}


def test_the_state_of_the_art_is_the_best_of_all_others() -> None:
    records = [*one_task("a", 0.3, 0.4), record("deep-ensemble", "a", nll=0.29, scaled=0.29)]
    claim = found(records, "state of the art")
    assert claim.verdict == "does not hold here"
    assert "0.290" in claim.evidence
    mixture = record("stf-bnn-mixture", "a", nll=0.25, scaled=0.25)
    assert found([*records, mixture], "state of the art").verdict == "holds"


def test_time_is_of_stage_one_with_and_without_the_search() -> None:
    # Stage one takes 10 s.
    assert found(one_task("a", 0.3, 0.4, seconds=1.0), "little time").verdict == "holds"
    assert found(one_task("a", 0.3, 0.4, seconds=1.1), "little time").verdict == "does not hold here"
    slow_search = [record("network"), record("stf-bnn", nll=0.3, seconds=1.0, search=2.6)]
    claim = found(slow_search, "little time")
    assert claim.verdict == "does not hold here"
    assert "10% and 26%" in claim.evidence


def test_a_fit_takes_until_it_is_nearly_converged() -> None:
    # Within 0.002 of the longest run after 0.8 s, by the line between the points; stage one takes 10 s.
    course = [(0.4, 0.34), (0.8, 0.302), (1.6, 0.3)]
    records = [record("network"), record("stf-bnn", scaled=0.301, seconds=3.0, search=2.4, course=course)]
    claim = found(records, "little time")
    assert claim.verdict == "holds"
    assert "8% and 24% (+0.001 nats)" in claim.evidence
    far = [record("network"), record("stf-bnn", scaled=0.303, seconds=3.0, search=2.4, course=course)]
    assert found(far, "little time").verdict == "does not hold here"


def race_of(course: list[tuple[float, float]], seed: int = 0, other: str = VANILLA[0]) -> list[Record]:
    ours = record("stf-bnn", seed=seed, scaled=0.3, course=[(0.5, 0.31), (1.0, 0.302), (2.0, 0.3)])
    return [ours, record(other, seed=seed, scaled=0.3, course=course)]


def test_a_fully_bayesian_network_is_timed_to_where_the_first_layer_comes() -> None:
    word = "times as much extra time"
    late = found(race_of([(8.0, 0.35), (16.0, 0.25)]), word)
    assert late.verdict == "holds"
    # The line from 0.35 to 0.25 passes 0.302 at 8 + 8 * 0.48.
    assert "digits: 11.8 times" in late.evidence
    soon = found(race_of([(2.0, 0.3), (4.0, 0.29)]), word)
    assert soon.verdict == "does not hold here"
    assert "2.0 times" in soon.evidence
    # Of several fully Bayesian networks the fastest counts.
    assert "2.0 times" in found([*race_of([(30.0, 0.3)]), race_of([(2.0, 0.3)], other=VANILLA[3])[1]], word).evidence
    # Nothing is said where nobody ran for several lengths.
    assert found(one_task("a", 0.3, 0.4), word).verdict == "not measured"


def test_one_that_never_gets_there_took_longer_than_its_longest_run() -> None:
    word = "times as much extra time"
    never = found(race_of([(10.0, 0.5), (30.0, 0.4)]), word)
    assert never.verdict == "holds"
    assert "over 30.0 times, reached on 0 of 1 seeds" in never.evidence
    # Not to get there in hardly any time proves nothing.
    assert found(race_of([(1.0, 0.5), (5.0, 0.4)]), word).verdict == "does not hold here"
    both = found([*race_of([(4.0, 0.3)]), *race_of([(20.0, 0.4)], seed=1)], word)
    assert "over 12.0 times, reached on 1 of 2 seeds" in both.evidence


def test_memory_needs_both_limits() -> None:
    assert found(one_task("a", 0.3, 0.4, peak=600), "peak memory").verdict == "holds"
    assert found(one_task("a", 0.3, 0.4, peak=601), "peak memory").verdict == "does not hold here"
    big = [record("network", peak=4000), record("stf-bnn", peak=1100), record(VANILLA[0], peak=2000)]
    assert found(big, "peak memory").verdict == "does not hold here"


def test_regressions_are_judged_by_their_density() -> None:
    records = [
        record("stf-bnn", kind="regression", nll=1.0),
        record(VANILLA[2], kind="regression", nll=1.2),
    ]
    assert found(records, "better than a fully Bayesian").verdict == "holds"


def test_seeds_are_averaged() -> None:
    records = [record("stf-bnn", seed=seed, nll=nll) for seed, nll in ((0, 0.2), (1, 0.6))] + [
        record(VANILLA[0], seed=seed, nll=0.41) for seed in (0, 1)
    ]
    claim = found(records, "better than a fully Bayesian")
    assert "NLL 0.400 against 0.410" in claim.evidence
