"""All attacks together: on networks that memorise, on ones that saw nothing, and beside another library's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.privacy.attacks import ATTACKS, ShadowScores, class_wise, membership_attacks
from stfbnn.privacy.figures import membership_figures
from stfbnn.privacy.lira import lira
from stfbnn.privacy.rmia import rmia
from stfbnn.privacy.scores import SCORES, scaled_confidence

THRESHOLDS = ["loss", "confidence", "entropy", "modified_entropy", "correctness"]


def random_case(seed: int, models: int = 9, examples: int = 60, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of some models, (models, N, K), labels and membership; the networks saw nothing of either set."""
    random = torch.Generator().manual_seed(seed)
    logs = 2 * torch.randn(models, examples, classes, generator=random, dtype=torch.float64)
    member = torch.rand(models, examples, generator=random) < 0.5
    member[1], member[2] = True, False
    labels = torch.arange(examples) % classes
    return logs.log_softmax(2), labels, member


def attacked(logs: Tensor, labels: Tensor, member: Tensor, **options: object) -> dict[str, Tensor]:
    """The first model under attack, the others as shadows."""
    shadow = ShadowScores.from_log_probs(logs[1:], labels, member[1:])
    return membership_attacks(logs[0], labels, member[0], shadow=shadow, **options)


@pytest.fixture(scope="module")
def memorising() -> tuple[Tensor, Tensor, Tensor]:
    """Networks that learn random labels by heart: there is nothing else to learn."""
    random = torch.Generator().manual_seed(0)
    examples, dims, classes, models = 120, 50, 20, 7
    inputs, labels = (
        torch.randn(examples, dims, generator=random),
        torch.randint(classes, (examples,), generator=random),
    )
    member = torch.rand(models, examples, generator=random) < 0.5
    member[1], member[2] = member[3], ~member[3]
    logs = []
    for own in member:
        layers = [
            torch.randn(dims, 100, generator=random) / dims**0.5,
            torch.randn(100, classes, generator=random) / 10,
        ]
        weights = [layer.requires_grad_() for layer in layers]
        optimiser = torch.optim.Adam(weights, lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            nn.functional.cross_entropy((inputs[own] @ weights[0]).relu() @ weights[1], labels[own]).backward()
            optimiser.step()
        with torch.no_grad():
            logs.append(((inputs @ weights[0]).relu() @ weights[1]).double().log_softmax(1))
    return torch.stack(logs), labels, member


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("confidence", "entropy", "correctness")])
def test_a_network_that_memorises_gives_its_members_away(name: str, memorising: tuple[Tensor, Tensor, Tensor]) -> None:
    logs, labels, member = memorising
    figures = membership_figures(attacked(logs, labels, member)[name], member[0])
    assert figures.auc.value > 0.95
    assert figures.auc.low > 0.9
    assert figures.held_out_advantage.value > 0.7


def test_the_gap_attacks_advantage_is_the_gap(memorising: tuple[Tensor, Tensor, Tensor]) -> None:
    logs, labels, member = memorising
    right = logs[0].argmax(1) == labels
    inside, outside = float(right[member[0]].double().mean()), float(right[~member[0]].double().mean())
    assert inside == 1
    assert outside < 0.5
    figures = membership_figures(attacked(logs, labels, member)["correctness"], member[0])
    assert figures.advantage.value == pytest.approx(inside - outside)


def test_networks_that_saw_nothing_give_nothing_away() -> None:
    covered = dict.fromkeys(ATTACKS, 0)
    for seed in range(40):
        logs, labels, member = random_case(seed)
        for name, scores in attacked(logs, labels, member).items():
            found = membership_figures(scores, member[0], bootstrap=100).auc
            covered[name] += found.low <= 0.5 <= found.high
    assert min(covered.values()) >= binom.ppf(1e-3 / len(ATTACKS), 40, 0.95), covered


