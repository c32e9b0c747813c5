"""The last layer: which it is, that features computed once change nothing, and the closed form on them."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn import models
from stfbnn.baselines.last_layer import LastLayerPredictor, fit_last_layer, head_features, last_layer_name
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import Predictor, Reading
from stfbnn.errors import InputError, LayerError
from stfbnn.likelihood import Gaussian
from stfbnn.posterior import Mixture
from stfbnn.prediction import member_outputs
from stfbnn.provenance import attach, provenance_of


class Backwards(nn.Module):
    """Registered in the wrong order, and with a normalisation at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.end, self.head, self.body = nn.LayerNorm(3), nn.Linear(12, 3), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(torch.relu(self.body(x))))


def test_the_last_layer_is_that_in_execution_order() -> None:
    x = torch.randn(2, 6)
    assert last_layer_name(mlp(), x) == "2"
    assert last_layer_name(Backwards(), x) == "head"
    assert last_layer_name(models.mlp((6,), 1, target_mean=[0.0], target_std=[2.0]), x) == "5"
    assert last_layer_name(conv_net(), torch.randn(2, 1, 8, 8)) == "9"
    assert last_layer_name(nn.Linear(6, 2), x) == ""
    with pytest.raises(LayerError, match="'0', which are passed over"):
        last_layer_name(nn.Sequential(nn.LayerNorm(6), nn.ReLU()), x)
    with pytest.raises(LayerError, match="none"):
        last_layer_name(nn.ReLU(), x)


def test_features_are_given_only_where_the_network_ends_in_its_last_layer() -> None:
    x = torch.randn(5, 6)
    net = mlp().eval()
    found = head_features(net, "2", x)
    assert found is not None
    torch.testing.assert_close(found, net[1](net[0](x)).detach())
    assert not net[2]._forward_hooks
    assert head_features(net, "0", x) is None
    assert head_features(Backwards().eval(), "head", x) is None
    assert head_features(models.mlp((6,), 1, target_mean=[0.0], target_std=[2.0]), "5", x) is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("engine", ["natural-gradient", "bayes-by-backprop"])
