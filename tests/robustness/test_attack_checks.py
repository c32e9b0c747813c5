"""The checks of attacks find what is made to be found, and are silent where nothing is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stfbnn.robustness import checks
from stfbnn.robustness.result import DrawsCurve, Kind, Outcome
from stfbnn.robustness.victim import victim


def outcome(kind: Kind, fooled: Sequence[int] | int, count: int = 100, epsilon: float = 0.1, name: str = "") -> Outcome:
    """An attack that fools these examples, or the first so many."""
    which = range(fooled) if isinstance(fooled, int) else fooled
    return Outcome(name or kind, kind, epsilon, tuple(index in which for index in range(count)), 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_lead_of_an_attack_is_a_sum_of_binomial_terms(pairs: list[tuple[bool, bool]]) -> None:
    one, other = zip(*pairs, strict=True)
    b, c = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    expected = sum(math.comb(b + c, k) for k in range(b, b + c + 1)) / 2 ** (b + c)
    assert checks.fools_more(one, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lost", "won", "flat"), [(0, 0, True), (1, 0, True), (2, 0, False), (3, 1, True), (6, 3, True), (7, 3, False)]
)
def test_a_fall_of_more_than_a_standard_error_is_one(lost: int, won: int, flat: bool) -> None:
    before = [True] * won + [False] * (50 - won)
    after = [False] * won + [True] * lost + [False] * (50 - won - lost)
    outcomes = [Outcome("PGD", "many steps", 0.1, tuple(flags), 1.0) for flags in (before, after)]
    assert checks.falls_no_more(*outcomes) is flat


def test_seven_examples_more_are_significant_and_six_are_not() -> None:
    few, many = outcome("many steps", 20), outcome("one step", 27)
    found = checks.one_step_beats_many([few, many])
    assert found.passed is False
    assert found.numbers == {
        "epsilon": 0.1,
        "accuracy": 0.73,
        "held_against": 0.8,
        "p_value": pytest.approx(2**-7),
    }
    assert "73.0 %" in found.explanation
    assert "80.0 %" in found.explanation
    assert checks.one_step_beats_many([few, outcome("one step", 26)]).passed is True
    # Seven more, but of other examples: 17 against 10 that only the other fools.
    assert checks.one_step_beats_many([few, outcome("one step", range(10, 37))]).passed is True


def test_one_step_is_held_against_the_best_of_many_steps_at_the_same_epsilon() -> None:
    weak, strong = outcome("many steps", 5, name="weak"), outcome("many steps", 60, name="strong")
    single = outcome("one step", 40)
    assert checks.one_step_beats_many([weak, single]).passed is False
    assert checks.one_step_beats_many([weak, strong, single]).passed is True
    elsewhere = outcome("many steps", 60, epsilon=0.2)
    assert checks.one_step_beats_many([weak, single, elsewhere]).passed is False
    assert checks.one_step_beats_many([single, elsewhere]).passed is None


def test_a_black_box_is_not_held_against_one_step() -> None:
    queries = outcome("black box", 50)
    found = checks.black_box_beats_white_box([outcome("one step", 90), outcome("many steps", 20), queries])
    assert found.passed is False
    assert checks.black_box_beats_white_box([outcome("one step", 10), queries]).passed is None
    assert checks.black_box_beats_white_box([outcome("many steps", 60), queries]).passed is True


def test_accuracy_must_not_rise_with_epsilon() -> None:
    def series(*fooled: int, kind: Kind = "many steps") -> list[Outcome]:
        return [outcome(kind, count, epsilon=0.1 * (place + 1)) for place, count in enumerate(fooled)]

    assert checks.falls_with_epsilon(series(10, 30, 25)).passed is True
    found = checks.falls_with_epsilon(series(10, 30, 15))
    assert found.passed is False
    assert found.numbers["small_epsilon"] == 0.2
    assert found.numbers["large_accuracy"] == 0.85
    # A single long step may overshoot on any network.
    assert checks.falls_with_epsilon(series(10, 30, 15, kind="one step")).passed is None
    assert checks.falls_with_epsilon(series(10)).passed is None


@pytest.mark.parametrize(("left", "passed"), [(0, True), (3, True), (4, False), (20, False)])
def test_an_unbounded_attack_leaves_next_to_nothing(left: int, passed: bool) -> None:
    found = checks.unbounded_attack(outcome("many steps", 64 - left, count=64, epsilon=1.0))
    assert found.passed is passed
    # P(Bin(64, .01) ≥ left), summed by hand.
    tail = 1 - sum(math.comb(64, k) * 0.01**k * 0.99 ** (64 - k) for k in range(left))
    assert found.numbers["p_value"] == pytest.approx(tail)
    assert checks.unbounded_attack(None).passed is None


def test_more_draws_must_not_fool_more_than_the_attacks_took() -> None:
    def curve(*fooled: int) -> DrawsCurve:
        counts = (1, 2, 4, 8)[: len(fooled)]
        return DrawsCurve(0.1, counts, tuple(outcome("many steps", count) for count in fooled), None)

    falling = curve(10, 30, 50, 52)
    assert checks.more_draws(falling, 1).passed is False
    assert checks.more_draws(falling, 2).passed is False
    assert checks.more_draws(falling, 4).passed is True
    # The nearest count below stands for one that the curve leaves out, and the last for any beyond it.
    assert checks.more_draws(falling, 3).passed is False
    assert checks.more_draws(falling, 100).passed is True
    assert checks.more_draws(falling, 1).numbers["most_accuracy"] == 0.48
    assert checks.more_draws(None, 8).passed is None
    assert checks.more_draws(falling, None).passed is None


def test_rows_without_a_slope_are_counted() -> None:
    network = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))
    inputs = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) + 0.01
    targets = torch.zeros(300, dtype=torch.long)
    assert checks.gradients_exist(victim(network), inputs, targets).passed is True
    inputs[:3] = 0.0
    found = checks.gradients_exist(victim(network), inputs, targets)
    assert found.passed is True
    assert found.numbers == {"zero": 3.0, "not_finite": 0.0, "share": 0.01}
    inputs[250] = 0.0
    found = checks.gradients_exist(victim(network), inputs, targets)
    assert found.passed is False
    assert "at 4 of 300 inputs" in found.explanation


def test_rows_whose_slope_is_not_finite_are_counted() -> None:
    class Root(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.sqrt()

    inputs = torch.full((10, 3), 0.5)
    inputs[2, 1] = 0.0
    found = checks.gradients_exist(victim(Root()), inputs, torch.zeros(10, dtype=torch.long))
    assert found.numbers == {"zero": 0.0, "not_finite": 1.0, "share": 0.1}
    assert found.passed is False


def test_a_network_that_cuts_the_graph_has_no_slope() -> None:
    class Cut(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.detach()

    found = checks.gradients_exist(victim(Cut()), torch.rand(5, 3), torch.zeros(5, dtype=torch.long))
    assert found.numbers["zero"] == 5