def test_every_attack_is_there_in_order_and_is_what_its_function_gives() -> None:
    logs, labels, member = random_case(0)
    found = attacked(logs, labels, member, gamma=1.5, a=0.6, variance="global")
    assert list(found) == list(ATTACKS)
    assert all(scores.shape == (60,) and scores.dtype == torch.float64 for scores in found.values())
    for name in THRESHOLDS:
        assert torch.equal(found[name], SCORES[name](logs[0], labels))
    phi = torch.stack([scaled_confidence(one, labels) for one in logs])
    log_p = torch.stack([one[range(60), labels] for one in logs])
    for mode in ("online", "offline"):
        assert torch.equal(found[f"lira_{mode}"], lira(phi[0], phi[1:], member[1:], mode=mode, variance="global"))
        expected = rmia(log_p[0], log_p[1:], member[1:], mode=mode, gamma=1.5, a=0.6)
        assert torch.allclose(found[f"rmia_{mode}"], expected)


def test_without_shadows_there_are_thresholds_and_offline_no_shadow_that_had_the_example_counts() -> None:
    logs, labels, member = random_case(1)
    assert list(membership_attacks(logs[0], labels, member[0])) == THRESHOLDS
    offline = attacked(logs, labels, member, online=False)
    assert list(offline) == [*THRESHOLDS, "lira_offline", "rmia_offline"]
    # What shadows that had an example say of it does not matter.
    other = logs.clone()
    other[1:][member[1:]] = logs[1:][member[1:]].flip(-1)
    for name, scores in attacked(other, labels, member, online=False).items():
        assert torch.equal(scores, offline[name]), name
    # And the truth about the attacked model matters to no attack.
    for name, scores in attacked(logs, labels, torch.cat([~member[:1], member[1:]])).items():
        assert torch.equal(scores, attacked(logs, labels, member)[name]), name


def test_population_of_non_members() -> None:
    logs, labels, member = random_case(2)
    found = attacked(logs, labels, member, population="non-members")["rmia_online"]
    log_p = torch.stack([one[range(60), labels] for one in logs])
    assert torch.allclose(found, rmia(log_p[0], log_p[1:], member[1:], gamma=1, population=~member[0]))


def test_class_thresholds_are_the_best_of_each_class() -> None:
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(90) % 3
    member = torch.rand(5, 90, generator=random) < 0.5
    # Classes differ in what is usual; whole numbers, so that there are ties.
    scores = (4 * labels + 2 * member + 1.5 * torch.randn(5, 90, generator=random)).round().double()
    found = class_wise(scores[0], labels, scores[1:], member[1:])
    for label in range(3):
        own = labels == label
        values, truth = scores[1:, own].flatten().numpy(), member[1:, own].flatten().numpy()

        def gain(threshold: float, values: np.ndarray = values, truth: np.ndarray = truth) -> float:
            return float((values[truth] >= threshold).mean() - (values[~truth] >= threshold).mean())

        [threshold] = set((scores[0, own] - found[own]).tolist())
        assert gain(threshold) == pytest.approx(max(gain(value) for value in values))
    # Differences between classes no longer hide what differs between members and others.
    assert roc_auc_score(member[0], found) > roc_auc_score(member[0], scores[0]) + 0.05


