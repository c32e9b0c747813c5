"""Limits of confidence far from the data agree with closed forms, with measurements, and with what bounds promise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import core_models
import stfbnn
from stfbnn import models
from stfbnn.decision.bounds import interval
from stfbnn.errors import InputError, NotFittedError
from stfbnn.guarantees.far_field import confidence_along, far_field, independent_draw, unit_directions
from stfbnn.guarantees.far_field_result import Direction, FarField, limit_bound
from stfbnn.guarantees.homogeneous_rules import NoLimitError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MixturePosterior
from stfbnn.posterior.point import PointMassPosterior


def fitted(
    model: nn.Module, x: Tensor, std: float | Sequence[float], likelihood: Likelihood | None = None
) -> BayesianNetwork:
    """A network with a posterior that is known: its trained weights as means, and these standard deviations."""
    bnn = stfbnn.bayesianize(model.eval(), x)
    with torch.no_grad():
        bnn.posterior.log_std.copy_(torch.as_tensor(std).log().expand(bnn.layout.size))
    bnn.likelihood = Categorical() if likelihood is None else likelihood
    return bnn


def linear(inputs: int, outputs: int, weight: Sequence[float], bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).view(outputs, inputs))
        if bias:
            layer.bias.fill_(3.0)
    return layer


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(count: int, draws: int, probability: float) -> bool:
    low, high = interval(count, draws, 0.999, whole=True)
    return low <= probability <= high


def test_a_linear_network_has_the_limit_of_the_closed_form() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-0.5, 2.0]])
    std = [0.5, 0.4, 0.3, 0.8, 1.0, 1.0]
    bnn = fitted(linear(2, 2, [0.5, -0.2, 0.1, 0.3]), x, std)
    found = far_field(bnn, x, draws=400)
    for direction, row in zip(found.directions, x, strict=True):
        margin = float(torch.tensor([0.4, -0.5]) @ row)
        variance = float((row.square() * (torch.tensor(std[0:2]).square() + torch.tensor(std[2:4]).square())).sum())
        first = float(norm.cdf(margin / math.sqrt(variance)))
        assert agrees(direction.counts[0], 400, first)
        assert direction.ties == 0
        assert direction.limit == direction.low == max(direction.counts) / 400
        assert max(first, 1 - first) <= direction.bound < 1
        assert direction.trained == direction.mean == int(margin < 0)


def test_ties_of_dead_units_count_for_every_class() -> None:
    x = torch.tensor([[2.0]])
    model = nn.Sequential(linear(1, 2, [0.3, -0.2], bias=False), nn.ReLU(), linear(2, 2, [1.0, 0.0, 0.0, 1.0]))
    bnn = fitted(model, x, [0.5, 0.6])
    (direction,) = far_field(bnn, x, draws=300).directions
    dead = float(norm.cdf(-0.3 / 0.5) * norm.cdf(0.2 / 0.6))
    # P(w₁ > 0 and w₁ > w₂).
    first = quad(lambda w: norm.pdf(w, 0.3, 0.5) * norm.cdf((w + 0.2) / 0.6), 0, 6)[0]
    assert agrees(direction.ties, 300, dead)
    assert agrees(direction.counts[0], 300, first)
    assert direction.limit == pytest.approx((direction.counts[0] + direction.ties) / 300)
    assert direction.low == pytest.approx(direction.counts[0] / 300)
    assert first + dead <= direction.bound < 1
    # At the trained weights the first unit lives.
    assert direction.trained == 0


def test_a_network_without_a_limit_of_its_own_is_tied() -> None:
    x = torch.tensor([[1.0], [-1.0]])
    model = nn.Sequential(linear(1, 1, [0.5], bias=False), nn.ReLU(), linear(1, 2, [1.0, -1.0]))
    found = far_field(fitted(model, x, 1e-6), x, draws=20)
    assert [one.trained for one in found.directions] == [0, None]
    assert [one.ties for one in found.directions] == [0, 20]
    assert all(one.vacuous and one.bound == 1 and one.limit == 1 for one in found.directions)
    assert "vacuous along all" in found.verdict()
    assert "tied or zero along 1" in found.verdict()


def test_rounding_does_not_break_a_tie() -> None:
    class Cancels(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return torch.stack([(h * 0.1 + h * 0.2).sum(1), (h * 0.3).sum(1)], 1)

    x = noise(6, 4)
    found = far_field(fitted(nn.Sequential(nn.Linear(4, 5), Cancels()), x, 0.3), x, draws=10)
    assert [one.ties for one in found.directions] == [10] * 6


def test_a_label_has_the_limit_of_the_closed_form() -> None:
    x = torch.tensor([[1.0, 2.0]])
    bnn = fitted(linear(2, 1, [0.2, 0.1]), x, [0.3, 0.4, 1.0], Bernoulli())
    (direction,) = far_field(bnn, x, draws=400).directions
    assert agrees(direction.counts[1], 400, float(norm.cdf(0.4 / math.sqrt(0.09 + 4 * 0.16))))
    assert direction.trained == 1


def test_a_mixture_is_drawn_component_and_all() -> None:
    x = torch.tensor([[1.0, 0.0]])
    bnn = fitted(linear(2, 2, [1.0, 0.0, -1.0, 0.0], bias=False), x, 0.1)
    vectors = [bnn.trained_vector(), -bnn.trained_vector()]
    parts = [PointMassPosterior(bnn.layout, vector) for vector in vectors]
    bnn.posterior = MixturePosterior(bnn.layout, parts, torch.tensor([0.3, 0.7]))
    seen = {far_field(bnn, x, draws=100, seed=seed).directions[0].counts[0] for seed in range(3)}
    # Dealt out in proportion, they would be 30 each time.
    assert len(seen) > 1
    assert all(agrees(count, 100, 0.3) for count in seen)


@pytest.mark.parametrize(
    ("probabilities", "level"), [([0.9, 0.05, 0.05], 0.1), ([0.6, 0.4, 0.0], 0.3), ([0.35, 0.35, 0.2, 0.1], 0.2)]
)
def test_the_bound_is_violated_no_more_often_than_its_level_says(probabilities: list[float], level: float) -> None:
    # The last probability is that of ties.
    truth, classes = max(probabilities[:-1]) + probabilities[-1], len(probabilities) - 1
    counts = np.random.default_rng(0).multinomial(60, probabilities, size=3000)
    low = sum(limit_bound(row[:-1].tolist(), int(row[-1]), level) < truth for row in counts)
    assert low / 3000 <= level
    if max(probabilities[:-1]) > 0.5:
        # Where one class leads, the bound is loose by no more than what the other classes and whole numbers cost.
        assert low / 3000 > 0.3 * level / classes


@pytest.fixture(scope="module")
def perceptron() -> tuple[BayesianNetwork, Tensor]:
    torch.manual_seed(0)
    x = noise(6, 2, 3)
    return fitted(models.mlp((2, 3), 4, hidden=12), x, 0.3), x


@pytest.fixture(scope="module")
def residual() -> tuple[BayesianNetwork, Tensor]:
    torch.manual_seed(0)
    x = noise(3, 3, 8, 8)
    model = models.resnet20((3, 8, 8), 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(noise(32, 3, 8, 8, seed=1))
    # A head that looks away from what all inputs have in common, lest an untrained network tells one class for all.
    with torch.no_grad():
        common = model.eval()[:-1](1e3 * noise(32, 3, 8, 8, seed=2)).mean(0)
        common /= common.norm()
        model[-1].weight -= torch.outer(model[-1].weight @ common, common)
    return fitted(model, x, 0.3), x


@pytest.mark.parametrize("kind", ["perceptron", "residual"])
def test_measured_confidence_approaches_the_limit(kind: str, request: pytest.FixtureRequest) -> None:
    bnn, x = request.getfixturevalue(kind)
    limits = far_field(bnn, x, draws=30)
    measured = confidence_along(bnn, x, [1.0, 1e3, 1e6, 1e9], samples=30)
    assert min(one.limit for one in limits.directions) < 0.95
    gaps = []
    for averaged, trained, direction in zip(measured.averaged, measured.trained, limits.directions, strict=True):
        assert direction.ties == 0
        gaps.append([abs(value - direction.limit) for value in averaged])
        assert direction.trained is not None
        assert trained[-1] > 0.999
    means = np.mean(gaps, axis=0)
    assert means[-1] < 1e-3
    assert means[0] > means[1] > means[2] >= means[3]


def test_all_rays_of_one_direction_have_one_limit(perceptron: tuple[BayesianNetwork, Tensor]) -> None:
    bnn, x = perceptron
    centred = confidence_along(bnn, x, [1e9], samples=10)
    elsewhere = confidence_along(bnn, x, [1e9], samples=10, origin=10 * noise(2, 3, seed=7))
    assert np.allclose(centred.averaged, elsewhere.averaged, atol=1e-4)
    near = confidence_along(bnn, x, [0.0], samples=10, origin=noise(2, 3, seed=7))
    assert len({row[0] for row in near.averaged}) == 1


@settings(max_examples=4, deadline=None)
@given(scales=st.lists(st.floats(1e-20, 1e20), min_size=6, max_size=6))
def test_the_length_of_a_direction_changes_nothing(
    perceptron: tuple[BayesianNetwork, Tensor], scales: list[float]
) -> None:
    bnn, x = perceptron
    scaled = x * torch.tensor(scales)[:, None, None]
    assert torch.allclose(unit_directions(scaled), unit_directions(x), atol=1e-6)
    assert far_field(bnn, scaled, draws=5).directions == far_field(bnn, x, draws=5).directions


def test_a_loader_and_many_rows_give_the_same(perceptron: tuple[BayesianNetwork, Tensor]) -> None:
    bnn, _ = perceptron
    x = noise(600, 2, 3, seed=3)
    whole = far_field(bnn, x, draws=8)
    loader = DataLoader(TensorDataset(x, torch.zeros(600)), batch_size=77)
    assert far_field(bnn, loader, draws=8).directions == whole.directions
    assert far_field(bnn, x[500:501], draws=8).directions == whole.directions[500:501]


def test_random_directions_are_added_and_reported(perceptron: tuple[BayesianNetwork, Tensor]) -> None:
    bnn, x = perceptron
    found = far_field(bnn, x, draws=40, random_directions=10, threshold=0.8, seed=1)
    assert found.kinds == ("data", "random")
    assert [len(found.of(kind)) for kind in found.kinds] == [6, 10]
    share = found.share("random")
    assert share.below == sum(one.bound < 0.8 for one in found.of("random"))
    assert (share.low, share.high) == interval(share.below, 10, 0.95, whole=True)
    assert far_field(bnn, x, draws=40, random_directions=10, threshold=0.8, seed=1) == found
    console = Console(record=True, width=200)
    console.print(found.table())
    text = console.export_text()
    assert "random" in text
    assert str(share) in text
    assert "Along 10 random directions" in found.verdict()
    read = json.loads(json.dumps(found.as_dict()))
    assert read["shares"]["random"]["below"] == share.below
    assert read["directions"][0]["limit"] == found.directions[0].limit
    assert read["settings"]["draws"] == 40


def test_the_verdict_names_what_is_vacuous() -> None:
    half, sure = Direction("data", (5, 5), 0, 0.8, 0, 0), Direction("data", (10, 0), 0, 1.0, 0, None)
    found = FarField((half, sure), 10, 0.05, 0.9, 0.0, {})
    assert "0.750 on average" in found.verdict()
    assert "to 1 along 2 of them" in found.verdict()
    assert "below 0.9 along 50.0 %" in found.verdict()
    assert "vacuous along 1," in found.verdict()
    with pytest.raises(InputError, match="no directions of the kind 'random'"):
        found.of("random")


def test_draws_are_those_of_the_seed_and_independent(perceptron: tuple[BayesianNetwork, Tensor]) -> None:
    bnn, _ = perceptron
    assert torch.equal(independent_draw(bnn, 1, 2), independent_draw(bnn, 1, 2))
    drawn = torch.stack([independent_draw(bnn, 0, index) for index in range(400)])
    apart = (drawn - bnn.posterior.mean_vector().detach()) / 0.3
    assert abs(float((apart[0::2] * apart[1::2]).mean())) < 0.05
    assert float(apart.square().mean()) == pytest.approx(1, abs=0.05)


BAD_ARGUMENTS = {
    "draws": (0, "draws must be a positive integer"),
    "level": (1.0, "level must lie between"),
    "threshold": (0, "threshold must lie between"),
    "random_directions": (-1, "random_directions must be"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(perceptron: tuple[BayesianNetwork, Tensor], name: str) -> None:
    value, message = BAD_ARGUMENTS[name]
    with pytest.raises(InputError, match=message):
        far_field(*perceptron, **{name: value})


def test_directions_that_are_none_are_refused(perceptron: tuple[BayesianNetwork, Tensor]) -> None:
    bnn, x = perceptron
    with pytest.raises(InputError, match="must not be zero, but rows \\[1\\]"):
        far_field(bnn, torch.stack([x[0], 0 * x[0]]))
    with pytest.raises(InputError, match="must be floats"):
        far_field(bnn, torch.ones(2, 2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="NaN"):
        far_field(bnn, x * float("nan"))
    with pytest.raises(InputError, match="no batch"):
        far_field(bnn, [])


def test_distances_and_origins_that_do_not_fit_are_refused(perceptron: tuple[BayesianNetwork, Tensor]) -> None:
    bnn, x = perceptron
    for distances in ([], [2.0, 1.0], [-1.0], [float("inf")]):
        with pytest.raises(InputError, match="distances must be"):
            confidence_along(bnn, x, distances)
    with pytest.raises(InputError, match="samples must be"):
        confidence_along(bnn, x, [1.0], samples=0)
    with pytest.raises(InputError, match="origin must be one input"):
        confidence_along(bnn, x, [1.0], origin=x)
    with pytest.raises(InputError, match="not finite so far away"):
        confidence_along(bnn, x, [1e38], samples=1, origin=torch.full((2, 3), 3e38))


def test_networks_without_a_confidence_are_refused() -> None:
    x = noise(4, 6)
    with pytest.raises(InputError, match="'gaussian'"):
        far_field(fitted(core_models.mlp(), x, 0.1, Gaussian(noise_std=1.0)), x)
    with pytest.raises(InputError, match="probabilities, which are bounded"):
        far_field(fitted(core_models.mlp(), x, 0.1, Categorical("probabilities")), x)
    with pytest.raises(InputError, match="one label for each input"):
        far_field(fitted(core_models.mlp(), x, 0.1, Bernoulli()), x)
    with pytest.raises(NoLimitError, match=r"module '3' \(Softmax\)"):
        far_field(fitted(nn.Sequential(*core_models.mlp(), nn.Softmax(1)), x, 0.1), x)
    with pytest.raises(NotFittedError):
        far_field(stfbnn.bayesianize(core_models.mlp(), x), x)