def test_fitting_on_features_gives_the_posterior_of_fitting_through_the_network(
    engine: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The order decides which labels are drawn for the curvature at the start.
    monkeypatch.setattr(torch, "randperm", torch.arange)
    x, y = classification(96)
    net = trained(mlp(), x, y, steps=40)
    weights = (torch.rand(96, generator=torch.Generator().manual_seed(1)),) if weighted else ()
    found = []
    for cached in (True, False):
        bnn, run = fit_last_layer(
            net,
            [(x, y, *weights)],
            cache_features=cached,
            engine=engine,
            estimator="antithetic",
            epochs=6,
            temperature=0.3,
            seed=2,
        )
        found.append((bnn, run))
    (one, first), (other, second) = found
    torch.testing.assert_close(one.posterior.mean_vector(), other.posterior.mean_vector(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.posterior.std_vector(), other.posterior.std_vector(), rtol=1e-3, atol=1e-6)
    assert first.history[-1].nll == pytest.approx(second.history[-1].nll, rel=1e-4)
    assert (one.layer_name, one.temperature, one.num_examples) == (other.layer_name, other.temperature, 96)


def test_on_given_features_it_is_the_best_mean_field_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    net = mlp(hidden=4, outputs=1).double()
    y = net(x).detach() * 2 + 0.3 * torch.randn(200, 1, generator=generator, dtype=torch.float64)
    bnn, run = fit_last_layer(
        net,
        [(x, y)] * 40,
        prior=0.8,
        num_examples=200,
        likelihood=Gaussian(noise_std=0.3),
        temperature=1.0,
        epochs=15,
        engine_options={"curvature_rate": 1e-4, "learning_rate": 0.1},
        draws=4,
    )
    features = net[1](net[0](x)).detach()
    design = torch.cat([features, torch.ones(200, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / 0.09 + torch.eye(5, dtype=torch.float64) / 0.64
    mean = torch.linalg.solve(precision, design.T @ y / 0.09).squeeze()
    std = precision.diagonal().rsqrt()
    assert run.num_examples == 200
    assert ((bnn.posterior.mean_vector().detach() - mean).abs() < 0.3 * std).all()
    torch.testing.assert_close(bnn.posterior.std_vector().detach(), std, rtol=0.08, atol=0)


@pytest.mark.parametrize("kind", ["mlp", "conv", "scaled", "backwards"])
def test_draws_on_features_are_the_draws_through_the_network(kind: str) -> None:
    shape = (1, 8, 8) if kind == "conv" else (6,)
    net = {
        "mlp": mlp,
        "conv": conv_net,
        "scaled": lambda: models.mlp((6,), 3, hidden=8, target_mean=[1.0], target_std=[2.0]),
        "backwards": Backwards,
    }[kind]().eval()
    x, y = torch.randn(40, *shape), torch.randint(0, 3, (40,))
    bnn, _ = fit_last_layer(net, loader(x, y), epochs=1, temperature=0.3)
    predictor = LastLayerPredictor(bnn, samples=4, seed=3)
    assert isinstance(predictor, Predictor)
    outputs = predictor.outputs(x)
    expected = member_outputs(bnn, x, samples=4, seed=3)
    torch.testing.assert_close(outputs.outputs, expected.outputs)
    torch.testing.assert_close(predictor.outputs(loader(x, y, 7, shuffle=False)).outputs, outputs.outputs)
    assert torch.equal(BayesianPredictor(bnn, 4, 3).outputs(x).outputs, expected.outputs)
    assert predictor.trainable_parameters == 2 * bnn.layout.size


def test_a_mixture_over_the_last_layer_keeps_its_shares() -> None:
    x, y = classification(60)
    net = trained(mlp(), x, y, steps=40)
    bnn, run = fit_last_layer(net, loader(x, y), posterior=Mixture(2, weighting="equal"), epochs=2, temperature=0.3)
    assert len(run.components) == 2
    outputs = LastLayerPredictor(bnn, samples=5).outputs(x)
    expected = member_outputs(bnn, x, samples=5)
    torch.testing.assert_close(outputs.outputs, expected.outputs)
    assert (outputs.shares is None) == (expected.shares is None)
    torch.testing.assert_close(outputs.at().probs, expected.at().probs)


class Counting(nn.Module):
    rows: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).rows += len(x)
        return x


def test_the_network_runs_once_for_each_example() -> None:
    x, y = classification(100)
    x_val, y_val = classification(50, seed=1)
    net = nn.Sequential(nn.Linear(6, 8), Counting(), nn.ReLU(), nn.Linear(8, 3))
    Counting.rows = 0
    bnn, run = fit_last_layer(
        net, loader(x, y), val_loader=loader(x_val, y_val), epochs=5, temperatures=(1.0, 0.3), early_stop="nll"
    )
    # The two halves, and a few rows to look at the network.
    assert 150 <= Counting.rows < 170
    assert run.network_held_out_nll is not None
    Counting.rows = 0
    LastLayerPredictor(bnn, samples=8).outputs(x)
    assert Counting.rows == 100


def test_the_users_network_stays_as_it_was_and_the_seed_decides() -> None:
    net = conv_net()
    net[1].train()
    net[3].weight.requires_grad_(False)
    x, y = torch.randn(48, 1, 8, 8), torch.randint(0, 3, (48,))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    wants = [parameter.requires_grad for parameter in net.parameters()]
    rng = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        bnn, _ = fit_last_layer(net, loader(x, y, 16), epochs=2, temperature=0.3, seed=seed)
        found.append(bnn.posterior.mean_vector().detach())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert wants == [parameter.requires_grad for parameter in net.parameters()]
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("cached", [True, False])
def test_mappings_and_held_out_choices(cached: bool) -> None:
    x, y = classification(80)
    x_val, y_val = classification(80, seed=1)
    net = trained(mlp(), x, y, steps=100)

    def batches(inputs: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
        return [{"input": inputs[i : i + 20], "y": targets[i : i + 20]} for i in range(0, 80, 20)]

    bnn, run = fit_last_layer(
        net,
        batches(x, y),
        val_loader=batches(x_val, y_val),
        cache_features=cached,
        epochs=2,
        predictive_temperature="held-out",
        reading=Reading(target_key="y"),
    )
    assert run.held_out_nll is not None
    assert bnn.predictive_temperature == run.predictive_temperature != 1
    assert LastLayerPredictor(bnn, 3, reading=Reading(target_key="y")).outputs(batches(x, y)).outputs.shape == (
        3,
        80,
        3,
    )


@pytest.mark.parametrize("cached", [True, False])
def test_held_out_data_that_a_stage_saw_are_refused(cached: bool) -> None:
    x, y = classification(60)
    x_val, y_val = classification(60, seed=1)
    net = mlp()
    data = loader(x, y)
    common = {"cache_features": cached, "epochs": 1, "temperatures": (0.3,)}
    with pytest.raises(InputError, match="not held out"):
        fit_last_layer(net, data, val_loader=loader(x, y), **common)
    with pytest.raises(InputError, match="not held out"):
        fit_last_layer(net, data, val_loader=data, **common)
    attach(net, provenance_of(loader(x_val, y_val)))
    with pytest.raises(InputError, match="not held out"):
        fit_last_layer(net, data, val_loader=loader(x_val, y_val), **common)


def test_a_named_layer_and_what_is_refused() -> None:
    x, y = classification(60)
    bnn, _ = fit_last_layer(mlp(), loader(x, y), layer="0", epochs=1, temperature=0.3)
    assert bnn.layer_name == "0"
    with pytest.raises(LayerError, match="no module 'nine'"):
        fit_last_layer(mlp(), loader(x, y), layer="nine", temperature=0.3)
    with pytest.raises(InputError, match="empty"):
        fit_last_layer(mlp(), [], temperature=0.3)
    with pytest.raises(InputError, match="temperature"):
        fit_last_layer(mlp(), loader(x, y), temperature=-1.0)
