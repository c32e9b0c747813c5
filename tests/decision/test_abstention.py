"""The public way: rules from predictions, what they refuse and say, and how they are kept in files."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from stfbnn.decision import AbstentionRule, abstention_rule, evaluate_abstention
from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, CustomLikelihood, Gaussian, Likelihood
from stfbnn.predictive import CategoricalPrediction, Prediction, sums_for


def predicted(outputs: Tensor, likelihood: Likelihood | None = None, at_mean: bool = False) -> Prediction:
    sums = sums_for(likelihood or Categorical(), 1.0)
    sums.add(outputs)
    return sums.finish(at_mean)


def drawn(seed: int, count: int, sharpness: float = 4.0) -> tuple[Prediction, Tensor]:
    """A calibrated classifier of three classes: targets are drawn from what it says."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(1, count, 3, generator=generator, dtype=torch.float64)
    logits = logits + 0.3 * torch.randn(4, count, 3, generator=generator, dtype=torch.float64)
    prediction = predicted(logits)
    assert isinstance(prediction, CategoricalPrediction)
    return prediction, torch.multinomial(prediction.probs, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("score", ["entropy", "confidence", "epistemic"])
@pytest.mark.parametrize("guarantee", ["selective", "marginal"])
def test_a_rule_answers_the_safest_and_says_what_it_saw(score: str, guarantee: Any) -> None:
    held_out, targets = drawn(0, 600)
    rule = abstention_rule(held_out, targets, max_risk=0.1, score=score, guarantee=guarantee)
    abstains = held_out.abstain(rule)
    assert abstains.shape == (600,)
    assert abstains.dtype == torch.bool
    values = -held_out.confidence if score == "confidence" else getattr(held_out, score)
    assert values[~abstains].max() < values[abstains].min()
    wrong = held_out.labels != targets
    assert rule.answered == int((~abstains).sum()) == 600 * rule.coverage
    assert rule.held_out_loss == int(wrong[~abstains].sum())
    assert rule.risk == pytest.approx(float(wrong[~abstains].double().mean()))
    assert rule.bound is not None
    assert rule.risk is not None
    if guarantee == "selective":
        # The Clopper–Pearson limit of one of the tests: above the held-out risk, and at most what was asked for.
        low = stats.binomtest(int(rule.held_out_loss), rule.answered).proportion_ci(0.9, method="exact").high
        assert rule.risk < low <= rule.bound <= 0.1
    else:
        assert rule.bound == (rule.held_out_loss + 1) / 601
        assert rule.bound <= 0.1
    assert 0.2 < rule.coverage < 1
    assert rule.reason == ""


def test_the_promise_is_kept_by_the_public_way() -> None:
    # A hundredth of the simulations of test_selection, on new examples: 95 % confidence and sampling error of 4,000.
    new, new_targets = drawn(1, 4000)
    broken = 0
    for seed in range(40):
        held_out, targets = drawn(100 + seed, 400)
        figures = evaluate_abstention(new, new_targets, abstention_rule(held_out, targets, max_risk=0.1))
        assert figures.coverage > 0.3
        broken += figures.risk_interval[0] > 0.1
    assert broken <= 6


def test_figures_on_new_examples() -> None:
    held_out, targets = drawn(2, 500)
    new, new_targets = drawn(3, 300)
    rule = abstention_rule(held_out, targets, max_risk=0.1, score="confidence")
    figures = evaluate_abstention(new, new_targets, rule, confidence=0.9)
    answered, wrong = ~new.abstain(rule), new.labels != new_targets
    errors, count = int((answered & wrong).sum()), int(answered.sum())
    assert (figures.count, figures.answered, figures.coverage) == (300, count, count / 300)
    assert figures.risk == pytest.approx(errors / count)
    assert figures.marginal_risk == pytest.approx(errors / 300)
    assert figures.risk_of_all == pytest.approx(float(wrong.double().mean()))
    for found, total in ((figures.risk_interval, count), (figures.marginal_interval, 300)):
        theirs = stats.binomtest(errors, total).proportion_ci(0.9, method="exact")
        assert found == pytest.approx((theirs.low, theirs.high))
    assert json.loads(json.dumps(figures.as_dict()))["coverage"] == figures.coverage


def test_a_rule_survives_a_file() -> None:
    held_out, targets = drawn(4, 500)
    rule = abstention_rule(held_out, targets, max_risk=0.1)
    again = AbstentionRule.from_dict(json.loads(json.dumps(rule.as_dict(), allow_nan=False)))
    assert again == rule
    assert torch.equal(held_out.abstain(again), held_out.abstain(rule))
    with pytest.raises(FrozenInstanceError):
        rule.threshold = 1.0  # type: ignore[misc]


def margin(prediction: Any) -> Tensor:
    top = prediction.probs.topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


def missing_mass(prediction: Any, targets: Tensor) -> Tensor:
    return 1 - prediction.probs.gather(1, targets[:, None])[:, 0]


def test_functions_of_ones_own() -> None:
    held_out, targets = drawn(5, 800)
    rule = abstention_rule(held_out, targets, max_risk=0.2, score=margin, loss=missing_mass)
    assert (rule.score, rule.loss, rule.method) == (
        "margin()",
        "missing_mass()",
        "fixed-sequence tests, Hoeffding–Bentkus",
    )
    answered = ~held_out.abstain(rule)
    assert rule.held_out_loss == pytest.approx(float(missing_mass(held_out, targets)[answered].sum()))
    assert margin(held_out)[answered].max() == rule.threshold
    figures = evaluate_abstention(held_out, targets, rule)
    assert figures.risk is not None
    assert figures.risk_interval[0] < figures.risk < figures.risk_interval[1]
    kept = json.loads(json.dumps(rule.as_dict()))
    with pytest.raises(InputError, match=r"is a function, which no file holds.*score="):
        held_out.abstain(AbstentionRule.from_dict(kept))
    with pytest.raises(InputError, match=r"is a function, which no file holds.*loss="):
        evaluate_abstention(held_out, targets, AbstentionRule.from_dict(kept, score=margin))
    with pytest.raises(InputError, match=r"made with the score 'margin\(\)', not with 'missing_mass\(\)'"):
        AbstentionRule.from_dict(kept, score=missing_mass)  # type: ignore[arg-type]
    again = AbstentionRule.from_dict(kept, score=margin, loss=missing_mass)
    assert torch.equal(held_out.abstain(again), held_out.abstain(rule))
    assert evaluate_abstention(held_out, targets, again) == figures


def test_booleans_get_the_exact_test_and_so_do_as_errors() -> None:
    held_out, targets = drawn(6, 500)
    by_name = abstention_rule(held_out, targets, max_risk=0.1)
    by_function = abstention_rule(held_out, targets, max_risk=0.1, loss=lambda pred, y: pred.labels != y)  # type: ignore[attr-defined]
    assert by_function.method == by_name.method == "fixed-sequence tests, Clopper–Pearson"
    assert by_function.threshold == by_name.threshold


def test_labels_numbers_and_positions() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 4 * torch.randn(1, 400, 1, generator=generator) + 0.1 * torch.randn(3, 400, 1, generator=generator)
    label = predicted(logits, Bernoulli())
    there = torch.rand(400, 1, generator=generator) < logits[0].sigmoid()
    rule = abstention_rule(label, there, max_risk=0.1, score="confidence")
    assert 0.2 < rule.coverage < 1
    assert label.abstain(rule).shape == (400,)
    assert evaluate_abstention(label, there.float(), rule).risk == rule.risk

    noise = 0.1 + torch.rand(400, generator=generator)
    number = predicted(noise * torch.randn(8, 400, generator=generator), Gaussian(noise_std=0.1))
    y = noise * torch.randn(400, generator=generator)
    rule = abstention_rule(number, y, max_risk=0.2, score="std", loss=lambda pred, y: (pred.mean - y).abs() > 0.8)  # type: ignore[attr-defined]
    answered = ~number.abstain(rule)
    assert 0.2 < rule.coverage < 1
    assert number.std[answered].max() <= rule.threshold < number.std[~answered].min()  # type: ignore[attr-defined]

    dense = predicted(3 * torch.randn(2, 200, 3, 5, generator=generator))
    classes = dense.labels  # type: ignore[attr-defined]
    for score in ("entropy", "confidence"):
        with pytest.raises(InputError, match="several positions or labels an example"):
            abstention_rule(dense, classes, max_risk=0.1, score=score)
    rule = abstention_rule(
        dense,
        classes,
        max_risk=0.1,
        score=lambda pred: pred.entropy.flatten(1).mean(1),  # type: ignore[attr-defined]
        loss=lambda pred, y: (pred.labels != y).flatten(1).double().mean(1),  # type: ignore[attr-defined]
    )
    assert rule.coverage == 1
    assert dense.abstain(rule).shape == (200,)


def test_too_few_examples_are_said_with_the_number_that_it_takes() -> None:
    held_out, _ = drawn(8, 65)
    with pytest.warns(UserWarning, match="65 held-out examples are too few.*at least 66,"):
        rule = abstention_rule(held_out, held_out.labels, max_risk=0.05)  # type: ignore[attr-defined]
    assert (rule.threshold, rule.risk, rule.bound, rule.answered, rule.coverage) == (None, None, None, 0, 0.0)
    assert held_out.abstain(rule).all()
    assert "Answers nothing: 65 held-out examples are too few" in str(rule)
    assert AbstentionRule.from_dict(json.loads(json.dumps(rule.as_dict()))) == rule
    figures = evaluate_abstention(held_out, held_out.labels, rule)  # type: ignore[attr-defined]
    assert (figures.answered, figures.risk, figures.risk_interval) == (0, None, (0, 1))
    held_out, _ = drawn(8, rule.needed)
    assert abstention_rule(held_out, held_out.labels, max_risk=0.05).coverage == 1  # type: ignore[attr-defined]
    held_out, _ = drawn(8, 18)
    with pytest.warns(UserWarning, match="at least 19,"):
        abstention_rule(held_out, held_out.labels, max_risk=0.05, guarantee="marginal")  # type: ignore[attr-defined]


def test_a_hopeless_network_is_said_to_be_one() -> None:
    held_out, targets = drawn(9, 500)
    with pytest.warns(UserWarning, match="no threshold is shown to keep a risk of 0.01 by 500 held-out examples"):
        rule = abstention_rule(held_out, (targets + 1) % 3, max_risk=0.01)
    assert rule.threshold is None


def test_a_rule_reads_well() -> None:
    held_out, targets = drawn(10, 600)
    text = str(abstention_rule(held_out, targets, max_risk=0.1, score="confidence"))
    assert "Answers where confidence ≥ 0." in text
    assert "of 600 held-out examples" in text
    assert "errors of at most 0.1 among the answered, with confidence 0.95" in text
    text = str(abstention_rule(held_out, targets, max_risk=0.1, guarantee="marginal", loss=missing_mass))
    assert "Answers where entropy ≤ " in text
    assert "mean missing_mass() of at most 0.1 (answered, as a share of all examples), on average" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_risk": 0}, "max_risk must be a number above 0 and below 1"),
        ({"max_risk": 5}, "max_risk must be a number above 0 and below 1"),
        ({"max_risk": math.nan}, "max_risk must be a number"),
        ({"confidence": 1.0}, "confidence must be a number above 0 and below 1"),
        ({"confidence": 95}, "confidence must be a number above 0 and below 1"),
        ({"confidence": 0.9, "guarantee": "marginal"}, "a marginal guarantee holds on average and has no confidence"),
        ({"guarantee": "always"}, "guarantee must be 'selective' or 'marginal'"),
        ({"score": "doubt"}, "score must be 'entropy' or 'confidence' or 'epistemic' or 'std', or a function"),
        ({"score": "std"}, "score must be 'entropy', 'confidence', 'epistemic' for these predictions"),
        ({"score": 3}, "score must be"),
        ({"loss": "brier"}, "loss must be 'error', or a function"),
        ({"score": lambda pred: pred.probs}, "must give one real number an example"),
        ({"score": lambda pred: 3.0}, r"must give one real number an example, .* but gave a float"),
        ({"score": lambda pred: pred.entropy.log() * math.nan}, "hold 100 NaN values"),
        ({"score": lambda pred: -math.inf * pred.confidence}, "hold 100 infinite values"),
        ({"loss": lambda pred, y: 2 + pred.entropy}, r"must be in \[0, 1\], but goes from"),
        ({"loss": lambda pred, y: (pred.labels != y).sum()}, "must give one real number an example"),
        ({"targets": torch.zeros(99, dtype=torch.long)}, "one entry for each of 100 predictions"),
        ({"targets": torch.zeros(100)}, "integer class labels"),
        ({"targets": torch.full((100,), 3)}, "targets must be in 0 to 2"),
        ({"targets": [0] * 100}, "must be a tensor"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    held_out, targets = drawn(11, 100)
    arguments = {"max_risk": 0.1, **changes}
    with pytest.raises(InputError, match=said):
        abstention_rule(held_out, arguments.pop("targets", targets), **arguments)


def test_predictions_that_say_nothing_are_refused() -> None:
    held_out, targets = drawn(12, 100)
    assert isinstance(held_out, CategoricalPrediction)
    broken = replace(held_out, log_probs=held_out.log_probs.clone().index_fill_(0, torch.tensor([3]), math.nan))
    with pytest.raises(InputError, match="the scores 'entropy' of the held-out predictions hold 1 NaN"):
        abstention_rule(broken, targets, max_risk=0.1)
    none = replace(held_out, log_probs=held_out.log_probs[:0], aleatoric=held_out.aleatoric[:0])
    with pytest.raises(InputError, match="of no example"):
        abstention_rule(none, targets[:0], max_risk=0.1)
    with pytest.raises(InputError, match="no epistemic uncertainty"):
        abstention_rule(predicted(torch.randn(1, 50, 3), at_mean=True), targets[:50], max_risk=0.1, score="epistemic")
    with pytest.raises(InputError, match="marks examples to leave out"):
        abstention_rule(replace(held_out, ignore_index=0), targets, max_risk=0.1)
    numbers = predicted(torch.randn(4, 50), Gaussian(noise_std=1.0))
    with pytest.raises(InputError, match="never simply right or wrong"):
        abstention_rule(numbers, torch.zeros(50), max_risk=0.1, score="std")
    own = predicted(torch.randn(4, 50), CustomLikelihood(lambda out, y: -((out - y) ** 2)))
    with pytest.raises(InputError, match="no score of a CustomPrediction has a name"):
        abstention_rule(own, torch.zeros(50), max_risk=0.1)


def test_a_rule_is_for_predictions_made_in_the_same_way() -> None:
    held_out, targets = drawn(13, 500)
    rule = abstention_rule(held_out, targets, max_risk=0.1)
    cases = {
        "samples = 4, but these have 5": predicted(torch.randn(5, 10, 3)),
        "classes = 3, but these have 4": predicted(torch.randn(4, 10, 4)),
        "at_mean = False, but these have True": predicted(torch.randn(4, 10, 3), at_mean=True),
        "kind = 'CategoricalPrediction', but these have 'BernoulliPrediction'": predicted(
            torch.randn(4, 10), Bernoulli()
        ),
    }
    for said, other in cases.items():
        with pytest.raises(InputError, match=said):
            other.abstain(rule)
        with pytest.raises(InputError, match=said):
            evaluate_abstention(other, torch.zeros(10).long(), rule)
    new, new_targets = drawn(14, 20)
    assert isinstance(new, CategoricalPrediction)
    with pytest.raises(InputError, match="confidence must be"):
        evaluate_abstention(new, new_targets, rule, confidence=0)
    broken = replace(new, log_probs=torch.full_like(new.log_probs, math.nan))
    assert broken.abstain(rule).all()


def test_files_that_were_tampered_with_are_refused() -> None:
    held_out, targets = drawn(15, 500)
    good = abstention_rule(held_out, targets, max_risk=0.1).as_dict()
    bad = [
        {**good, "more": 1},
        {name: value for name, value in good.items() if name != "threshold"},
        {**good, "threshold": "0.3"},
        {**good, "threshold": math.nan},
        {**good, "threshold": None},
        {**good, "max_risk": 1.5},
        {**good, "confidence": None},
        {**good, "guarantee": "total"},
        {**good, "answered": 501},
        {**good, "answered": True},
        {**good, "examples": 0},
    ]
    for values in bad:
        with pytest.raises(InputError, match="abstention rule"):
            AbstentionRule.from_dict(values)
    with pytest.raises(InputError, match="abstention rule"):
        AbstentionRule.from_dict([good])  # type: ignore[arg-type]


def test_the_order_of_the_data_does_not_matter_where_scores_are_tied() -> None:
    # Half of the predictions are exactly the same, and their errors come first or last.
    probs = torch.tensor([[0.9, 0.1]]).repeat(400, 1)
    probs[200:, 0] += torch.linspace(0, 0.0999, 200)
    pred = predicted(probs.log()[None])
    wrong = torch.zeros(400, dtype=torch.long)
    wrong[:20] = 1
    rules = [
        abstention_rule(pred, targets, max_risk=0.1)
        for targets in (wrong, torch.cat([wrong[:200].flip(0), wrong[200:]]))
    ]
    assert rules[0] == rules[1]
    assert rules[0].coverage == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One tie of everything is answered whole or not at all.
        same = predicted(torch.zeros(1, 400, 2))
        assert abstention_rule(same, wrong, max_risk=0.1).coverage == 1
    with pytest.warns(UserWarning, match="answers nothing"):
        assert abstention_rule(same, torch.as_tensor(np.arange(400) % 5 == 0).long(), max_risk=0.1).coverage == 0
