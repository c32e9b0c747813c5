"""Where components start, how they are weighted, and which are dropped."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from core_models import classification, conv_net, loader, mlp
from stfbnn.conversion import bayesianize
from stfbnn.inference.components.scoring import disagreement, distance, training_nll
from stfbnn.inference.components.start import perturbed, reinitialized, start_vector
from stfbnn.inference.components.weights import stack, weigh_by_free_energy, weigh_by_held_out, weigh_equally
from stfbnn.inference.maximum_a_posteriori import adam_rate
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.posterior import MeanFieldPosterior, Mixture, ParameterLayout
from stfbnn.prediction import predict
from stfbnn.randomness import generator


def log_densities(seed: int, components: int = 4, examples: int = 300) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    level = -torch.rand(components, 1, generator=random, dtype=torch.float64)
    return level + torch.randn(components, examples, generator=random, dtype=torch.float64)


@given(seed=st.integers(0, 10_000), components=st.integers(1, 6), examples=st.integers(2, 200))
@settings(max_examples=40, deadline=None)
def test_stacking_is_optimal_to_its_own_bound(seed: int, components: int, examples: int) -> None:
    logs = log_densities(seed, components, examples)
    found = stack(logs)
    assert float(found.weights.sum()) == pytest.approx(1)
    assert (found.weights >= 0).all()
    assert found.gap <= 1e-6

    def nll(weights: np.ndarray) -> float:
        return -float((torch.from_numpy(weights) @ logs.exp()).log().mean())

    start = np.full(components, 1 / components)
    other = minimize(
        nll, start, bounds=[(1e-9, 1)] * components, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-10
    )
    assert found.nll == pytest.approx(nll(found.weights.numpy()), abs=1e-12)
    assert found.nll <= other.fun + found.gap + 1e-9
    assert found.nll <= float((-logs.mean(dim=1)).min())


def test_stacking_survives_densities_that_underflow() -> None:
    logs = torch.tensor([[-2000.0, -1.0], [-1990.0, -5.0]])
    found = stack(logs)
    # Closed form for two: maximise log(π e⁻¹⁰ + 1 − π) + log(π + (1 − π) e⁻⁴).
    a, b = float(np.exp(-10.0)), float(np.exp(-4.0))
    expected = ((1 - b) - b * (1 - a)) / (2 * (1 - a) * (1 - b))
    assert float(found.weights[0]) == pytest.approx(expected, abs=1e-3)


def test_a_component_that_never_became_good_is_dropped_with_the_reason() -> None:
    logs = log_densities(0, 3)
    logs[1] = logs[0] - 3.0
    choice = weigh_by_held_out(logs, max_excess=0.5, min_weight=1e-3)
    assert choice.kept == [0, 2]
    assert "never became good: its held-out NLL is" in choice.reasons[1]
    assert float(choice.weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(choice.weights[[0, 2]], stack(logs[[0, 2]]).weights)
    # One that is worse on the whole, but better on some examples, stays as far as is allowed.
    logs[1, :150] = logs[0, :150] + 2.0
    logs[1, 150:] = logs[0, 150:] - 6.0
    assert weigh_by_held_out(logs, max_excess=0.5, min_weight=1e-3).kept == [0, 2]
    assert weigh_by_held_out(logs, max_excess=2.5, min_weight=1e-3).kept == [0, 1, 2]


def test_a_component_that_another_makes_superfluous_is_dropped_even_number_0() -> None:
    logs = log_densities(1, 2)
    logs = torch.stack([logs[0] - 0.1, logs[0], logs[1]])
    choice = weigh_by_held_out(logs, max_excess=0.5, min_weight=1e-3)
    assert choice.kept == [1, 2]
    assert "adds nothing" in choice.reasons[0]
    assert float(choice.weights[0]) == 0


def test_equal_weights_and_weights_by_free_energy() -> None:
    equal = weigh_equally(torch.tensor([0.3, 0.4, 1.2]), 0.5, "training objective")
    assert equal.weights.tolist() == [0.5, 0.5, 0.0]
    assert equal.reasons[2] == "never became good: its training objective is 1.200, against 0.300"
    free = weigh_by_free_energy(torch.tensor([0.3, 0.305, 1.2]), 100, 1.0, 1e-3)
    assert free.kept == [0, 1]
    assert float(free.weights[0] / free.weights[1]) == pytest.approx(float(np.exp(0.5)), rel=1e-3)


def test_a_layer_is_reinitialized_as_it_draws_itself() -> None:
    x = torch.randn(4, 1, 8, 8)
    bnn = bayesianize(conv_net(), x)
    drawn = reinitialized(bnn, seed=3)
    # Kaiming's uniform law of Conv2d: ±1/√fan_in, with a fan-in of 9.
    assert float(drawn["weight"].abs().max()) < 1 / 3
    assert float(drawn["weight"].std()) == pytest.approx(1 / 3 / 3**0.5, rel=0.25)
    assert torch.equal(reinitialized(bnn, seed=3)["weight"], drawn["weight"])
    assert not torch.equal(reinitialized(bnn, seed=4)["weight"], drawn["weight"])
    assert not torch.equal(drawn["weight"], bnn.trained["weight"])
    # Neither the network nor the global generator notices.
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in bnn.network.state_dict().items()}
    start_vector(bnn, Mixture(), 5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in bnn.network.state_dict().items())


class Scaled(nn.Module):
    """A layer without a way to draw itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(2.0 + 0.5 * torch.randn(400, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_a_layer_that_cannot_draw_itself_is_drawn_from_its_trained_statistics() -> None:
    net = nn.Sequential(Scaled(), nn.Linear(400, 3))
    drawn = reinitialized(bayesianize(net, torch.randn(2, 400)), seed=0)["scale"]
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.1)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.1)
    weights = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    parametrised = bayesianize(nn.Sequential(weights, nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 6))
    for name, value in reinitialized(parametrised, seed=0).items():
        assert value.shape == parametrised.trained[name].shape
        assert not torch.equal(value, parametrised.trained[name])


