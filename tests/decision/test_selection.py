"""Whether rules keep what they promise: simulation where the true risk is known, and a second implementation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from stfbnn.decision.bounds import binomial_p_values, hoeffding_bentkus_p_values
from stfbnn.decision.selection import (
    certify,
    control_marginal,
    fewest_for_marginal,
    fewest_for_selective,
    starts,
)

Floats = NDArray[np.float64]

REPEATS = 2000
# A correct rule fails a simulation here with a probability of at most 1e-5.
MOST = {delta: int(stats.binom.ppf(1 - 1e-5, REPEATS, delta)) for delta in (0.1, 0.2)}


@dataclass(frozen=True)
class World:
    """Scores uniform on (0, 1), or the number of their piece, and an error rate for each piece."""

    widths: tuple[float, ...]
    rates: tuple[float, ...]
    atoms: bool = False

    def draw(self, random: np.random.Generator, count: int) -> tuple[Floats, Floats]:
        edges = np.cumsum(self.widths)
        score = random.random(count)
        piece = np.minimum(np.searchsorted(edges, score, side="right"), len(self.rates) - 1)
        wrong = random.random(count) < np.array(self.rates)[piece]
        return piece.astype(float) if self.atoms else score, wrong.astype(float)

    def answered(self, threshold: float) -> tuple[float, float]:
        """Probabilities of an answer, and of a wrong one, where the score is at most the threshold."""
        edges = np.concatenate([[0], np.cumsum(self.widths)])
        ends = edges[1 : int(threshold) + 2] if self.atoms else np.clip(threshold, edges[:-1], edges[1:])
        inside = ends - edges[: len(ends)]
        return float(inside.sum()), float(inside @ np.array(self.rates)[: len(ends)])

    def selective_risk(self, threshold: float) -> float:
        share, wrong = self.answered(threshold)
        return wrong / share if share else 0.0


# The risk asked for is 0.1, and sequences start at shares of a half and less.
PIECES = {
    "an informative score": ((0.25, 0.25, 0.25, 0.25), (0.01, 0.04, 0.15, 0.4)),
    "a useless score, just too many errors": ((0.3, 0.3, 0.4), (0.102, 0.102, 0.102)),
    "a reversed score": ((0.3, 0.4, 0.3), (0.3, 0.1, 0.01)),
    "wrong first, kept at the start, wrong again": ((0.25, 0.28, 0.07, 0.4), (0.2, 0.0, 0.15, 0.105)),
    "around the risk from the start on": ((0.45, 0.05, 0.05, 0.05, 0.05, 0.35), (0.1, 0.11, 0.09, 0.11, 0.09, 0.105)),
    "never wrong, then just too often": ((0.5, 0.06, 0.44), (0.04, 0.9, 0.11)),
}
WORLDS = {
    f"{name}, {'many ties' if atoms else 'no ties'}": World(widths, rates, atoms)
    for name, (widths, rates) in PIECES.items()
    for atoms in (False, True)
}


def violations(world: World, count: int, rank_of: Callable[[Floats, Floats], int], max_risk: float = 0.1) -> int:
    """In how many data sets the rule's true selective risk is above the one asked for."""
    random = np.random.default_rng(1)
    found = 0
    for _ in range(REPEATS):
        scores, losses = world.draw(random, count)
        rank = rank_of(scores, losses)
        found += rank > 0 and world.selective_risk(float(np.sort(scores)[rank - 1])) > max_risk * (1 + 1e-12)
    return found


@pytest.mark.parametrize("name", WORLDS)
def test_the_selective_risk_is_kept_with_the_confidence_asked_for(name: str) -> None:
    def certified(scores: Floats, losses: Floats) -> int:
        return certify(scores, losses, 0.1, 0.9, binomial_p_values).rank

    assert violations(WORLDS[name], 300, certified) <= MOST[0.1]


def test_the_promise_is_not_kept_by_giving_up() -> None:
    # At the brink a test of level δ errs with probability δ: were this near 0, the simulations would show little.
    def certified(scores: Floats, losses: Floats) -> int:
        return certify(scores, losses, 0.1, 0.8, binomial_p_values).rank

    found = violations(WORLDS["a useless score, just too many errors, no ties"], 300, certified)
    assert 0.25 * 0.2 * REPEATS < found <= MOST[0.2]


