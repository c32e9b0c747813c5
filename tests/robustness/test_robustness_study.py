"""The study of robustness: figures as if everything were attacked, checks that fire where they must, and exact resumption."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stfbnn
from core_models import trained
from stfbnn.baselines import MCDropout
from stfbnn.data import load
from stfbnn.errors import CheckpointError, InputError
from stfbnn.likelihood import Categorical
from stfbnn.models import mlp
from stfbnn.robustness.attack import AttackResult
from stfbnn.robustness.gradient import GradientAttack, fgsm, pgd
from stfbnn.robustness.library import APGD, Square, Transfer
from stfbnn.robustness.result import Robustness
from stfbnn.robustness.study import default_attacks, evaluate_robustness, kind_of
from stfbnn.robustness.victim import Members, Victim, victim
from stfbnn.threat import InputSpace, Threat

EPSILONS = (0.05, 0.1, 0.2)
NAMES = (
    "one-step-beats-many",
    "black-box-beats-white-box",
    "no-gradients",
    "unbounded-attack-fails",
    "more-draws-fool-more",
    "accuracy-rises-with-epsilon",
)


@cache
def digits(count: int = 60) -> tuple[Tensor, Tensor]:
    train = load("digits").train
    return train.inputs[:count], train.targets[:count]


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    return trained(mlp((1, 8, 8), 10, hidden=32, depth=1), *digits(1000), steps=120)


class Changed(nn.Module):
    """A network whose gradients are masked, by rounding its inputs or by blowing up its outputs."""

    def __init__(self, levels: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.levels, self.scale = network(), levels, scale

    def forward(self, inputs: Tensor) -> Tensor:
        given = (inputs * self.levels).round() / self.levels if self.levels else inputs
        return self.inner(given) * self.scale


class Noisy(Victim):
    """Every member adds a random linear function of the inputs, by which a single one's gradient points anywhere."""

    random = True

    def __init__(self, noise: float, samples: int = 64) -> None:
        super().__init__(Categorical(), InputSpace(), 1.0, torch.device("cpu"))
        self._noise, self._deployed = noise, self.draw(samples, 0)

    def deployed(self) -> Members:
        return self._deployed

    def draw(self, count: int, seed: int) -> Members:
        generator = torch.Generator().manual_seed(seed)
        return Members(tuple(self._member(torch.randn(64, 10, generator=generator)) for _ in range(count)))

    def _member(self, weights: Tensor) -> Any:
        return lambda inputs: network()(inputs) + self._noise * (inputs - 0.5).flatten(1) @ weights


def failed(found: Robustness) -> set[str]:
    return {finding.name for finding in found.failed}


def quietly(*arguments: Any, **options: Any) -> Robustness:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate_robustness(*arguments, **options)


def strong() -> list[Any]:
    return [fgsm(), pgd(20), APGD(steps=20), Square(queries=150)]


def test_a_plain_network_raises_no_finding_and_no_warning() -> None:
    pytest.importorskip("pyautoattack")
    found = evaluate_robustness(victim(network()), *digits(), EPSILONS, attacks=strong())
    assert [finding.name for finding in found.findings] == list(NAMES)
    assert not found.failed
    assert [finding.name for finding in found.findings if finding.passed is None] == ["more-draws-fool-more"]
    assert found.draws is None
    assert found.clean.value > 0.9
    assert found.worst(0.05).value > 0.5
    assert found.worst(0.2).value < 0.1
    for one in found.outcomes:
        assert found.worst(one.epsilon).value <= one.accuracy.value <= found.clean.value


def test_rounded_inputs_are_flagged_as_masked_gradients() -> None:
    pytest.importorskip("pyautoattack")
    with pytest.warns(UserWarning, match=r"^[a-z-]+: ") as caught:
        found = evaluate_robustness(victim(Changed(levels=8)), *digits(), EPSILONS, attacks=strong())
    assert failed(found) == {"black-box-beats-white-box", "no-gradients", "unbounded-attack-fails"}
    assert sorted(str(one.message).split(":")[0] for one in caught) == sorted(failed(found))
    assert found.findings[2].numbers["share"] == 1.0
    # Yet the headline is that of the attack that found a way.
    assert found.outcome("PGD-20", 0.2).accuracy.value > 0.8
    assert found.worst(0.2).value < 0.1


