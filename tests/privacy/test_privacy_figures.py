"""Figures of membership scores against brute force over thresholds, closed forms and simulated coverage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import beta, binom, norm
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from stfbnn.errors import InputError
from stfbnn.privacy.figures import by_class, membership_figures, membership_table

tied = st.lists(st.integers(0, 9).map(float), min_size=2, max_size=25)


def labelled(members: list[float], others: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[members, others], np.arange(len(members) + len(others)) < len(members)


def gaussians(distance: float, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As many members as others, the former ``distance`` standard deviations higher."""
    member = np.arange(2 * count) < count
    return random.standard_normal(2 * count) + distance * member, member


def shown(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tied, tied, st.sampled_from([0.04, 0.1, 0.29, 0.5]))
def test_figures_are_those_of_trying_every_threshold(members: list[float], others: list[float], limit: float) -> None:
    scores, member = labelled(members, others)
    found = membership_figures(scores, member, fprs=(limit,), bootstrap=100)
    points = {(0.0, 0.0, math.inf)}
    for threshold in {*members, *others}:
        rates = [sum(score >= threshold for score in group) / len(group) for group in (others, members)]
        points.add((*rates, threshold))
    roc = found.roc
    assert set(zip(roc.fpr.tolist(), roc.tpr.tolist(), roc.thresholds.tolist(), strict=True)) == points
    assert found.auc.value == pytest.approx(roc_auc_score(member, scores))
    assert found.advantage.value == pytest.approx(max(tpr - fpr for fpr, tpr, _ in points))
    assert found.advantage.low <= found.advantage.value <= found.advantage.high

    [point] = found.tpr_at
    best = max((tpr, fpr, threshold) for fpr, tpr, threshold in points if fpr <= limit)
    assert point.tpr.value == best[0]
    assert point.fpr.value <= limit
    if point.threshold is None:
        assert best == (0, 0, math.inf)
    else:
        assert (point.fpr.value, point.tpr.value, point.threshold) in points
    # Thinning keeps both ends and invents nothing.
    thin = roc.thinned(3)
    kept = list(zip(thin.fpr.tolist(), thin.tpr.tolist(), thin.thresholds.tolist(), strict=True))
    assert set(kept) <= points
    assert (kept[0][:2], kept[-1][:2]) == ((0, 0), (1, 1))


def test_thinned_curves_lie_evenly_on_a_logarithmic_axis() -> None:
    roc = membership_figures(*gaussians(1, 2000, np.random.default_rng(0)), bootstrap=100).roc
    thin = roc.thinned(50)
    assert len(roc.fpr) == 4001
    assert 35 < len(thin.fpr) <= 52
    # Most of the thousand rates below a half would be lost on an even axis.
    assert int((thin.fpr < 0.05).sum()) > 15
    assert float(thin.fpr[thin.fpr > 0].min()) == 1 / 2000


def test_rates_have_clopper_and_pearsons_interval_given_the_threshold() -> None:
    scores, member = gaussians(1.5, 1000, np.random.default_rng(2))
    found = membership_figures(scores, member, fprs=(0.01,), confidence=0.9, bootstrap=100)
    [point] = found.tpr_at
    threshold = np.sort(scores[~member])[-11]
    # The threshold is above the eleventh-highest of the others, and takes in all members that are.
    hits = int((scores[member] > threshold).sum())
    assert point.fpr.value == 0.01
    assert point.tpr.value == hits / 1000
    expected = beta.ppf(0.05, hits, 1001 - hits), beta.ppf(0.95, hits + 1, 1000 - hits)
    assert (point.tpr.low, point.tpr.high) == pytest.approx(expected)
    assert point.fpr.low < 0.01 < point.fpr.high


def test_says_where_a_rate_cannot_be_resolved() -> None:
    found = membership_figures(*gaussians(1, 1000, np.random.default_rng(0)), bootstrap=100)
    assert [point.resolved for point in found.tpr_at] == [True, False]
    assert found.notes() == ("1,000 non-members cannot resolve a false-positive rate of 0.1 %: that takes 10,000",)
    assert "?" in shown(found.table())