def test_perturbation_is_in_units_of_each_parameters_size() -> None:
    net = mlp(inputs=40, hidden=60)
    with torch.no_grad():
        net[0].bias.mul_(10)
    bnn = bayesianize(net, torch.randn(2, 40))
    drawn = perturbed(bnn, 0.3, seed=1)
    for name, value in bnn.trained.items():
        size = float(value.square().mean().sqrt())
        assert float((drawn[name] - value).std()) == pytest.approx(0.3 * size, rel=0.3)


def test_the_rate_of_retraining_follows_the_layers_size_and_fan_in() -> None:
    layout = ParameterLayout(("weight", "bias"), ((5, 3, 4, 4), (5,)))
    weights = torch.full((layout.size,), 0.2)
    assert adam_rate(layout, weights) == pytest.approx(0.2 / 48**0.5)
    assert adam_rate(layout, weights, 0.5) == pytest.approx(0.1 / 48**0.5)
    assert adam_rate(layout, torch.zeros(layout.size)) > 0


def test_training_nll_and_distances_equal_a_loop() -> None:
    x, y = classification(100)
    bnn = bayesianize(mlp(), x[:2])
    likelihood = Categorical()
    found = training_nll(bnn, loader(x, y, batch_size=30), likelihood, "labels", samples=3, seed=7)
    with torch.no_grad():
        noise = [torch.randn(bnn.posterior.noise_size, generator=generator(7, "draw", index)) for index in range(3)]
        logs = [likelihood.log_prob(bnn.outputs(bnn.posterior.draw(one), x), y) for one in noise]
    assert found == pytest.approx(-float(torch.stack(logs).mean()), rel=1e-5)
    layout = ParameterLayout(("w",), ((2,),))
    one = MeanFieldPosterior(layout, torch.tensor([3.0, 4.0]), torch.ones(()))
    other = MeanFieldPosterior(layout, torch.tensor([3.0, 1.0]), torch.ones(()))
    assert distance(other, one) == pytest.approx(0.6)


def test_disagreement_of_labels_and_of_numbers() -> None:
    x, _ = classification(50)
    one, other = bayesianize(mlp(), x[:2]), bayesianize(mlp(seed=1), x[:2])
    for bnn in (one, other):
        bnn.likelihood = Categorical()
    first, second = predict(one, x), predict(other, x)
    assert disagreement(first, second) == pytest.approx(float((first.labels != second.labels).float().mean()))
    assert disagreement(first, first) == 0
    for bnn in (one, other):
        bnn.likelihood = Gaussian(noise_std=0.5)
    first, second = predict(one, x), predict(other, x)
    expected = (first.mean - second.mean).square().mean().sqrt() / second.std.square().mean().sqrt()
    assert disagreement(first, second) == pytest.approx(float(expected), rel=1e-5)
