"""Detection of attacked inputs: figures by other means, thresholds by counting, attackers that know of the detector."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from attacked import network_victim, posterior_victim, unseen
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from stfbnn import Categorical
from stfbnn.errors import InputError
from stfbnn.evaluation.ood import ood_metrics
from stfbnn.robustness.detection import (
    SCORES,
    Attempt,
    Detection,
    Evasion,
    Separation,
    detection,
    score_of,
    score_of_members,
    threshold,
)
from stfbnn.robustness.gradient import pgd
from stfbnn.robustness.library import Square
from stfbnn.robustness.victim import NetworksVictim
from stfbnn.threat import InputSpace, Threat


class Leaning(nn.Module):
    """Label 1 where the first number is above ½; the second one makes two of these, of opposite signs, disagree."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        score = 16 * (x[:, 0] - 0.5) + 24 * self.sign * (x[:, 1] - 0.5)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def two_members() -> NetworksVictim:
    return NetworksVictim([Leaning(1.0), Leaning(-1.0)], Categorical(), InputSpace())


def agreed(count: int = 40) -> tuple[Tensor, Tensor]:
    """Inputs on which the two agree, near enough to the boundary to be moved over it."""
    random = torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([0.6 + 0.2 * random[:, 0], 0.45 + 0.1 * random[:, 1]], dim=1)
    labels = torch.arange(count) % 2
    x[labels == 0, 0] = 1 - x[labels == 0, 0]
    return x, labels


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shares", [None, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)])
def test_the_objective_has_the_gradient_of_finite_differences(score, shares):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3])
    objective = Evasion(score, 3.0, enough=2.5)
    assert torch.autograd.gradcheck(lambda one: objective(one.log_softmax(dim=2), targets, shares), (logits,))


def test_the_objective_is_the_margin_up_to_a_limit_less_the_weighted_score():
    probs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.4, 0.6]]], dtype=torch.float64)
    found = Evasion("one minus confidence", 2.0, enough=0.5)(probs.log(), torch.tensor([0, 0]), None)
    expected = [torch.log(torch.tensor(0.2 / 0.8)) - 2 * 0.2, torch.tensor(0.5) - 2 * 0.3]
    torch.testing.assert_close(found, torch.stack(expected).double())


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_members_are_those_of_their_prediction(score):
    victim, (x, _) = posterior_victim(), unseen(15)
    logs = torch.stack(list(victim.member_log_probs(x, victim.deployed()))).detach()
    torch.testing.assert_close(score_of_members(score, logs), score_of(score, victim.predict(x)), atol=1e-8, rtol=0)


def test_a_probability_of_zero_adds_nothing_to_a_score():
    logs = torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]], dtype=torch.float64)
    assert float(score_of_members("entropy", logs)) == pytest.approx(torch.tensor(2.0).log().item())
    assert float(score_of_members("epistemic", logs)) == pytest.approx(torch.tensor(2.0).log().item())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_the_threshold_is_the_lowest_with_so_few_false_alarms(values, allowed):
    clean = torch.tensor(values).double()
    found = threshold(clean, allowed)
    assert sum(one > found for one in values) <= allowed * len(values)
    lower = [one for one in values if one < found]
    assert not lower or sum(one > max(lower) for one in values) > allowed * len(values) - 1e-9