def test_equal_scores_find_nobody_at_a_low_rate() -> None:
    found = membership_figures(np.zeros(300), np.arange(300) < 200, bootstrap=100)
    assert [point.threshold for point in found.tpr_at] == [None, None]
    assert [point.tpr.value for point in found.tpr_at] == [0, 0]
    assert (found.auc.value, found.advantage.value, found.held_out_advantage.value) == (0.5, 0, 0)
    # But 100 equal scores do not prove that the next one would be.
    assert 0 < found.advantage.high < 0.05


def test_choosing_the_threshold_on_the_same_data_flatters_and_on_the_other_half_does_not() -> None:
    random = np.random.default_rng(3)
    found = [membership_figures(*gaussians(0, 60, random), seed=seed, bootstrap=100) for seed in range(150)]
    in_sample = np.array([one.advantage.value for one in found])
    held_out = np.array([one.held_out_advantage.value for one in found])
    assert in_sample.mean() > 0.1
    assert abs(held_out.mean()) < 3.3 * held_out.std() / math.sqrt(len(found))


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_intervals_of_the_advantage_cover(distance: float) -> None:
    random = np.random.default_rng(4)
    truth, repetitions = 2 * norm.cdf(distance / 2) - 1, 250
    found = [
        membership_figures(*gaussians(distance, 100, random), seed=seed, bootstrap=200) for seed in range(repetitions)
    ]
    covered = sum(one.advantage.low <= truth <= one.advantage.high for one in found)
    assert covered >= binom.ppf(1e-3, repetitions, 0.94)
    # An interval that were always [0, 1] would cover too.
    assert np.mean([one.advantage.high - one.advantage.low for one in found]) < 0.45
    # The best threshold is never quite found, which costs some hundredths.
    held_out = np.array([one.held_out_advantage.value for one in found])
    assert -0.06 < held_out.mean() - truth < 0.01


def test_held_out_advantage_reaches_the_closed_form() -> None:
    scores, member = gaussians(1.2, 20_000, np.random.default_rng(5))
    found = membership_figures(scores, member, bootstrap=100)
    truth = 2 * norm.cdf(0.6) - 1
    assert found.held_out_advantage.value == pytest.approx(truth, abs=0.015)
    assert found.advantage.low < truth < found.advantage.high
    assert found.balanced_accuracy.value == pytest.approx(norm.cdf(0.6), abs=0.0075)
    assert found.auc.value == pytest.approx(norm.cdf(1.2 / math.sqrt(2)), abs=0.01)


def test_a_model_that_saw_neither_set_has_an_area_of_one_half_within_its_interval() -> None:
    inputs, classes = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=30, tol=1e-2, solver="newton-cholesky").fit(inputs[:200], classes[:200])
    scores = model.predict_log_proba(inputs[200:])[np.arange(len(inputs) - 200), classes[200:]]
    scores = np.maximum(scores, -700)
    random = np.random.default_rng(6)
    covered = [0, 0]
    for seed in range(200):
        found = membership_figures(scores, random.random(len(scores)) < 0.5, seed=seed, bootstrap=100)
        covered[0] += found.auc.low <= 0.5 <= found.auc.high
        covered[1] += found.held_out_advantage.low <= 0 <= found.held_out_advantage.high
    assert min(covered) >= binom.ppf(1e-3, 200, 0.95)


