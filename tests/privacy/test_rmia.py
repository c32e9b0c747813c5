"""RMIA against three nested loops over examples, population points and reference models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.privacy.rmia import rmia


def case(seed: int, examples: int = 12, models: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    member = torch.rand(models + 1, examples, generator=random) < 0.5
    # Each example has references of both kinds.
    member[1], member[2] = True, False
    log_p = -2 * torch.rand(models + 1, examples, generator=random, dtype=torch.float64) / (1 + 2 * member)
    return log_p[0], log_p[1:], member[1:]


def by_loops(
    target: Tensor, shadows: Tensor, member: Tensor, mode: str, gamma: float, a: float, population: list[int]
) -> list[float]:
    def reference(n: int) -> float:
        sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
        for model in range(len(shadows)):
            had = bool(member[model, n])
            sums[had] += math.exp(shadows[model, n])
            counts[had] += 1
        out = sums[False] / counts[False]
        return 0.5 * (sums[True] / counts[True] + out) if mode == "online" else 0.5 * ((1 + a) * out + (1 - a))

    scores = []
    for x in range(len(target)):
        beaten = asked = 0
        for z in population:
            if z == x:
                continue
            mine, other = math.exp(target[x]) / reference(x), math.exp(target[z]) / reference(z)
            beaten += mine / other >= gamma
            asked += 1
        scores.append(beaten / asked)
    return scores


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["online", "offline"]),
    st.sampled_from([1.0, 1.1, 2.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sets(st.integers(0, 11), min_size=2),
)
def test_scores_are_those_of_three_loops(seed: int, mode: str, gamma: float, a: float, points: set[int]) -> None:
    target, shadows, member = case(seed)
    population = torch.zeros(12, dtype=torch.bool)
    population[sorted(points)] = True
    found = rmia(target, shadows, member, mode=mode, gamma=gamma, a=a, population=population)
    assert found.tolist() == pytest.approx(by_loops(target, shadows, member, mode, gamma, a, sorted(points)))
    everyone = rmia(target, shadows, member, mode=mode, gamma=gamma, a=a)
    assert everyone.tolist() == pytest.approx(by_loops(target, shadows, member, mode, gamma, a, list(range(12))))


def test_tiny_probabilities_do_not_underflow() -> None:
    target, shadows, member = case(0)
    # The same factor on all probabilities of an example cancels in its ratio, online.
    far = 2000.0 * torch.arange(12, dtype=torch.float64)
    assert torch.allclose(rmia(target - far, shadows - far, member), rmia(target, shadows, member))


def test_offline_does_not_look_at_models_that_had_the_example() -> None:
    target, shadows, member = case(4)
    other = torch.where(member, shadows - 1, shadows)
    assert torch.equal(rmia(target, other, member, mode="offline"), rmia(target, shadows, member, mode="offline"))
    assert not torch.equal(rmia(target, other, member, gamma=1), rmia(target, shadows, member, gamma=1))


@pytest.mark.parametrize(("mode", "least"), [("online", 0.9), ("offline", 0.8)])
def test_finds_members_that_a_common_threshold_cannot(mode: str, least: float) -> None:
    random = torch.Generator().manual_seed(0)
    hardness = 6 * torch.rand(2000, generator=random, dtype=torch.float64)
    member = torch.rand(5, 2000, generator=random) < 0.5
    member[1], member[2] = True, False
    noise = 0.05 * torch.rand(5, 2000, generator=random, dtype=torch.float64)
    log_p = -hardness * torch.where(member, 0.5, 1.0) - noise
    found = roc_auc_score(member[0], rmia(log_p[0], log_p[1:], member[1:], mode=mode))
    assert found > least
    assert found > roc_auc_score(member[0], log_p[0]) + 0.05


def test_gamma_one_has_every_point_of_the_curve_of_a_larger_gamma() -> None:
    target, shadows, member = case(5, examples=60)
    random = torch.Generator().manual_seed(0)
    truth = torch.rand(60, generator=random) < 0.5

    def points(gamma: float) -> set[tuple[float, float]]:
        false, true, _ = roc_curve(truth, rmia(target, shadows, member, gamma=gamma), drop_intermediate=False)
        return set(zip(false.tolist(), true.tolist(), strict=True))

    assert points(2.0) < points(1.0)
    assert len(points(1.0)) == 61


TARGET, SHADOWS, MEMBER = case(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_log_p": TARGET + 3}, "at most 0"),
        ({"target_log_p": TARGET[1:]}, r"\(11,\) and \(6, 12\)"),
        ({"shadow_log_p": torch.full_like(SHADOWS, -math.inf)}, "72 infinite"),
        ({"shadow_member": torch.ones_like(MEMBER)}, "12 of 12 examples have no shadow model trained without them"),
        ({"shadow_member": torch.zeros_like(MEMBER)}, "12 of 12 examples have no shadow model trained with them"),
        ({"gamma": 0.5}, "gamma must be finite and at least 1"),
        ({"gamma": math.nan}, "gamma"),
        ({"a": 1.5}, "a from 0 to 1"),
        ({"mode": "neither"}, "'neither'"),
        ({"population": torch.arange(12) == 3}, "at least two of the 12 examples, but it has 1"),
        ({"population": MEMBER}, r"population must have shape \(12,\)"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], message: str) -> None:
    given = {"target_log_p": TARGET, "shadow_log_p": SHADOWS, "shadow_member": MEMBER} | changed
    with pytest.raises(InputError, match=message):
        rmia(**given)