@pytest.mark.parametrize("limit", ["none", "uncorrected"])
def test_rules_that_look_right_break_the_promise(limit: str) -> None:
    """The largest threshold whose held-out risk, or whose limit at the full level, is low enough."""

    def naive(scores: Floats, losses: Floats) -> int:
        sums, ranks = np.cumsum(losses[np.argsort(scores)]), np.arange(1, len(scores) + 1)
        passed = sums / ranks <= 0.1 if limit == "none" else binomial_p_values(sums, ranks, 0.1) <= 0.1
        return int(np.flatnonzero(passed)[-1]) + 1 if passed.any() else 0

    assert violations(WORLDS["a useless score, just too many errors, no ties"], 300, naive) > 2 * MOST[0.1]


def test_losses_between_0_and_1_keep_the_risk_too() -> None:
    # The same worlds, where an error loses 1, ½ or nothing and errors are that much more frequent.
    random = np.random.default_rng(2)
    rates = {"brink": (0.21, 0.21, 0.21), "informative": (0.02, 0.2, 0.6)}
    answered = dict.fromkeys(rates, 0)
    for name, pieces in rates.items():
        world, found = World((0.3, 0.3, 0.4), pieces), 0
        for _ in range(REPEATS):
            scores, wrong = world.draw(random, 300)
            losses = wrong * random.choice([0.0, 0.5, 1.0], 300)
            rank = certify(scores, losses, 0.1, 0.9, hoeffding_bentkus_p_values).rank
            answered[name] += rank
            found += rank > 0 and world.selective_risk(float(np.sort(scores)[rank - 1])) / 2 > 0.1
        assert found <= MOST[0.1]
    assert answered["informative"] / REPEATS > 100


def marginal_risks(world: World, rank_of: Callable[[Floats, Floats], int]) -> tuple[float, float]:
    """The true marginal risk, averaged over data sets of 30 examples, and 4.5 standard errors of that average."""
    random, risks = np.random.default_rng(3), []
    for _ in range(REPEATS):
        scores, losses = world.draw(random, 30)
        rank = rank_of(scores, losses)
        risks.append(world.answered(float(np.sort(scores)[rank - 1]))[1] if rank else 0.0)
    return float(np.mean(risks)), 4.5 * float(np.std(risks)) / math.sqrt(REPEATS)


@pytest.mark.parametrize("name", WORLDS)
def test_the_marginal_risk_is_kept_on_average(name: str) -> None:
    mean, error = marginal_risks(WORLDS[name], lambda scores, losses: control_marginal(scores, losses, 0.1))
    assert mean <= 0.1 + error


def test_the_marginal_risk_is_used_up_and_needs_the_new_examples_loss() -> None:
    world = World((1.0,), (0.5,))
    kept, _ = marginal_risks(world, lambda scores, losses: control_marginal(scores, losses, 0.1))
    naive, error = marginal_risks(
        world, lambda scores, losses: int((np.cumsum(losses[np.argsort(scores)]) <= 0.1 * 30).sum())
    )
    assert kept > 0.07
    assert naive > 0.1 + error


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_a_loop_over_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(80, 400))
    scores, losses = WORLDS["an informative score, no ties"].draw(random, count)
    ordered, best = losses[np.argsort(scores)], 0
    for start, level in starts(count, 0.15, 0.9):
        rank = start
        while rank <= count and stats.binomtest(int(ordered[:rank].sum()), rank, 0.15, "less").pvalue <= level:
            rank += 1
        best = max(best, rank - 1) if rank - 1 > start else best
    assert best > 0
    assert certify(scores, losses, 0.15, 0.9, binomial_p_values).rank == best


@given(st.integers(1, 5000), st.floats(0.001, 0.9), st.floats(0.05, 0.9999))
@settings(deadline=None)
def test_sequences_share_the_level_and_start_where_they_can_reject(
    count: int, max_risk: float, confidence: float
) -> None:
    found = starts(count, max_risk, confidence)
    assert sum(level for _, level in found) <= 1 - confidence
    assert all(1 <= rank < count and (1 - max_risk) ** rank <= level * (1 + 1e-9) for rank, level in found)
    assert bool(found) == (count >= fewest_for_selective(max_risk, confidence))