def test_a_saturated_softmax_is_flagged_as_masked_gradients() -> None:
    found = quietly(victim(Changed(scale=1e4)), *digits(), EPSILONS, attacks=[fgsm(), pgd(20)])
    assert {"no-gradients", "unbounded-attack-fails"} <= failed(found)


def test_noise_that_hides_a_network_is_flagged_where_one_draw_is_taken() -> None:
    weak = pgd(10, knowledge="fresh", draws=1)
    found = quietly(Noisy(8.0, samples=128), *digits(), (0.1,), attacks=[weak], draw_counts=(1, 4, 16))
    assert "more-draws-fool-more" in failed(found)
    assert found.draws is not None
    first, last = found.draws.outcomes[0], found.draws.outcomes[-1]
    assert first.accuracy.value > last.accuracy.value + 0.15
    assert found.draws.needed is None
    calm = evaluate_robustness(Noisy(0.01, samples=8), *digits(), (0.1,), attacks=[weak], draw_counts=(1, 2, 4, 8))
    assert not calm.failed
    assert calm.draws is not None
    assert calm.draws.needed == 1
    # Two steps without a fall are enough, once the attack's own count is passed.
    assert calm.draws.counts == (1, 2, 4)


def test_the_curve_does_not_end_before_it_has_passed_the_count_of_the_attacks() -> None:
    taken = pgd(2, knowledge="fresh", draws=4)
    found = evaluate_robustness(
        Noisy(0.0, samples=2), *digits(20), (0.1,), attacks=[taken], draw_counts=(1, 2, 4, 8, 16)
    )
    assert found.draws is not None
    assert found.draws.counts == (1, 2, 4, 8)
    assert found.draws.needed == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_accuracies_are_those_of_attacking_every_example(norm: Any) -> None:
    radius = {"linf": 0.08, "l2": 0.6}[norm]
    inputs, targets = digits()
    # Some labels are false, so that the victim is wrong without an attack.
    targets = torch.where(torch.arange(len(targets)) % 7 == 0, (targets + 1) % 10, targets)
    attacked = victim(network())
    attacks = [fgsm(), pgd(10, random_start=False), pgd(7, random_start=False, loss="margin")]
    found = evaluate_robustness(attacked, inputs, targets, (radius,), norm=norm, attacks=attacks, checks=False)
    wrong = attacked.predict(inputs).labels != targets
    assert 5 < int(wrong.sum()) < 30
    for attack in attacks:
        alone = attack(attacked, inputs, targets, Threat(radius, norm))
        outcome = found.outcome(attack.name, radius)
        assert outcome.fooled == tuple((alone.fooled | wrong).tolist())
        assert outcome.accuracy.value == pytest.approx(alone.accuracy)
    assert found.findings == ()


def test_where_places_matter_everything_is_attacked_in_place() -> None:
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), *list(network().children())[1:])
    attacked = victim(MCDropout(dropout, Categorical(), samples=3))
    inputs, targets = digits()
    # All examples are one batch for the attack and for the prediction.
    attack = pgd(3, random_start=False)
    found = evaluate_robustness(attacked, inputs, targets, (0.1,), attacks=[attack], draw_counts=(1,), checks=False)
    assert found.settings["attacked"] == "all examples"
    wrong = attacked.predict(inputs).labels != targets
    assert 0 < int(wrong.sum()) < len(inputs)
    alone = attack(attacked, inputs, targets, Threat(0.1))
    assert found.outcomes[0].fooled == tuple((alone.fooled | wrong).tolist())
    assert found.draws is not None
    assert found.draws.needed is None


def test_a_bayesian_network_is_studied_from_end_to_end() -> None:
    inputs, targets = digits(200)
    bnn = stfbnn.bayesianize(network(), inputs[:2])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stfbnn.fit(bnn, loader, epochs=1, progress=False)
    attacks = {
        "one step": fgsm(),
        "fresh": pgd(5, knowledge="fresh", draws=2),
        "moved": Transfer(victim(network()), pgd(5)),
    }
    found = quietly(victim(bnn, samples=4), *digits(30), (0.05, 0.1), attacks=attacks, draw_counts=(1, 2, 4))
    assert found.attacks == ("one step", "fresh", "moved")
    assert found.settings["attacked"] == "the examples that are right without an attack"
    assert found.draws is not None
    assert found.draws.epsilon == 0.1
    assert found.findings[4].passed is not None
    assert found.outcome("moved", 0.1).kind == "black box"
    again = Robustness.from_dict(json.loads(json.dumps(found.as_dict(), allow_nan=False)))
    assert again == found


