"""Deep ensembles against the average by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from core_models import classification, conv_net, loader, mlp
from stfbnn import Categorical, Gaussian
from stfbnn.baselines import DeepEnsemble, Predictor
from stfbnn.baselines.predictor import parameter_count, state_bytes
from stfbnn.errors import InputError


def test_probabilities_are_those_averaged_by_hand() -> None:
    nets = [mlp(seed=seed) for seed in range(3)]
    x, y = classification(90)
    ensemble = DeepEnsemble(nets, Categorical())
    assert isinstance(ensemble, Predictor)
    found = ensemble.outputs(x)
    with torch.no_grad():
        probs = torch.stack([net(x).double().div(1.7).softmax(1) for net in nets])
    prediction = found.at(1.7)
    mean = probs.mean(0)
    assert torch.allclose(prediction.probs, mean, atol=1e-6)
    epistemic = -(mean * mean.log()).sum(1) + (probs * probs.log()).sum(2).mean(0)
    assert torch.allclose(prediction.epistemic, epistemic, atol=1e-5)
    assert epistemic.min() > 0
    by_loader = ensemble.outputs(loader(x, y, 13, shuffle=False))
    assert torch.equal(by_loader.outputs, found.outputs)


def test_regression_is_the_mixture_of_the_members_densities() -> None:
    nets = [mlp(outputs=1, seed=seed) for seed in range(4)]
    x, _ = classification(20)
    y = torch.randn(20, 1, generator=torch.Generator().manual_seed(3))
    prediction = DeepEnsemble(nets, Gaussian(noise_std=0.5)).outputs(x).at()
    with torch.no_grad():
        each = torch.stack([torch.distributions.Normal(net(x).double(), 0.5).log_prob(y)[:, 0] for net in nets])
        outputs = torch.stack([net(x) for net in nets])
    assert torch.allclose(prediction.log_density(y), each.logsumexp(0) - math.log(4), atol=1e-5)
    variance = outputs.var(0, correction=0) + 0.25
    assert torch.allclose(prediction.std.square().float(), variance, atol=1e-5)


def test_members_keep_buffers_modes_and_weights_of_their_own() -> None:
    nets = [conv_net(0), conv_net(5)]
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.stack([net(x) for net in nets])
    nets[1].train()
    states = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    found = DeepEnsemble(nets, Categorical()).outputs(x).outputs
    assert torch.allclose(found, expected, atol=1e-6)
    assert not nets[0].training
    assert all(module.training for module in nets[1].modules())
    for net, state in zip(nets, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_cost_counts_all_networks_and_keeps_all_that_the_user_has_not() -> None:
    nets = [mlp(seed=seed, hidden=4 + seed) for seed in range(3)]
    assert DeepEnsemble(nets, Categorical()).trainable_parameters == sum(map(parameter_count, nets))
    assert DeepEnsemble(nets, Categorical()).artifact_bytes == state_bytes(nets[1]) + state_bytes(nets[2])
    assert DeepEnsemble(nets, Categorical(), users_networks=0).artifact_bytes == sum(map(state_bytes, nets))


def test_what_is_no_ensemble_is_refused() -> None:
    net = mlp()
    for bad, message in (([net], "at least two"), ([net, net], "twice"), (net, "Sequential"), ([net, 3], "int")):
        with pytest.raises(InputError, match=message):
            DeepEnsemble(bad, Categorical())
    with pytest.raises(InputError, match="is a Linear"):
        DeepEnsemble(nn.Linear(2, 2), Categorical())
    with pytest.raises(InputError, match="users_networks"):
        DeepEnsemble([net, mlp(seed=1)], Categorical(), users_networks=3)
    ensemble = DeepEnsemble([net, mlp(outputs=2)], Categorical())
    with pytest.raises(InputError, match="one shape"):
        ensemble.outputs(torch.zeros(3, 6))
