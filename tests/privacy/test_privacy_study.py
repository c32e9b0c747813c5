"""The study from end to end: networks that memorise, networks that never saw the data, and what an attack may look at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core_models import mlp, trained
from stfbnn import Categorical, bayesianize, predict
from stfbnn.baselines import PointNetwork, Predictor
from stfbnn.errors import CheckpointError, InputError
from stfbnn.privacy.attacks import ShadowScores, membership_attacks
from stfbnn.privacy.figures import membership_figures
from stfbnn.privacy.releases import FirstLayer, Network, ReleaseData
from stfbnn.privacy.result import PrivacyStudy
from stfbnn.privacy.shadows import Design, TrainModel
from stfbnn.privacy.study import Attacker, privacy_study, threshold_privacy

CLASSES, INPUTS = 10, 20


def random_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels that only memory can tell."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, INPUTS, generator=random), torch.randint(0, CLASSES, (count,), generator=random)


def net(seed: int = 0) -> nn.Sequential:
    return mlp(INPUTS, 64, CLASSES, seed)


X, Y = random_labels(60, 0)
HELD = random_labels(40, 1)


def memorising(members: Tensor, seed: int) -> nn.Module:
    return trained(net(seed % 2**31), X[members], Y[members], steps=80)


def oblivious(members: Tensor, seed: int) -> nn.Module:
    """A network that was trained elsewhere."""
    return trained(net(seed % 2**31), *random_labels(30, seed % 2**31), steps=40)


def study(train_model: TrainModel = memorising, releases: Any = ("network",), **changed: object) -> PrivacyStudy:
    chosen = {"make_model": net, "held_out": HELD, "models": 6, "targets": 3, "seed": 1, "progress": False, **changed}
    return privacy_study(X, Y, train_model, releases, **chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def leaky() -> PrivacyStudy:
    releases = {
        "network": "network",
        "scaled": "temperature scaling",
        "ours": FirstLayer(epochs=2, temperatures=(0.01,), samples=4),
    }
    return study(releases=releases, artifact_draws=4)


def test_a_network_that_memorises_is_found_out(leaky: PrivacyStudy) -> None:
    attacks = leaky.releases["network"].attacks
    assert attacks["loss"].figures.auc.value > 0.95
    assert attacks["lira_online"].figures.auc.value > 0.95
    assert attacks["lira_online"].figures.auc.low > 0.9
    assert min(attacks["lira_online"].aucs) > 0.9
    assert attacks["correctness"].advantage.mean > 0.5
    assert len(attacks["loss"].aucs) == 3
    assert attacks["loss"].figures.members == 3 * 30
    assert leaky.releases["network"].accuracy_members.mean == 1.0
    assert leaky.releases["network"].accuracy_others.mean < 0.3
    assert attacks["loss"].finds


def test_temperature_scaling_hides_nothing_from_an_attack_that_only_ranks(leaky: PrivacyStudy) -> None:
    plain, scaled = (leaky.releases[name] for name in ("network", "scaled"))
    assert plain.accuracy_others == scaled.accuracy_others
    assert scaled.nll_others.mean < plain.nll_others.mean
    assert plain.attacks["correctness"].aucs == scaled.attacks["correctness"].aucs
    assert min(scaled.attacks["loss"].aucs) > 0.95


def test_a_posterior_is_attacked_by_its_predictive_and_its_file(leaky: PrivacyStudy) -> None:
    ours = leaky.releases["ours"]
    assert ours.has_file
    assert not leaky.releases["network"].has_file
    assert {one.name for one in ours.attacks.values() if one.on == "artifact"} == {
        "artifact_logistic",
        "artifact_boosting",
    }
    assert ours.strongest("artifact").figures.auc.value > 0.8
    assert ours.strongest("predictive").figures.auc.value > 0.8
    with pytest.raises(InputError, match="no attack on its artifact"):
        leaky.releases["network"].strongest("artifact")


def test_the_result_can_be_shown_and_written_down(leaky: PrivacyStudy) -> None:
    assert json.loads(json.dumps(leaky.as_dict(), allow_nan=False))["settings"]["models"] == 6
    assert leaky.table().row_count == 4
    assert leaky.class_table("ours").row_count == CLASSES
    assert leaky.attack_table().row_count == len(leaky.releases["network"].attacks)
    assert leaky.baseline == "network"
    assert "scaled" in leaky.verdict()


def test_networks_that_saw_neither_set_tell_nothing() -> None:
    # Posteriors, too, that were inferred on other data than the members.
    inferred = FirstLayer(epochs=1, temperatures=(0.1,), samples=4)

    def elsewhere(stage_one: nn.Module, data: ReleaseData, seed: int) -> Predictor:
        foreign = random_labels(30, seed % 2**31)
        return inferred(stage_one, replace(data, inputs=foreign[0], labels=foreign[1]), seed)

    found = study(oblivious, {"network": Network(), "elsewhere": elsewhere}, confidence=0.99, artifact_draws=3)
    for release in found.releases.values():
        assert len(release.attacks) in (10, 12)
        for attack in release.attacks.values():
            assert attack.figures.auc.low < 0.5 < attack.figures.auc.high, (release.name, attack.name)
        assert abs(release.accuracy_members.mean - release.accuracy_others.mean) < 0.1


def test_a_killed_study_equals_an_undisturbed_one(tmp_path: Path) -> None:
    releases = {"network": Network(), "ours": FirstLayer(epochs=1, temperatures=(0.1,), samples=2)}
    settings = {"artifact_draws": 2, "artifact_attacks": ("logistic",), "targets": 1}
    whole = study(oblivious, releases, **settings)
    calls = []

    def killed(members: Tensor, seed: int) -> nn.Module:
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return oblivious(members, seed)

    with pytest.raises(KeyboardInterrupt):
        study(killed, releases, folder=tmp_path, **settings)
    again = study(killed, releases, folder=tmp_path, **settings)
    assert len(calls) == 7
    assert again.as_dict() == whole.as_dict()
    with pytest.raises(CheckpointError, match="other settings"):
        study(killed, releases, folder=tmp_path, **{**settings, "seed": 2})


@pytest.fixture(scope="module")
def made_up() -> tuple[dict[str, Tensor], Tensor, Design]:
    random = torch.Generator().manual_seed(0)
    design = Design.balanced(50, 8, seed=0)
    logits = torch.randn(8, 50, CLASSES, generator=random)
    features = torch.randn(8, 50, 4, generator=random) + design.membership[:, :, None]
    labels = torch.randint(0, CLASSES, (50,), generator=random)
    return {"log_probs": logits.log_softmax(2), "features": features}, labels, design


def test_no_attack_looks_at_the_attacked_models_membership(made_up: tuple[dict[str, Tensor], Tensor, Design]) -> None:
    kept, labels, design = made_up
    membership = design.membership.clone()
    membership[3] = ~membership[3]
    attacks = ("logistic", "boosting")
    found = Attacker(kept, labels, design, attacks).attack(3)
    flipped = Attacker(kept, labels, Design(membership), attacks).attack(3)
    assert found.keys() == flipped.keys()
    assert len(found) == 12
    for name, scores in found.items():
        assert torch.equal(scores, flipped[name]), name


def test_the_numbers_of_shadow_models_tell_nothing() -> None:
    # Confidences that have nothing to do with membership. An example that the attacked model had was in two of the five others
    # and not in three, and the reverse: an attack on all of them answers to that.
    random = torch.Generator().manual_seed(0)
    design = Design.balanced(4000, 6, seed=0)
    kept = {"log_probs": torch.randn(6, 4000, CLASSES, generator=random).log_softmax(2)}
    labels, inside = torch.randint(0, CLASSES, (4000,), generator=random), design.membership[0]
    found = Attacker(kept, labels, design).attack(0)
    for name, scores in found.items():
        auc = membership_figures(scores, inside, confidence=0.99, bootstrap=100).auc
        assert auc.low < 0.5 < auc.high, name
    counted = ShadowScores.from_log_probs(kept["log_probs"][1:], labels, design.membership[1:])
    naive = membership_attacks(kept["log_probs"][0], labels, inside, shadow=counted)["lira_online"]
    auc = membership_figures(naive, inside, confidence=0.99, bootstrap=100).auc
    assert not auc.low < 0.5 < auc.high


def test_a_network_can_be_attacked_without_shadow_models() -> None:
    network = memorising(torch.arange(30), 0)
    found = threshold_privacy(PointNetwork(network, Categorical()), X[:30], Y[:30], X[30:], Y[30:])
    assert found.attacks["loss"].figures.auc.value > 0.95
    assert "lira_online" not in found.attacks
    assert found.accuracy_members.mean == 1.0
    with torch.no_grad():
        right = (network(X[30:]).argmax(1) == Y[30:]).double().mean()
    assert found.accuracy_others.mean == pytest.approx(float(right))
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.table().row_count == len(found.attacks)
    assert "predictor: the strongest of 5 attacks" in found.verdict()


def test_a_fitted_posterior_is_attacked_as_predict_answers() -> None:
    bnn = bayesianize(memorising(torch.arange(30), 0), X[:2])
    bnn.likelihood, bnn.predictive_temperature = Categorical(), 4.0
    found = threshold_privacy(bnn, X[:30], Y[:30], X[30:], Y[30:], samples=6, seed=2)
    expected = -predict(bnn, X[:30], samples=6, seed=2).log_density(Y[:30]).mean()
    assert found.nll_members.mean == pytest.approx(float(expected), rel=1e-5)


def test_a_network_without_memory_is_not_told_apart_from_guessing() -> None:
    network = PointNetwork(oblivious(torch.arange(30), 3), Categorical())
    found = threshold_privacy(network, X[:30], Y[:30], X[30:], Y[30:], confidence=0.99)
    assert all(one.figures.auc.low < 0.5 < one.figures.auc.high for one in found.attacks.values())
    assert "not told apart from guessing" in found.verdict()


def test_what_cannot_work_is_refused_before_any_training() -> None:
    def never(members: Tensor, seed: int) -> nn.Module:
        raise AssertionError("it was trained")

    for wrong, said in (
        ({"models": 7}, "even number"),
        ({"models": 4}, "at least 6"),
        ({"targets": 7}, "from 1 to 6"),
        ({"targets": 0}, "targets"),
        ({"releases": ["what"]}, "not known"),
        ({"held_out": HELD[0]}, "a pair"),
        ({"held_out": (HELD[0], HELD[1] + 2)}, "held-out examples span"),
        ({"held_out": (HELD[0] / 0, HELD[1])}, "NaN"),
        ({"make_model": lambda: mlp(INPUTS, 4, 2)}, "2 outputs"),
        ({"artifact_attacks": ("forest",)}, "forest"),
        ({"artifact_draws": 0}, "artifact_draws"),
        ({"fprs": (0.0,)}, "fprs"),
        ({"confidence": 1.0}, "confidence"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=said):
            study(never, **wrong)