def test_figures_are_those_of_counting_and_of_scikit_learn():
    victim, (x, y) = posterior_victim(), unseen(60)
    attack, threat = pgd(5), Threat(0.1)
    found = detection(victim, x, y, threat, attack=attack, aware=False, false_alarms=0.1, seed=4, progress=False)
    prediction = victim.predict(x)
    right = prediction.labels == y
    result = attack(victim, x[right], y[right], threat, seed=4, progress=False)
    assert found.examples == int(right.sum())
    assert found.attempts[0].fooled == tuple(result.fooled.tolist())
    assert 0 < int(result.fooled.sum()) < found.examples
    for score in SCORES:
        clean, moved = score_of(score, prediction)[right], score_of(score, result.prediction)
        for values, kept in ((moved, "whole"), (moved[result.fooled], "fooling")):
            labels = [0] * len(clean) + [1] * len(values)
            area = roc_auc_score(labels, torch.cat([clean, values]).numpy())
            assert getattr(found.attempts[0].separations[score], kept).auroc == pytest.approx(area)
        limit = found.thresholds[score]
        assert int((clean > limit).sum()) <= 0.1 * len(clean)
        expected = [fooled and float(value) <= limit for fooled, value in zip(result.fooled, moved, strict=True)]
        assert found.attempts[0].unseen(score) == tuple(map(bool, expected))
        assert found.unseen_share(score).value == pytest.approx(sum(map(bool, expected)) / len(clean))


def test_an_attacker_who_knows_of_the_detector_is_not_seen():
    (x, y), threat = agreed(), Threat(0.35)
    found = detection(two_members(), x, y, threat, attack=pgd(20), scores=["epistemic"], seed=1, progress=False)
    plain, worst = found.attempts[0], found.worst("epistemic")
    # Steps that only fool make the members disagree, those that know of it move along the other direction.
    assert plain.separations["epistemic"].fooling.auroc > 0.95
    assert sum(plain.fooled) == found.examples == len(x)
    assert worst.evades == "epistemic"
    assert sum(worst.fooled) >= 0.8 * sum(plain.fooled)
    assert worst.separations["epistemic"].fooling.auroc < 0.6
    assert sum(plain.unseen("epistemic")) < 0.1 * len(x)
    assert found.unseen_share("epistemic").value > 0.5
    assert "where the attacker knows of it" in found.verdict()


def test_attacks_are_made_for_every_score_and_weight():
    (x, y), threat = agreed(6), Threat(0.3)
    found = detection(
        two_members(), x, y, threat, attack=pgd(2), scores=("entropy", "epistemic"), weights=(1, 5), progress=False
    )
    assert [(one.evades, one.weight) for one in found.attempts] == [
        (None, 0),
        ("entropy", 1),
        ("entropy", 5),
        ("epistemic", 1),
        ("epistemic", 5),
    ]
    assert found.scores == ("entropy", "epistemic")
    assert "keeping the entropy low, λ = 5" in found.attempts[2].attack
    again = detection(
        two_members(), x, y, threat, attack=pgd(2), scores=("entropy", "epistemic"), weights=(1, 5), progress=False
    )
    assert again == found


def test_the_epistemic_uncertainty_of_one_network_is_left_out():
    x, y = unseen(30)
    found = detection(network_victim(), x, y, Threat(0.1), attack=pgd(2), aware=False, progress=False)
    assert found.scores == ("entropy", "one minus confidence")
    assert "epistemic" not in json.dumps(found.as_dict())
    with pytest.raises(InputError, match="no score to detect by beside"):
        detection(network_victim(), x, y, Threat(0.1), attack=pgd(2), scores=["epistemic"])


def separation(clean: list[float], moved: list[float], fooled: list[bool], limit: float) -> Separation:
    fooling = [value for value, one in zip(moved, fooled, strict=True) if one]
    return Separation(
        ood_metrics(clean, moved), ood_metrics(clean, fooling) if fooling else None, tuple(v > limit for v in moved)
    )


def made() -> Detection:
    clean = [0.0, 0.1, 0.2, 0.3, 0.4, 0.9]

    def attempt(weight: float, fooled: list[bool], moved: list[float]) -> Attempt:
        evades = "entropy" if weight else None
        return Attempt(f"λ{weight}", evades, weight, tuple(fooled), {"entropy": separation(clean, moved, fooled, 0.4)})

    yes, no = True, False
    return Detection(
        epsilon=0.1,
        norm="linf",
        examples=6,
        false_alarms=0.2,
        thresholds={"entropy": 0.4},
        attempts=(
            attempt(0, [yes] * 5 + [no], [0.5, 0.6, 0.7, 0.8, 0.9, 0.1]),
            attempt(1, [yes] * 4 + [no, no], [0.3, 0.5, 0.6, 0.7, 0.1, 0.1]),
            attempt(2, [no] * 3 + [yes] * 3, [0.0, 0.0, 0.0, 0.1, 0.1, 0.1]),
        ),
    )