def test_figures_follow_from_the_seed_and_can_be_written_as_json() -> None:
    scores, member = gaussians(1, 200, np.random.default_rng(7))
    first, again, other = (membership_figures(scores, member, seed=seed).as_dict() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first["auc"] == other["auc"]
    content = json.loads(json.dumps(first, allow_nan=False))
    assert content["members"] == 200
    assert content["tpr_at"][0]["limit"] == 0.01
    assert len(content["roc"]["fpr"]) == len(content["roc"]["tpr"]) <= 202


def test_tables_have_a_row_an_attack() -> None:
    random = np.random.default_rng(8)
    figures = {
        name: membership_figures(*gaussians(1, 50, random), fprs=(0.2,), bootstrap=100) for name in ("loss", "LiRA")
    }
    text = shown(membership_table(figures, "Fashion-MNIST"))
    assert "Fashion-MNIST" in text
    assert "TPR at 20 % FPR" in text
    assert all(name in text and one.auc.show() in text for name, one in figures.items())
    with pytest.raises(InputError, match="same false-positive rates"):
        membership_table(figures | {"x": membership_figures(*gaussians(1, 50, random), bootstrap=100)})


def test_classes_are_measured_alone() -> None:
    random = np.random.default_rng(9)
    count = 600
    labels, member = random.integers(0, 3, count), random.random(count) < 0.5
    # Class 2 occurs once among members: nothing can be told.
    labels[(labels == 2) & member] = 0
    labels[np.flatnonzero(member)[0]] = 2
    probs = random.dirichlet([5, 1, 1], count)
    log_probs = np.log(probs)
    scores = random.standard_normal(count) + 2 * member * (labels == 1)
    found = by_class(scores, member, labels, log_probs=log_probs)
    assert [one.label for one in found.classes] == [0, 1, 2]
    for one in found.classes[:2]:
        own = labels == one.label
        inside, outside = own & member, own & ~member
        assert (one.members, one.non_members) == (inside.sum(), outside.sum())
        assert one.auc is not None
        assert one.advantage is not None
        assert one.auc.value == pytest.approx(roc_auc_score(member[own], scores[own]))
        right = probs.argmax(1) == labels
        loss = -log_probs[np.arange(count), labels]
        gaps = (
            (one.score_gap, scores[inside].mean() - scores[outside].mean()),
            (one.accuracy_gap, right[inside].mean() - right[outside].mean()),
            (one.loss_gap, loss[outside].mean() - loss[inside].mean()),
        )
        for gap, expected in gaps:
            assert gap is not None
            assert gap.value == pytest.approx(expected)
            assert gap.low <= gap.value <= gap.high
    assert found.classes[1].score_gap.low > 1.5
    assert found.classes[1].advantage.low > 0.4
    assert found.classes[2].members == 1
    assert found.classes[2].auc is found.classes[2].loss_gap is None
    assert "–" in shown(found.table("classes"))
    json.dumps(found.as_dict(), allow_nan=False)
    without = by_class(scores, member, labels)
    assert without.classes[1].auc == found.classes[1].auc
    assert without.classes[1].accuracy_gap is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": [0.0, 1.0, math.nan, 0.0]}, "membership scores hold 1 NaN"),
        ({"scores": np.zeros((4, 1))}, r"one number an example, but have shape \(4, 1\)"),
        ({"member": [1, 0, 1, 0]}, "int64"),
        ({"member": [True] * 5}, r"shape \(4,\)"),
        ({"member": [True] * 3 + [False]}, "there are 3 and 1"),
        ({"fprs": (0.01, 1.0)}, r"in \(0, 1\)"),
        ({"confidence": 95}, r"in \(0, 1\), but they are 95"),
        ({"bootstrap": 10}, "at least 100 resamples, not 10"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], message: str) -> None:
    given = {"scores": [0.0, 1.0, 2.0, 3.0], "member": [True, False, True, False]} | changed
    with pytest.raises(InputError, match=message):
        membership_figures(**given)


def test_bad_input_of_classes_is_named() -> None:
    scores, member = np.arange(4.0), [True, False, True, False]
    with pytest.raises(InputError, match="one label an example"):
        by_class(scores, member, [0, 1])
    with pytest.raises(InputError, match="0 to 1"):
        by_class(scores, member, [0, 1, 2, 0], log_probs=np.log(np.full((4, 2), 0.5)))
    with pytest.raises(InputError, match="confidence"):
        by_class(scores, member, [0, 1, 1, 0], confidence=0)