@pytest.mark.parametrize(("max_risk", "confidence"), [(0.05, 0.95), (0.1, 0.9), (0.01, 0.99), (0.3, 0.5)])
def test_without_errors_the_fewest_examples_that_are_needed_suffice(max_risk: float, confidence: float) -> None:
    fewest = fewest_for_selective(max_risk, confidence)
    scores = np.random.default_rng(0).random(fewest)
    assert certify(scores, np.zeros(fewest), max_risk, confidence, binomial_p_values).rank == fewest
    assert certify(scores[1:], np.zeros(fewest - 1), max_risk, confidence, binomial_p_values).rank == 0
    fewest = fewest_for_marginal(max_risk)
    assert control_marginal(scores[:1].repeat(fewest), np.zeros(fewest), max_risk) == fewest
    assert control_marginal(np.zeros(fewest - 1), np.zeros(fewest - 1), max_risk) == 0 if fewest > 1 else True


def test_the_page_names_the_numbers_that_are_needed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "decision.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\.\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for risk, *named in rows:
        needed = [fewest_for_selective(float(risk), confidence) for confidence in (0.9, 0.95, 0.99)]
        assert [int(one.replace(",", "")) for one in named] == [*needed, fewest_for_marginal(float(risk))]


def test_a_region_without_errors_is_certified() -> None:
    random = np.random.default_rng(4)
    world = World((0.6, 0.4), (0.0, 0.5))
    ranks = []
    for _ in range(200):
        scores, losses = world.draw(random, 500)
        ranks.append(certify(scores, losses, 0.05, 0.95, binomial_p_values).rank)
    # Of 500, 300 are without errors; beyond, about 30 more can be answered in the long run.
    assert min(ranks) > 250
    assert 300 < np.mean(ranks) < 340


samples = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=30, max_size=120)


def unzipped(sample: list[tuple[int, bool]]) -> tuple[Floats, Floats]:
    return np.array([one[0] for one in sample], float), np.array([one[1] for one in sample], float)


@given(samples, st.floats(0.05, 0.5), st.floats(0.3, 0.95))
@settings(deadline=None, max_examples=60)
def test_what_always_holds(sample: list[tuple[int, bool]], max_risk: float, confidence: float) -> None:
    scores, losses = unzipped(sample)
    rank = certify(scores, losses, max_risk, confidence, binomial_p_values).rank
    # Ties are answered together.
    assert rank in (0, *np.cumsum(np.unique(scores, return_counts=True)[1]))
    # The order of the scores alone matters.
    assert certify(np.exp(scores), losses, max_risk, confidence, binomial_p_values).rank == rank
    # Asking for less, or being wrong less often, never leaves less.
    assert certify(scores, losses, min(1.3 * max_risk, 0.9), confidence, binomial_p_values).rank >= rank
    assert certify(scores, losses, max_risk, 0.8 * confidence, binomial_p_values).rank >= rank
    fewer = losses * (np.arange(len(losses)) % 3 > 0)
    assert certify(scores, fewer, max_risk, confidence, binomial_p_values).rank >= rank
    # More general tests are less sharp.
    assert certify(scores, losses, max_risk, confidence, hoeffding_bentkus_p_values).rank <= rank


@given(samples, st.floats(0.01, 0.5), st.integers(2, 5))
@settings(deadline=None, max_examples=60)
def test_more_held_out_data_of_the_same_composition_never_lower_the_marginal_coverage(
    sample: list[tuple[int, bool]], max_risk: float, times: int
) -> None:
    scores, losses = unzipped(sample)
    rank = control_marginal(scores, losses, max_risk)
    assert control_marginal(np.tile(scores, times), np.tile(losses, times), max_risk) >= times * rank
    assert control_marginal(scores, losses, min(1.3 * max_risk, 0.9)) >= rank


def test_with_many_examples_the_choice_nears_the_best_possible() -> None:
    # 0.01·0.5 + 0.3·(c − 0.5) = 0.05·c at c = 0.58.
    scores, losses = World((0.5, 0.5), (0.01, 0.3)).draw(np.random.default_rng(5), 100_000)
    assert certify(scores, losses, 0.05, 0.95, binomial_p_values).rank == pytest.approx(57_500, abs=500)
