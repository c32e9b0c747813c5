"""Gradient attacks: the optimum of linear models, gradients by other means, and what an attack must never do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attacked import (
    Counting,
    bayesian,
    best_change,
    dropout_victim,
    layer_of,
    linear,
    margins,
    middle,
    network_victim,
    posterior_victim,
    small_net,
    unseen,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from stfbnn import Categorical
from stfbnn.draws import Draws
from stfbnn.errors import InputError
from stfbnn.robustness.attack import Best, judge
from stfbnn.robustness.gradient import GradientAttack, fgsm, input_gradient, pgd, random_start
from stfbnn.robustness.victim import Members, NetworksVictim, victim
from stfbnn.threat import InputSpace, Norm, Threat

norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@norms
@pytest.mark.parametrize(
    "attack",
    [
        fgsm(),
        fgsm(loss="margin"),
        pgd(10),
        pgd(40, loss="margin", restarts=2),
        pgd(20, average="probability"),
        pgd(40, step_size=1.0),
    ],
    ids=lambda attack: f"{attack.name}, step {attack.step_size}",
)
def test_on_a_linear_model_the_optimum_is_reached(attack: GradientAttack, norm: Norm) -> None:
    model, x, threat = linear(), middle(), Threat(0.2, norm)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    found = attack(model, x, y, threat, seed=2)
    expected = x + best_change(model, y, threat)
    if norm == "linf" or attack.steps == 1:
        torch.testing.assert_close(found.inputs, expected, rtol=0, atol=1e-9)
    # On the sphere short steps turn towards the optimum without quite arriving there.
    clean, reached, best = (margins(model, points, y) for points in (x, found.inputs, expected))
    short = 0.05 if norm == "l2" and attack.step_size is None else 1e-6
    assert (reached <= best + 1e-9).all()
    assert (reached >= best - short * (best - clean)).all()
    assert torch.equal(found.fooled, layer_of(model)(expected).argmax(1) != y)
    assert found.notes == {"zero_gradient_share": 0.0}


@norms
def test_targeted_attacks_reach_the_optimum_towards_their_class(norm: Norm) -> None:
    model, x, threat = linear(), middle(), Threat(0.2, norm)
    goal = torch.tensor([0, 1, 1, 0, 0, 1])
    found = fgsm(targeted=True)(model, x, goal, threat)
    expected = x - best_change(model, goal, threat)
    torch.testing.assert_close(found.inputs, expected, rtol=0, atol=1e-9)
    assert torch.equal(found.fooled, layer_of(model)(expected).argmax(1) == goal)
    assert found.accuracy == pytest.approx(1 - float(found.fooled.double().mean()))
    several = linear(classes=5)
    goals = layer_of(several)(x).argsort(dim=1)[:, -2]
    assert pgd(20, targeted=True, loss="margin")(several, x, goals, Threat(0.2, norm)).fooled.all()
    assert not pgd(20, targeted=True)(several, x, goals, Threat(1e-6, norm)).fooled.any()


@norms
def test_the_range_binds_before_the_radius(norm: Norm) -> None:
    model, y = linear(), torch.tensor([0, 1])
    x = torch.cat([torch.zeros(1, 12), torch.ones(1, 12)]).double()
    found = pgd(20)(model, x, y, Threat(50.0, norm)).inputs
    corner = (best_change(model, y, Threat(1.0)) > 0).double()
    if norm == "linf":
        torch.testing.assert_close(found, corner)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@settings(max_examples=25, deadline=None)
@given(
    epsilon=st.floats(1e-4, 3),
    norm=st.sampled_from(["linf", "l2"]),
    steps=st.integers(1, 4),
    step_size=st.one_of(st.none(), st.floats(0.01, 50)),
    knowledge=st.sampled_from(["deployed", "common", "fresh"]),
    loss=st.sampled_from(["ce", "margin", "dlr"]),
    start=st.booleans(),
    seed=st.integers(0, 100),
)
def test_no_attack_leaves_its_threat_or_the_range(
    epsilon: float, norm: Norm, steps: int, step_size: float | None, knowledge: str, loss: str, start: bool, seed: int
) -> None:
    x, y = unseen(6)
    attack = GradientAttack(
        steps=steps,
        step_size=step_size,
        knowledge=knowledge,  # type: ignore[arg-type]
        loss=loss,  # type: ignore[arg-type]
        random_start=start,
        draws=2,
    )
    threat = Threat(epsilon, norm)
    found = attack(posterior_victim(2), x, y, threat, seed=seed)
    delta = (found.inputs - x).double().flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert float(length.max()) <= epsilon * (1 + 1e-5) + 1e-5
    assert 0 <= float(found.inputs.min()) <= float(found.inputs.max()) <= 1


def single_gradients(x: Tensor, y: Tensor, samples: int, seed: int) -> list[Tensor]:
    """Of −log p_y under each draw, by PyTorch alone: the user's network with the draw's weights put in."""
    bnn, net = bayesian(), small_net()
    draws = Draws(bnn, samples, seed)
    found = []
    for index in range(samples):
        vector, leaf = draws.vector(index), x.clone().requires_grad_()
        names = {"1.weight": (24, 64), "1.bias": (24,)}
        pieces = dict(zip(names, vector.split([24 * 64, 24]), strict=True))
        outputs = functional_call(net, {name: pieces[name].view(shape) for name, shape in names.items()}, (leaf,))
        loss = nn.functional.cross_entropy(outputs, y, reduction="sum")
        found.append(torch.autograd.grad(loss, leaf)[0])
    return found


def test_the_averaged_gradient_is_the_mean_of_those_of_single_draws() -> None:
    x, y = unseen(7)
    attacked = posterior_victim(6, seed=3)
    expected = torch.stack(single_gradients(x, y, 6, 3)).mean(0)
    found, logs = input_gradient(attacked, x, y, attacked.deployed())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert logs.shape == (6, 7, 10)
    targeted, _ = input_gradient(attacked, x, y, attacked.deployed(), targeted=True)
    torch.testing.assert_close(targeted, -found)


def test_draws_count_by_their_shares() -> None:
    x, y = unseen(5)
    members = posterior_victim(2, seed=3).deployed()
    shares = torch.tensor([0.8, 0.2], dtype=torch.float64)
    found, _ = input_gradient(posterior_victim(), x, y, Members(members.functions, shares))
    one, other = single_gradients(x, y, 2, 3)
    torch.testing.assert_close(found, 0.8 * one + 0.2 * other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_the_gradient_of_the_averaged_probability_is_that_of_finite_differences(loss: str) -> None:
    attacked, x, y = Counting(), middle(3), torch.tensor([0, 2, 3])
    members = attacked.draw(5, 7)
    found, _ = input_gradient(attacked, x, y, members, average="probability", loss=loss)  # type: ignore[arg-type]

    def value(points: Tensor) -> Tensor:
        p = torch.stack([function(points).softmax(1) for function in members.functions]).mean(0)
        right = p[torch.arange(3), y]
        if loss == "ce":
            return -right.log()
        ranked = p.log().sort(dim=1, descending=True).values
        others = torch.where(p.argmax(1) == y, ranked[:, 1], ranked[:, 0])
        return (others - right.log()) / (1 if loss == "margin" else ranked[:, 0] - ranked[:, 2])

    step = 1e-5
    for column in range(12):
        change = torch.zeros_like(x)
        change[:, column] = step
        slope = (value(x + change) - value(x - change)) / (2 * step)
        torch.testing.assert_close(found[:, column], slope, rtol=1e-5, atol=1e-7)
    # It is another direction than that of the averaged losses.
    assert not torch.isclose(found, input_gradient(attacked, x, y, members, loss=loss)[0], rtol=1e-2).all()  # type: ignore[arg-type]


def test_fresh_draws_differ_from_step_to_step_and_common_ones_do_not() -> None:
    attacked, x, y = Counting(), middle(), torch.zeros(6).long()
    attack = pgd(5, knowledge="fresh", draws=2)
    attack(attacked, x, y, Threat(0.1))
    assert len(set(attacked.seeds)) == len(attacked.seeds) == 6  # at the clean input, and at five steps
    attacked.seeds.clear()
    replace(attack, knowledge="common")(attacked, x, y, Threat(0.1))
    assert len(set(attacked.seeds)) == 1
    attacked.seeds.clear()
    replace(attack, knowledge="common", restarts=3)(attacked, x, y, Threat(0.1))
    assert len(set(attacked.seeds)) == 4  # one set a restart, and one that judges
    attacked.seeds.clear()
    replace(attack, knowledge="deployed")(attacked, x, y, Threat(0.1))
    assert not attacked.seeds


def test_an_attacker_that_sees_less_fools_less() -> None:
    x, y = unseen(150)
    attacked, threat = posterior_victim(6), Threat(0.05)
    seen = pgd(10)(attacked, x, y, threat)
    fresh = pgd(10, knowledge="fresh")(attacked, x, y, threat)
    clean = float((attacked.predict(x).labels == y).double().mean())
    assert seen.accuracy < fresh.accuracy < clean


def test_victims_that_draw_nothing_are_the_same_to_all_attackers() -> None:
    x, y = unseen(10)
    found = [
        pgd(5, knowledge=knowledge)(network_victim(), x, y, Threat(0.05), seed=1).inputs
        for knowledge in ("deployed", "common", "fresh")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("knowledge", ["deployed", "common", "fresh"])
def test_the_batch_size_and_the_global_generator_change_nothing(knowledge: str) -> None:
    attacked, x, y = Counting(), middle(9), torch.arange(9) % 4
    attack = pgd(6, knowledge=knowledge, restarts=2, draws=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = attack(attacked, x, y, Threat(0.1), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = replace(attack, batch_size=4)(attacked, x, y, Threat(0.1), seed=5)
    torch.testing.assert_close(first.inputs, second.inputs, rtol=0, atol=1e-12)
    other = attack(attacked, x, y, Threat(0.1), seed=6)
    assert not torch.isclose(first.inputs, other.inputs).all()


def test_more_is_never_worse_for_an_attacker_that_sees_the_victim() -> None:
    x, y = unseen(60)
    attacked, threat = posterior_victim(), Threat(0.05)
    clean = margins(attacked, x, y)
    one = margins(attacked, pgd(4, loss="margin")(attacked, x, y, threat).inputs, y)
    three = margins(attacked, pgd(4, loss="margin", restarts=3)(attacked, x, y, threat).inputs, y)
    assert (one >= clean - 1e-6).all()
    assert (three >= one - 1e-6).all()
    assert (three > one + 1e-6).any()


def test_parameters_get_no_gradients() -> None:
    x, y = unseen(6)
    net, bnn = small_net(), bayesian()
    holders = (net, small_net(0.3), bnn, bnn.posterior)
    for holder in holders:
        holder.zero_grad(set_to_none=True)
    for attacked in (victim(net), posterior_victim(2), dropout_victim(2)):
        for attack in (pgd(2), pgd(2, average="probability")):
            with torch.no_grad():
                attack(attacked, x, y, Threat(0.1))
    assert all(parameter.grad is None for holder in holders for parameter in holder.parameters())


class Rounded(nn.Module):
    """Gradients that are zero (rounding), absent (a cut graph), or not a number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, small_net()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "round":
            return self.inner((8 * x).round() / 8)  # type: ignore[no-any-return]
        if self.kind == "cut":
            return self.inner(x.detach()).detach()  # type: ignore[no-any-return]
        # The slope of √ is infinite at the zeros of the images, and of 0 · √ it is not a number.
        return self.inner(x) + 0 * x.flatten(1).sqrt().sum(1, keepdim=True)  # type: ignore[no-any-return]