class Killed(BaseException):
    """What a signal raises."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts attacks by gradients, and kills the study at a chosen one."""
    state = {"made": 0, "last": 10**6}
    original = GradientAttack.__call__

    def counted(self: GradientAttack, *arguments: Any, **options: Any) -> AttackResult:
        if state["made"] == state["last"]:
            raise Killed
        state["made"] += 1
        return original(self, *arguments, **options)

    monkeypatch.setattr(GradientAttack, "__call__", counted)
    return state


def study(folder: Path | None, **changes: Any) -> Robustness:
    options = {"attacks": [fgsm(), pgd(20, knowledge="fresh", draws=2)], "draw_counts": (1, 2, 4), "seed": 3, **changes}
    return quietly(Noisy(0.3, samples=4), *digits(30), (0.05, 0.1), checkpoint=folder, **options)


@pytest.mark.parametrize("last", [1, 4, 6])
def test_a_killed_study_resumes_to_what_an_undisturbed_one_finds(
    tmp_path: Path, calls: dict[str, int], last: int
) -> None:
    undisturbed = study(None)
    whole = calls["made"]
    # The curve's attack with two draws is the table's own.
    assert whole == 2 * 2 + 2 + 1
    calls.update(made=0, last=last)
    with pytest.raises(Killed):
        study(tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.json"))) == last
    calls.update(made=0, last=10**6)
    resumed = study(tmp_path / "kept")
    assert calls["made"] == whole - last
    assert resumed == undisturbed
    calls.update(made=0)
    assert study(tmp_path / "kept") == undisturbed
    assert calls["made"] == 0


@pytest.mark.parametrize(
    "changes",
    [{"seed": 4}, {"attacks": [fgsm(), pgd(20, knowledge="fresh", draws=2, step_size=0.3)]}, {"norm": "l2"}],
)
def test_what_other_settings_left_is_not_taken(tmp_path: Path, calls: dict[str, int], changes: dict[str, Any]) -> None:
    study(tmp_path)
    calls["made"] = 0
    other = study(tmp_path, **changes)
    assert calls["made"] >= 2
    assert other == study(None, **changes)


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    first = study(tmp_path)
    paths = sorted(tmp_path.glob("*.json"))
    paths[0].write_text("{")
    paths[1].write_text(json.dumps({**json.loads(paths[1].read_text()), "fooled": "01"}))
    paths[2].write_text("[]")
    assert study(tmp_path) == first


def test_another_victim_or_other_labels_are_another_study(tmp_path: Path, calls: dict[str, int]) -> None:
    inputs, targets = digits(20)
    options = {"attacks": [fgsm()], "checks": False, "checkpoint": tmp_path}
    evaluate_robustness(victim(network()), inputs, targets, (0.1,), **options)
    evaluate_robustness(victim(network()), inputs, targets, (0.1,), **options)
    assert calls["made"] == 1
    evaluate_robustness(victim(network(), temperature=2.0), inputs, targets, (0.1,), **options)
    evaluate_robustness(
        victim(network()), inputs, torch.where(targets == targets[0], 1 - targets[0], targets), (0.1,), **options
    )
    evaluate_robustness(victim(network()), inputs.flip(-1), targets, (0.1,), **options)
    assert calls["made"] == 4
    moved = {**options, "attacks": [Transfer(victim(network()), fgsm())]}
    for _ in range(2):
        evaluate_robustness(victim(network()), inputs, targets, (0.1,), **moved)
    assert calls["made"] == 5
    moved["attacks"] = [Transfer(victim(Changed(scale=0.5)), fgsm())]
    evaluate_robustness(victim(network()), inputs, targets, (0.1,), **moved)
    assert calls["made"] == 6


def test_two_that_predict_alike_but_draw_otherwise_are_two_victims(tmp_path: Path, calls: dict[str, int]) -> None:
    options = {"attacks": [fgsm()], "checks": False, "checkpoint": tmp_path, "draw_counts": (1,)}
    one, other = Noisy(0.1, samples=2), Noisy(0.1, samples=2)
    other._noise = 0.4
    other.deployed = one.deployed  # type: ignore[method-assign]
    evaluate_robustness(one, *digits(20), (0.1,), **options)
    made = calls["made"]
    evaluate_robustness(other, *digits(20), (0.1,), **options)
    assert calls["made"] == 2 * made


def test_nothing_is_attacked_where_everything_is_wrong(calls: dict[str, int]) -> None:
    inputs, _ = digits(20)
    wrong = (victim(network()).predict(inputs).labels + 1) % 10
    found = evaluate_robustness(victim(network()), inputs, wrong, (0.1,), attacks=[fgsm()], checks=False)
    assert calls["made"] == 0
    assert found.clean.value == found.worst(0.1).value == 0


def test_the_default_attacks_follow_from_the_victim() -> None:
    pytest.importorskip("pyautoattack")
    images = digits(2)[0]
    plain, source = victim(network()), victim(Changed(levels=8))
    names = [attack.name for attack in default_attacks(plain, images, 10, source=source)]
    assert names == ["FGSM", "PGD-20", "APGD-CE-100", "APGD-DLR-100", "Square-1000", "PGD-20, transferred"]
    drawn = default_attacks(Noisy(0.1, samples=1), images, 10)
    assert [(one.knowledge, one.draws) for one in drawn[2:6]] == [("fresh", 8)] * 4
    assert [one.average for one in drawn[2:4]] == ["loss", "probability"]
    assert [kind_of(one) for one in drawn] == ["one step", *["many steps"] * 5, "black box"]
    assert [one.name for one in default_attacks(plain, images, 2)][2:] == ["APGD-CE-100", "Square-1000"]
    tabular = default_attacks(plain, torch.rand(2, 6), 3, "l2")
    assert not any(isinstance(one, Square) for one in tabular)


def test_without_the_package_there_are_the_attacks_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    attacks = default_attacks(victim(network()), digits(2)[0], 10)
    assert [one.name for one in attacks] == ["FGSM", "PGD-20"]


@dataclass(frozen=True)
class Own:
    """An attack of the user's own, which changes nothing."""

    helper: Any = None
    name: str = "own"

    def __call__(self, victim: Victim, inputs: Tensor, targets: Tensor, threat: Threat, **_: Any) -> AttackResult:
        prediction = victim.predict(inputs)
        return AttackResult(self.name, inputs, prediction.labels != targets, prediction)


def test_an_attack_of_the_users_own_counts_but_is_no_party_of_the_checks(tmp_path: Path) -> None:
    found = evaluate_robustness(victim(network()), *digits(20), (0.1, 0.2), attacks=[Own()], checkpoint=tmp_path)
    assert found.outcomes[0].kind == "other"
    assert found.worst(0.2) == found.clean
    assert [finding.passed for finding in found.findings] == [None, None, True, None, None, True]
    with pytest.raises(InputError, match=r"own holds a object, whose settings cannot be seen"):
        evaluate_robustness(victim(network()), *digits(20), attacks=[Own(object())], checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilons": ()}, "different positive numbers"),
        ({"epsilons": (0.1, 0.1)}, "different positive numbers"),
        ({"epsilons": (0.0, 0.1)}, "different positive numbers"),
        ({"epsilons": (-0.1,)}, "at least 0"),
        ({"norm": "l1"}, "norm must be"),
        ({"attacks": []}, "at least one attack"),
        ({"attacks": [pgd(2), pgd(2, step_size=0.1)]}, "two attacks are called 'PGD-2'"),
        ({"attacks": [pgd(2, targeted=True)]}, "targeted=False"),
        ({"attacks": {"text": "PGD"}}, "must be callable"),
        ({"draw_counts": ()}, "rising positive"),
        ({"draw_counts": (2, 1)}, "rising positive"),
        ({"draw_counts": (0, 1)}, "rising positive"),
        ({"seed": -1}, "non-negative"),
        ({"targets": torch.full((20,), 10)}, "class numbers from 0 to 9"),
        ({"inputs": torch.full((20, 1, 8, 8), 2.0)}, "before normalisation"),
        ({"victim": network()}, "attacks a Victim"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientAttack, "__call__", lambda *_, **__: pytest.fail("it began"))
    inputs, targets = digits(20)
    options = {"victim": victim(network()), "inputs": inputs, "targets": targets, "epsilons": (0.1,), **changes}
    with pytest.raises(InputError, match=message):
        evaluate_robustness(**options)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        evaluate_robustness(victim(network()), *digits(20), (0.1,), checkpoint=tmp_path / "file" / "inside")
