"""Scores of single predictions against plain sums in exact or long arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stfbnn.errors import InputError
from stfbnn.privacy.scores import FLOOR, SCORES, as_membership, modified_entropy_score, scaled_confidence


def by_hand(probs: list[Fraction], label: int) -> dict[str, float]:
    """Every score from exact probabilities; a difference from 1 is taken before anything is rounded."""

    def log(value: Fraction) -> float:
        # Of numbers beyond the range of doubles too.
        return math.log(value.numerator) - math.log(value.denominator)

    p = probs[label]
    mentr = -float(1 - p) * log(p)
    for k, other in enumerate(probs):
        if k != label:
            mentr -= float(other) * log(1 - other)
    return {
        "loss": log(p),
        "confidence": log(max(probs)),
        "entropy": math.fsum(float(one) * log(one) for one in probs),
        "modified_entropy": -mentr,
        "scaled_confidence": log(p / (1 - p)),
        "correctness": float(probs.index(max(probs)) == label),
    }


def exact(weights: list[Fraction]) -> tuple[list[Fraction], torch.Tensor]:
    probs = [weight / sum(weights) for weight in weights]
    logs = [math.log(p.numerator) - math.log(p.denominator) for p in probs]
    return probs, torch.tensor([logs], dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=7, unique=True), st.data())
def test_scores_are_what_plain_python_says(weights: list[int], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(weights) - 1))
    probs, logs = exact([Fraction(weight) for weight in weights])
    expected = by_hand(probs, label)
    assert set(expected) == set(SCORES)
    for name, score in SCORES.items():
        assert float(score(logs, [label])) == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("digits", [5, 17, 40, 200])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_scores_keep_their_digits_where_p_y_rounds_to_one(digits: int, label: int) -> None:
    tiny = Fraction(1, 10**digits)
    probs, logs = exact([1 - 3 * tiny, tiny, 2 * tiny])
    expected = by_hand(probs, label)
    for name, score in SCORES.items():
        found = float(score(logs, [label]))
        # The confidence's logarithm itself is below the spacing of doubles near 1.
        assert found == pytest.approx(expected[name], rel=1e-9, abs=1e-15), name
    if label == 0:
        assert float(scaled_confidence(logs, [0])) == pytest.approx(digits * math.log(10) - math.log(3), rel=1e-5)


def test_impossible_classes_give_finite_scores_in_the_right_order() -> None:
    logs = torch.tensor(
        [[0.0, -math.inf, -math.inf], [0.0, -math.inf, -math.inf], [math.log(0.5), math.log(0.5), -math.inf]]
    )
    labels = torch.tensor([0, 1, 2])
    for name, score in SCORES.items():
        assert bool(score(logs, labels).isfinite().all()), name
        right, wrong, _ = score(logs, labels).tolist()
        assert right > wrong or name in ("confidence", "entropy"), name
    assert SCORES["loss"](logs, labels).tolist() == [0.0, FLOOR, FLOOR]


def test_modified_entropy_tells_a_certain_error_from_a_certain_hit_and_the_entropy_does_not() -> None:
    logs = torch.tensor([[0.98, 0.01, 0.01], [0.98, 0.01, 0.01]]).log()
    right, wrong = modified_entropy_score(logs, [0, 1]).tolist()
    assert right > wrong + 3
    assert len(set(SCORES["entropy"](logs, [0, 1]).tolist())) == 1


@pytest.mark.parametrize("name", SCORES)
def test_half_precision_rows_and_their_order_do_not_matter(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    logs = (3 * torch.randn(40, 5, generator=random)).log_softmax(1)
    labels = torch.randint(5, (40,), generator=random)
    scores = SCORES[name](logs, labels)
    assert scores.dtype == torch.float64
    order = torch.randperm(40, generator=random)
    assert torch.equal(SCORES[name](logs[order], labels[order]), scores[order])
    # Rounding moves the row's sum by some 1e-4, and the scores by no more.
    near = SCORES[name](logs.half().float(), labels)
    assert torch.allclose(near, scores, atol=2e-2)


@pytest.mark.parametrize("name", SCORES)
def test_bad_input_is_named(name: str) -> None:
    logs = torch.full((3, 2), math.log(0.5))
    with pytest.raises(InputError, match="log_softmax"):
        SCORES[name](torch.zeros(3, 2), [0, 1, 0])
    with pytest.raises(InputError, match="0 to 1"):
        SCORES[name](logs, [0, 1, 2])
    with pytest.raises(InputError, match="one label an example"):
        SCORES[name](logs, [0, 1])


def test_membership_must_be_truth_values_of_the_right_shape() -> None:
    assert as_membership(np.array([True, False]), (2,)).tolist() == [True, False]
    with pytest.raises(InputError, match=r"int64.*\.bool"):
        as_membership([1, 0], (2,))
    with pytest.raises(InputError, match=r"shape \(3,\), but it has \(2,\)"):
        as_membership([True, False], (3,))