@norms
@pytest.mark.parametrize("kind", ["round", "cut", "nan"])
def test_missing_gradients_are_counted_and_rows_without_any_stay(kind: str, norm: Norm) -> None:
    x, y = unseen(8)
    found = fgsm()(victim(Rounded(kind)), x, y, Threat(0.05, norm))
    assert found.notes["zero_gradient_share"] == 1.0
    if kind != "nan":
        assert torch.equal(found.inputs, x)
    assert found.inputs.isfinite().all()


def test_an_objective_of_ones_own_replaces_the_loss_and_judges_the_points() -> None:
    x, y = unseen(10)
    attacked, threat = posterior_victim(4), Threat(0.05)
    seen: list[tuple[int, ...]] = []

    def stay_certain(logs: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
        assert shares is None
        seen.append(tuple(logs.shape))
        return (logs.exp().mean(0) * logs.exp().mean(0).log()).sum(1)

    found = pgd(8, objective=stay_certain)(attacked, x, y, threat)
    assert set(seen) == {(4, 10, 10)}
    assert (found.prediction.entropy <= attacked.predict(x).entropy + 1e-6).all()
    assert found.prediction.entropy.mean() < 0.8 * attacked.predict(x).entropy.mean()
    assert found.name == "PGD-8, own objective"
    with pytest.raises(InputError, match="one number an example"):
        pgd(2, objective=lambda logs, targets, shares: logs.sum())(attacked, x, y, threat)


@norms
def test_starts_fill_the_ball(norm: Norm) -> None:
    x = torch.full((4000, 2), 0.5, dtype=torch.float64)
    delta = random_start(x, Threat(0.1, norm), InputSpace(), torch.Generator().manual_seed(0)) - x
    area = delta.abs().amax(1).square() if norm == "linf" else delta.square().sum(1)
    # The share of the ball's area within a radius is uniform.
    ranked = (area / 0.01).sort().values
    uniform = (torch.arange(4000) + 0.5) / 4000
    assert float((ranked - uniform).abs().max()) < 1.63 / 4000**0.5
    assert delta.mean(0).abs().max() < 0.005


def test_names_say_what_was_done() -> None:
    assert fgsm().name == "FGSM"
    assert pgd().name == "PGD-20"
    assert pgd(7, restarts=5, loss="dlr", knowledge="fresh").name == "PGD-7 × 5, dlr, 8 fresh draws"
    assert fgsm(targeted=True, knowledge="common", draws=3).name == "targeted FGSM, 3 common draws"
    assert pgd(3, average="probability").name == "PGD-3, of the averaged probability"


def test_a_result_can_be_written_as_json() -> None:
    x, y = unseen(10)
    found = fgsm()(network_victim(), x, y, Threat(0.05))
    said = found.as_dict()
    assert said["fooled"] == int((found.prediction.labels != y).sum())
    assert said["accuracy"] == pytest.approx(1 - said["fooled"] / 10)
    assert said["notes"] == {"zero_gradient_share": 0.0}


def test_an_attack_that_leaves_its_threat_is_not_judged() -> None:
    x, y = unseen(4)
    with pytest.raises(InputError, match="mine left its threat"):
        judge("mine", network_victim(), (x + 0.1).clamp(0, 1), x, y, Threat(0.05))
    with pytest.raises(InputError, match="left its threat"):
        judge("mine", network_victim(), x - 0.01, x, y, Threat(0.05))
    with pytest.raises(InputError, match="not finite"):
        judge("mine", network_victim(), x * float("nan"), x, y, Threat(0.05))


def test_the_best_is_kept_row_by_row() -> None:
    best = Best(torch.zeros(3, 2))
    best.offer(torch.tensor([0, 2]), torch.ones(2, 2), torch.tensor([-1.0, float("nan")]))
    best.offer(torch.tensor([0, 1]), 2 * torch.ones(2, 2), torch.tensor([-2.0, 0.5]))
    assert best.inputs[:, 0].tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"restarts": 1.5}, "restarts"),
        ({"draws": -1}, "draws"),
        ({"batch_size": True}, "batch_size"),
        ({"step_size": 0.0}, "step_size"),
        ({"loss": "mse"}, "'ce', 'margin', 'dlr'"),
        ({"knowledge": "all"}, "'deployed'"),
        ({"average": "logit"}, "'probability'"),
        ({"restarts": 2, "random_start": False}, "random_start=True"),
        ({"objective": "entropy"}, "function"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GradientAttack(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "targets", "epsilon", "message"),
    [
        (torch.zeros(2, 12) - 1, torch.zeros(2).long(), 0.1, "before"),
        (torch.zeros(2, 12), torch.zeros(2), 0.1, "integer"),
        (torch.zeros(2, 12), [0, 1], 0.1, "list"),
        (torch.zeros(2, 12), torch.zeros(3).long(), 0.1, "2 inputs"),
        (torch.zeros(2, 12), torch.tensor([0, 2]), 0.1, "0 to 1"),
        (torch.zeros(2, 12), torch.tensor([-1, 0]), 0.1, "0 to 1"),
        (torch.zeros(2, 12), torch.zeros(2).long(), 0.0, "epsilon is 0"),
    ],
)
def test_what_cannot_be_attacked_is_refused(inputs: Tensor, targets: Tensor, epsilon: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fgsm()(linear(), inputs.double(), targets, Threat(epsilon))


def test_the_ratio_of_logits_needs_three_classes() -> None:
    with pytest.raises(InputError, match="at least 3 classes"):
        fgsm(loss="dlr")(linear(), middle(), torch.zeros(6).long(), Threat(0.1))


def test_a_mixture_of_networks_is_attacked_through_all_of_them() -> None:
    x, y = unseen(50)
    nets = [small_net(seed=seed) for seed in (0, 1)]
    both, threat = NetworksVictim(nets, Categorical(), InputSpace()), Threat(0.08)
    one = pgd(10)(NetworksVictim(nets[:1], Categorical(), InputSpace()), x, y, threat)
    against_both = pgd(10)(both, x, y, threat)
    carried_over = float((both.predict(one.inputs).labels == y).double().mean())
    assert against_both.accuracy < carried_over


def test_an_attack_that_knows_the_deployed_masks_is_judged_by_those_very_masks():
    attacked, (x, y) = dropout_victim(), unseen(300)
    # So small a step that what helps under other masks often hurts under these.
    result = fgsm(batch_size=7)(attacked, x, y, Threat(0.002))
    # It keeps the better of the clean input and the step, by the margin that it sees: no row can be worse off than clean.
    before, after = margins(attacked, x, y), margins(attacked, result.inputs, y)
    assert bool((after >= before - 1e-9).all())
    assert float((after - before).mean()) > 0.001
