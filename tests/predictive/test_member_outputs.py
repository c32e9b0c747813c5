"""All members' outputs at once, against `predict` and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stfbnn
from stfbnn.errors import InputError
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.prediction import member_outputs
from stfbnn.predictive import CategoricalPrediction, GaussianPrediction, MemberOutputs


def fitted() -> tuple[stfbnn.BayesianNetwork, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    bnn = stfbnn.bayesianize(model, x[:2])
    stfbnn.fit(bnn, [(x, y)], epochs=1, temperature=0.1, progress=False)
    return bnn, x


def test_at_is_what_predict_says_at_every_temperature() -> None:
    bnn, x = fitted()
    members = member_outputs(bnn, x, samples=5, seed=3)
    for tau in (0.5, 1.0, 3.0):
        ours, theirs = members.at(tau), stfbnn.predict(bnn, x, samples=5, seed=3, predictive_temperature=tau)
        torch.testing.assert_close(ours.probs, theirs.probs)
        torch.testing.assert_close(ours.aleatoric, theirs.aleatoric)


def test_a_loader_gives_the_same_as_a_tensor() -> None:
    bnn, x = fitted()
    batches = [(x[:7], torch.zeros(7).long()), (x[7:], torch.zeros(33).long())]
    torch.testing.assert_close(member_outputs(bnn, batches).outputs, member_outputs(bnn, x).outputs)


def test_shares_weigh_the_members() -> None:
    outputs = torch.tensor([[[0.0, 1.0]], [[3.0, 0.0]]])
    found = MemberOutputs(outputs, Categorical(), torch.tensor([0.25, 0.75]).double()).at(2.0)
    assert isinstance(found, CategoricalPrediction)
    expected = 0.25 * (outputs[0] / 2).softmax(1) + 0.75 * (outputs[1] / 2).softmax(1)
    torch.testing.assert_close(found.probs.float(), expected)
    assert not found.at_mean


def test_the_best_temperature_is_that_of_a_fine_grid() -> None:
    torch.manual_seed(1)
    outputs, targets = 4 * torch.randn(6, 200, 3), torch.randint(0, 3, (200,))
    members = MemberOutputs(outputs, Categorical())
    grid = [math.exp(step / 200) for step in range(-200, 600)]
    best = min(grid, key=lambda tau: -float(members.at(tau).log_density(targets).mean()))
    assert members.best_temperature(targets) == pytest.approx(best, rel=0.01)


def test_numbers_have_no_temperature() -> None:
    members = MemberOutputs(torch.randn(2, 5), Gaussian(noise_std=1.0))
    assert isinstance(members.at(), GaussianPrediction)
    with pytest.raises(InputError, match="logits"):
        members.best_temperature(torch.randn(5))


@pytest.mark.parametrize(
    ("outputs", "shares"), [(torch.zeros(0, 3, 2), None), (torch.zeros(3), None), (torch.zeros(2, 3, 2), torch.ones(3))]
)
def test_outputs_without_members_are_refused(outputs: torch.Tensor, shares: torch.Tensor | None) -> None:
    with pytest.raises(InputError, match="member"):
        MemberOutputs(outputs, Categorical(), shares)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        member_outputs(fitted()[0], [])