def test_bad_input_is_named() -> None:
    logs, labels, member = random_case(0)
    shadow = ShadowScores.from_log_probs(logs[1:], labels, member[1:])
    assert len(shadow) == 8
    with pytest.raises(InputError, match=r"M x N shadow scores, but their shapes are \(50,\) and \(8, 60\)"):
        membership_attacks(logs[0, :50], labels[:50], member[0, :50], shadow=shadow)
    with pytest.raises(InputError, match=r"member must have shape \(60,\)"):
        membership_attacks(logs[0], labels, member, shadow=shadow)
    with pytest.raises(InputError, match="population must be"):
        membership_attacks(logs[0], labels, member[0], shadow=shadow, population="others")
    alone = ShadowScores(shadow.log_p, shadow.phi, torch.zeros_like(shadow.member))
    with pytest.raises(InputError, match="60 of 60 examples have no shadow model trained with them"):
        membership_attacks(logs[0], labels, member[0], shadow=alone)
    assert "lira_offline" in membership_attacks(logs[0], labels, member[0], shadow=alone, online=False)
    with pytest.raises(InputError, match="no shadow models"):
        ShadowScores.from_log_probs([], labels, member[1:])
    with pytest.raises(InputError, match=r"shadow membership must have shape \(8, 60\)"):
        ShadowScores(shadow.log_p, shadow.phi, shadow.member[1:])
    with pytest.raises(InputError, match=r"of one shape \(M, N\)"):
        ShadowScores(shadow.log_p, shadow.phi[1:], shadow.member)
    broken = shadow.phi.clone()
    broken[3, 5] = math.inf
    with pytest.raises(InputError, match="shadow φ hold 1 infinite"):
        ShadowScores(shadow.log_p, broken, shadow.member)
    with pytest.raises(InputError, match="class 1 needs shadow models"):
        class_wise([0.0, 0.0], [0, 1], torch.zeros(2, 2), torch.tensor([[True, True], [False, True]]))


def gaussian_predictions(distance: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of two classes whose φ is N(±distance / 2, 1) for members and others, labels and membership."""
    random = np.random.default_rng(0)
    member = np.arange(count) % 2 == 0
    labels = random.integers(0, 2, count)
    phi = random.standard_normal(count) + distance * (member - 0.5)
    right = 1 / (1 + np.exp(-phi))
    return np.where(labels[:, None] == [0, 1], right[:, None], 1 - right[:, None]), labels, member


def test_correctness_is_the_rule_of_another_library() -> None:
    inference = pytest.importorskip("art.attacks.inference.membership_inference")
    classification = pytest.importorskip("art.estimators.classification")
    probs, labels, member = gaussian_predictions(2.0, 2000)
    # A "network" that looks up the prediction of the example whose number it is given.
    classifier = classification.BlackBoxClassifier(lambda x: probs[x[:, 0].astype(int)], (1,), 2)
    theirs = inference.MembershipInferenceBlackBoxRuleBased(classifier).infer(np.arange(2000.0)[:, None], labels)
    ours = membership_attacks(np.log(probs), labels, member)["correctness"]
    assert ours.tolist() == theirs.tolist()
    assert 0 < ours.mean() < 1


@pytest.mark.parametrize("distance", [1.0, 2.5])
class Odds(nn.Module):
    """A network of two classes whose log odds are its one input."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(inputs), inputs], dim=1)


@pytest.mark.parametrize("distance", [1.0, 2.5])
def test_thresholds_and_another_librarys_learnt_attack_reach_the_same_optimum(distance: float) -> None:
    inference = pytest.importorskip("art.attacks.inference.membership_inference")
    classification = pytest.importorskip("art.estimators.classification")
    count = 6000
    probs, labels, member = gaussian_predictions(distance, count)
    best = norm.cdf(distance / 2)
    # Three standard errors of what is measured on half of the examples.
    tolerance = 3 * math.sqrt(best * (1 - best) / (count / 2))

    inputs = np.log(probs[:, 1:] / probs[:, :1]).astype(np.float32)
    classifier = classification.PyTorchClassifier(Odds(), nn.CrossEntropyLoss(), (1,), 2, device_type="cpu")
    attack = inference.MembershipInferenceBlackBox(classifier, input_type="loss", attack_model_type="gb")
    first = np.arange(count) < count // 2
    inside, outside = first & member, first & ~member
    attack.fit(inputs[inside], labels[inside], inputs[outside], labels[outside])
    theirs = float((attack.infer(inputs[~first], labels[~first]).ravel() == member[~first]).mean())
    assert theirs == pytest.approx(best, abs=tolerance)

    scores = membership_attacks(np.log(probs), labels, member)
    for name in ("loss", "modified_entropy"):
        accuracy = membership_figures(scores[name], member, bootstrap=100).balanced_accuracy.value
        assert accuracy == pytest.approx(best, abs=tolerance), name
        assert accuracy > theirs - tolerance, name
