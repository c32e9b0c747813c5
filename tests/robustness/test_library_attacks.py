"""Attacks through pyautoattack, and transfer, against closed forms and our own gradient attacks."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from attacked import (
    best_change,
    digits,
    dropout_victim,
    linear,
    margins,
    middle,
    network_victim,
    posterior_victim,
    small_net,
    unseen,
)
from torch import Tensor, nn

from stfbnn import Categorical
from stfbnn.errors import InputError
from stfbnn.randomness import seeded
from stfbnn.robustness.attack import Attack
from stfbnn.robustness.gradient import fgsm, pgd
from stfbnn.robustness.library import APGD, Square, Transfer
from stfbnn.robustness.victim import NetworksVictim, victim
from stfbnn.threat import InputSpace, Norm, Threat

norms = pytest.mark.parametrize("norm", ["linf", "l2"])
library = pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is None, reason="pyautoattack is not installed")


def aimed(space: InputSpace, x: Tensor) -> tuple[NetworksVictim, Tensor]:
    """A linear victim, and its own labels, so that nothing is fooled from the start."""
    model = linear(x[0].numel(), space=space)
    return model, model.predict(x).labels


@library
@norms
@pytest.mark.parametrize("space", [InputSpace(), InputSpace(-3.0, 5.0)], ids=["unit", "wide"])
def test_apgd_reaches_the_optimum_of_a_linear_model(space: InputSpace, norm: Norm) -> None:
    """On inputs that no change of this size can fool: the margin goes as far as it can."""
    x = middle()
    model, y = aimed(space, x)
    threat = Threat(0.02, norm)
    found = APGD(steps=60)(model, x, y, threat).inputs
    best = margins(model, x + best_change(model, y, threat), y)
    reached, clean = margins(model, found, y), margins(model, x, y)
    fooled = best > 0
    assert (reached <= best + 1e-9).all()
    assert torch.equal(reached > 0, fooled)
    assert (reached >= best - 1e-3 * (best - clean))[~fooled].all()
    assert (~fooled).any()


@library
@norms
def test_apgd_fools_whatever_can_be_fooled(norm: Norm) -> None:
    x = middle(60)
    model, y = aimed(InputSpace(), x)
    for epsilon in (0.03, 0.1, 0.2):
        threat = Threat(epsilon, norm)
        expected = margins(model, x + best_change(model, y, threat), y) > 0
        assert int(expected.sum()) > 0
        assert torch.equal(APGD(steps=30)(model, x, y, threat).fooled, expected)


@library
@norms
def test_square_comes_near_the_optimum_and_never_passes_it(norm: Norm) -> None:
    random_ = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(6, 1, 6, 6, generator=random_, dtype=torch.float64)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2).double())
    model = NetworksVictim([net], Categorical(), InputSpace())
    y, weight = model.predict(x).labels, net[1].weight.detach()
    slope = weight[1 - y] - weight[y]
    epsilon = 0.02 if norm == "linf" else 0.08
    gain = epsilon * (slope.abs().sum(1) if norm == "linf" else slope.norm(dim=1))
    clean = margins(model, x, y)
    found = Square(queries=400)(model, x, y, Threat(epsilon, norm))
    reached = margins(model, found.inputs, y)
    assert (reached <= clean + gain + 1e-9).all()
    # Those that it fools it leaves where they are.
    enough = torch.where(reached > 0, torch.zeros(()), clean + (0.6 if norm == "linf" else 0.3) * gain)
    assert (reached >= enough).all()
    assert (reached <= 0).any()


@library
def test_columns_and_pictures_without_channels_are_attacked_too() -> None:
    x, y = unseen(20)
    threat = Threat(0.15)
    for shape in ((64,), (8, 8)):
        found = Square(queries=150)(network_victim(), x.reshape(20, *shape), y, threat)
        assert found.inputs.shape == (20, *shape)
        assert found.accuracy < 0.8


ATTACKS: list[Attack] = [
    APGD(steps=4, restarts=2),
    APGD(steps=4, loss="dlr", knowledge="fresh", draws=3),
    APGD(steps=4, loss="dlr-targeted", target_classes=2, knowledge="common", draws=3),
    Square(queries=20, restarts=2),
    Square(queries=20, knowledge="fresh", draws=3),
]
attacks = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


@library
@norms
@attacks
def test_nothing_leaks_and_nothing_leaves_the_threat(
    attack: Attack, norm: Norm, capfd: pytest.CaptureFixture[str]
) -> None:
    x, y = unseen(12)
    # Made first: they are trained when they are first asked for, from the global generator.
    victims = posterior_victim(3), dropout_victim(2), network_victim()
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for attacked in victims:
        found = attack(attacked, x, y, Threat(0.1, norm), seed=3, progress=False)
        delta = (found.inputs - x).double().flatten(1)
        assert float((delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max()) <= 0.1 + 1e-6
        assert 0 <= float(found.inputs.min()) <= float(found.inputs.max()) <= 1
        assert torch.equal(found.fooled, attacked.predict(found.inputs).labels != y)
    assert torch.equal(attack(attacked, x, y, Threat(0.1, norm), seed=3).inputs, found.inputs)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]
    assert capfd.readouterr() == ("", "")


@library
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (APGD(steps=5), APGD(steps=5, batch_size=7)),
        (APGD(steps=5, knowledge="fresh", draws=2), APGD(steps=5, knowledge="fresh", draws=2, batch_size=7)),
        (Square(queries=20), Square(queries=20, batch_size=7)),
        (Square(queries=20, knowledge="fresh", draws=2), Square(queries=20, knowledge="fresh", draws=2, batch_size=7)),
    ],
)
def test_the_batch_size_changes_nothing(one: Attack, other: Attack) -> None:
    x, y = unseen(20)
    attacked, threat = posterior_victim(3), Threat(0.05)
    found = [attack(attacked, x, y, threat, seed=1).prediction.log_probs for attack in (one, other)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@library
def test_fresh_draws_are_new_at_every_call_and_common_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = unseen(6)
    attacked = posterior_victim(2)
    seen: list[tuple[int, int]] = []
    plain = attacked.draw
    monkeypatch.setattr(attacked, "draw", lambda count, seed: (seen.append((count, seed)), plain(count, seed))[1])
    APGD(steps=3, knowledge="fresh", draws=5)(attacked, x, y, Threat(0.05))
    single = [seed for count, seed in seen if count == 1]
    assert len(set(single)) == len(single) == 5 * 4  # five draws at the start and at each of three steps
    assert {count for count, _ in seen} == {1, 32}
    seen.clear()
    APGD(steps=3, knowledge="common", draws=5, restarts=2)(attacked, x, y, Threat(0.05))
    assert len({seed for count, seed in seen if count == 5}) == 2
    seen.clear()
    Square(queries=10, knowledge="fresh", draws=4)(attacked, x, y, Threat(1e-4))
    assert len({seed for count, seed in seen if count == 4}) == 11
    seen.clear()
    for attack in (APGD(steps=3), Square(queries=5)):
        attack(attacked, x, y, Threat(0.05))
    assert not seen


@library
def test_apgd_is_no_weaker_than_pgd_and_both_than_square() -> None:
    x, y = unseen(150)
    attacked, threat = posterior_victim(4), Threat(0.06)
    own = pgd(20, average="probability")(attacked, x, y, threat).accuracy
    theirs = {loss: APGD(steps=20, loss=loss)(attacked, x, y, threat).accuracy for loss in ("ce", "dlr")}  # type: ignore[arg-type]
    towards = APGD(steps=20, loss="dlr-targeted", target_classes=4)(attacked, x, y, threat).accuracy
    square = Square(queries=150)(attacked, x, y, threat).accuracy
    assert max(theirs.values()) < own + 0.04
    assert towards < own + 0.02
    assert own < square < float((attacked.predict(x).labels == y).double().mean())


@library
@norms
def test_apgd_fools_what_the_package_fools_when_asked_directly(norm: Norm) -> None:
    x, y = unseen(150)
    attacked, threat = posterior_victim(3), Threat(0.05 if norm == "linf" else 0.3, norm)

    def scores(points: Tensor) -> Tensor:
        return attacked.log_predictive(points, attacked.deployed())

    with seeded(0):
        package = importlib.import_module("pyautoattack.autopgd_base")
        run = package.APGDAttack(scores, n_iter=15, norm={"linf": "Linf", "l2": "L2"}[norm], eps=threat.epsilon)
        theirs = attacked.predict(run.perturb(x, y)).labels != y
    ours = APGD(steps=15)(attacked, x, y, threat).fooled
    # They begin elsewhere.
    assert int((ours != theirs).sum()) <= 4
    assert 20 < int(ours.sum()) < 130


@library
def test_what_is_wrong_already_is_left_alone() -> None:
    x, _ = unseen(6)
    attacked = network_victim()
    wrong = (attacked.predict(x).labels + 1) % 10
    for attack in (APGD(steps=3), Square(queries=3)):
        found = attack(attacked, x, wrong, Threat(0.1))
        assert torch.equal(found.inputs, x)
        assert found.fooled.all()


class Masked(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, small_net()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cut":
            return self.inner(x.detach()).detach()  # type: ignore[no-any-return]
        if self.kind == "constant":
            return 0 * self.inner(x)  # type: ignore[no-any-return]
        return self.inner(x) + 0 * x.flatten(1).sqrt().sum(1, keepdim=True)  # type: ignore[no-any-return]


@library
@pytest.mark.parametrize("kind", ["cut", "constant", "nan"])
def test_networks_without_gradients_are_no_mistake(kind: str) -> None:
    x, _ = unseen(5)
    attacked = victim(Masked(kind))
    y = attacked.predict(x).labels
    for attack in (APGD(steps=3, loss="dlr"), Square(queries=5)):
        assert attack(attacked, x, y, Threat(0.02)).inputs.isfinite().all()


def test_a_transfer_finds_on_the_source_and_judges_on_the_victim() -> None:
    x, y = unseen(100)
    source, attacked, threat = network_victim(1), network_victim(0), Threat(0.08)
    crafted = pgd(10)(source, x, y, threat, seed=4)
    found = Transfer(source, pgd(10))(attacked, x, y, threat, seed=4)
    assert torch.equal(found.inputs, crafted.inputs)
    assert torch.equal(found.fooled, attacked.predict(crafted.inputs).labels != y)
    assert found.notes == {"source_accuracy": crafted.accuracy}
    assert found.name == "PGD-10, transferred"
    clean = float((attacked.predict(x).labels == y).double().mean())
    assert pgd(10)(attacked, x, y, threat).accuracy < found.accuracy < clean
    goal = (y + 1) % 10
    aimed_at = Transfer(source, pgd(10, targeted=True))(attacked, x, goal, threat)
    assert torch.equal(aimed_at.fooled, aimed_at.prediction.labels == goal)


def test_source_and_victim_must_speak_of_the_same_inputs() -> None:
    x, y = unseen(4)
    wide = NetworksVictim([small_net()], Categorical(), InputSpace(-1.0, 1.0))
    with pytest.raises(InputError, match="one range of inputs"):
        Transfer(wide, fgsm())(network_victim(), x, y, Threat(0.1))
    normalised = NetworksVictim([small_net()], Categorical(), InputSpace(mean=(0.1,), std=(1.0,)))
    Transfer(normalised, fgsm())(network_victim(), x, y, Threat(0.1))
    torch.manual_seed(0)
    fewer = victim(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(InputError, match="3 classes apart, but the victim 10"):
        Transfer(fewer, fgsm())(network_victim(), x, torch.zeros(4).long(), Threat(0.1))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = unseen(2)

    def missing(name: str, *_: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="pyautoattack")

    monkeypatch.setattr("stfbnn.robustness.library.importlib.import_module", missing)
    for attack in (APGD(), Square()):
        with pytest.raises(InputError, match=r'pip install "stfbnn\[attacks\]"'):
            attack(network_victim(), x, y, Threat(0.1))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (APGD, {"steps": 0}, "steps"),
        (APGD, {"loss": "margin"}, "'dlr-targeted'"),
        (APGD, {"knowledge": "none"}, "'fresh'"),
        (APGD, {"target_classes": 0}, "target_classes"),
        (Square, {"queries": -1}, "queries"),
        (Square, {"restarts": 0}, "restarts"),
        (Square, {"knowledge": ""}, "knowledge"),
    ],
)
def test_impossible_settings_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


@library
def test_inputs_and_classes_must_suit_the_attack() -> None:
    x, y = unseen(2)
    small = digits()[0][:2, :, :4, :4]
    torch.manual_seed(0)
    on_small = victim(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    with pytest.raises(InputError, match="5 × 5"):
        Square()(on_small, small, torch.zeros(2).long(), Threat(0.1, "l2"))
    with pytest.raises(InputError, match=r"\(B, C, H, W\)"):
        Square()(network_victim(), x.reshape(2, 1, 2, 4, 8), y, Threat(0.1))
    with pytest.raises(InputError, match="at least 4 classes"):
        APGD(loss="dlr-targeted")(on_small, small, torch.zeros(2).long(), Threat(0.1))
    with pytest.raises(InputError, match="at least 3 classes"):
        APGD(loss="dlr")(linear(), middle(2), torch.zeros(2).long(), Threat(0.1))
    with pytest.raises(InputError, match="epsilon is 0"):
        Square()(network_victim(), x, y, Threat(0.0))


def test_names_say_what_was_done() -> None:
    assert APGD().name == "APGD-CE-100"
    assert APGD(loss="dlr", steps=7, restarts=2, knowledge="fresh").name == "APGD-DLR-7 × 2, 8 fresh draws"
    assert APGD(loss="dlr-targeted").name == "APGD-T-100"
    assert Square(queries=50, knowledge="common", draws=2).name == "Square-50, 2 common draws"