def test_the_worst_attack_still_has_to_fool_and_the_attacker_takes_what_works():
    found = made()
    # The third attack has the lowest AUROC, but fools 3 where the plain one fools 5.
    assert found.worst("entropy").weight == 1
    assert found.attempts[1].unseen("entropy") == (True, False, False, False, False, False)
    assert found.unseen("entropy") == (True, False, False, True, True, True)
    assert found.unseen_share("entropy").value == pytest.approx(4 / 6)


def test_a_score_that_nothing_gets_past_is_the_best():
    found = made()
    flagged = [
        replace(
            one, separations={**one.separations, "epistemic": replace(one.separations["entropy"], flagged=(True,) * 6)}
        )
        for one in found.attempts
    ]
    both = replace(found, thresholds={"entropy": 0.4, "epistemic": 0.1}, attempts=tuple(flagged))
    assert both.best() == "epistemic"
    assert "The epistemic uncertainty tells" in both.verdict()


def test_results_are_shown_and_kept():
    found = made()
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(found.table())
    text = console.export_text()
    assert "any of all" in text
    assert "66.7 %" in text
    kept = json.loads(json.dumps(found.as_dict()))
    assert kept["worst"] == {"entropy": 1}
    assert kept["attempts"][0]["scores"]["entropy"]["unseen"] == 0
    assert kept["attempts"][2]["scores"]["entropy"]["unseen"] == 3
    assert kept["unseen"]["entropy"]["value"] == pytest.approx(4 / 6)
    alone = replace(found, attempts=found.attempts[:1])
    assert "upper limit" in alone.verdict()


def test_an_attack_that_fools_nothing_leaves_nothing_to_detect():
    x, y = agreed(6)
    found = detection(two_members(), x, y, Threat(0.01), attack=pgd(2), weights=(1.0,), progress=False)
    assert found.attempts[0].separations["entropy"].fooling is None
    assert "nothing to detect" in found.verdict()
    found.table()
    json.dumps(found.as_dict())


def test_unusable_arguments_are_refused():
    victim, (x, y), threat = two_members(), agreed(6), Threat(0.1)
    with pytest.raises(InputError, match="a score must be one of"):
        detection(victim, x, y, threat, attack=pgd(2), scores=["std"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="no score to detect by"):
        detection(victim, x, y, threat, attack=pgd(2), scores=())
    with pytest.raises(InputError, match="false_alarms"):
        detection(victim, x, y, threat, attack=pgd(2), false_alarms=1.0)
    with pytest.raises(InputError, match="weight must be positive"):
        detection(victim, x, y, threat, attack=pgd(2), weights=(0.0,))
    with pytest.raises(InputError, match="at least one weight"):
        detection(victim, x, y, threat, attack=pgd(2), weights=())
    with pytest.raises(InputError, match="gradient attacks"):
        detection(victim, x, y, threat, attack=Square())
    with pytest.raises(InputError, match="gradient attacks"):
        detection(victim, x, y, threat, attack=pgd(2, objective=Evasion("entropy", 1.0)))
    with pytest.raises(InputError, match="not targeted"):
        detection(victim, x, y, threat, attack=pgd(2, targeted=True))
    with pytest.raises(InputError, match="classified rightly"):
        detection(victim, x, 1 - y, threat, attack=pgd(2))
    with pytest.raises(InputError, match="epsilon is 0"):
        detection(victim, x, y, Threat(0.0), attack=pgd(2))
    images, labels = unseen(3)
    with pytest.raises(InputError, match="at least 2 draws"):
        detection(posterior_victim(), images, labels, threat, attack=pgd(2, knowledge="fresh", draws=1))
