"""Victims are the predictors that they stand for, and can be differentiated."""

from __future__ import annotations

import math

import pytest
import torch
from attacked import bayesian, digits, dropout_victim, network_victim, posterior_victim, small_net, unseen
from torch import Tensor, nn

import stfbnn
from stfbnn import Categorical
from stfbnn.baselines import BayesianPredictor, DeepEnsemble, MCDropout, PointNetwork
from stfbnn.errors import InputError, NotFittedError
from stfbnn.posterior import MeanField, MixturePosterior, PointMass
from stfbnn.predictive import CategoricalPrediction
from stfbnn.robustness.victim import DropoutVictim, NetworksVictim, PosteriorVictim, Victim, victim
from stfbnn.threat import InputSpace


def mixture(family: object) -> stfbnn.BayesianNetwork:
    """Three components of unequal weights, set by hand."""
    x, y = digits()
    bnn = stfbnn.bayesianize(small_net(), x[:2])
    stfbnn.fit(bnn, [(x[:50], y[:50])], epochs=1, temperature=0.1, progress=False)
    centre = bnn.trained_vector()
    places = [centre + 0.3 * torch.randn(centre.shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    parts = [family.build(bnn.layout, place, bnn.prior) for place in places]  # type: ignore[attr-defined]
    bnn.posterior = MixturePosterior(bnn.layout, parts, torch.tensor([0.6, 0.3, 0.1]))
    return bnn


def assert_same(found: CategoricalPrediction, expected: object) -> None:
    assert isinstance(expected, CategoricalPrediction)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.aleatoric, expected.aleatoric, rtol=0, atol=1e-12)
    assert found.samples == expected.samples


@pytest.mark.parametrize("tau", [None, 2.0])
def test_a_posterior_predicts_as_predict_does(tau: float | None) -> None:
    x, _ = digits()
    expected = stfbnn.predict(bayesian(), x[:600], samples=5, seed=4, predictive_temperature=tau)
    found = PosteriorVictim(bayesian(), InputSpace(), 5, 4, tau).predict(x[:600])
    assert torch.equal(found.log_probs, expected.log_probs)  # type: ignore[attr-defined]
    assert_same(found, expected)


def test_a_mixture_counts_its_draws_by_weight() -> None:
    bnn, (x, _) = mixture(MeanField(0.05)), unseen(30)
    attacked = PosteriorVictim(bnn, InputSpace(), 7, 1)
    assert_same(attacked.predict(x), stfbnn.predict(bnn, x, samples=7, seed=1))
    shares = attacked.deployed().shares
    assert shares is not None
    assert float(shares.sum()) == pytest.approx(1)
    found = attacked.log_predictive(x, attacked.deployed())
    # A mixture's weights are in single precision, so that they sum to 1 to no more than that.
    torch.testing.assert_close(found, attacked.predict(x).log_probs, rtol=0, atol=1e-7)


def test_point_masses_draw_nothing() -> None:
    bnn, (x, _) = mixture(PointMass()), unseen(10)
    attacked = PosteriorVictim(bnn, InputSpace(), 16, 0)
    assert not attacked.random
    assert len(attacked.deployed()) == len(attacked.draw(16, 99)) == 3
    assert_same(attacked.predict(x), stfbnn.predict(bnn, x))


def test_networks_predict_as_their_baselines_do() -> None:
    x, _ = unseen(40)
    nets = [small_net(seed=seed) for seed in (0, 1, 2)]
    one, several = PointNetwork(nets[0], Categorical()), DeepEnsemble(nets, Categorical())
    for tau in (1.0, 0.7):
        expected = one.outputs(x).at(tau)
        assert isinstance(expected, CategoricalPrediction)
        torch.testing.assert_close(
            victim(one, temperature=tau).predict(x).log_probs, expected.log_probs, rtol=0, atol=1e-12
        )
        assert_same(victim(several, temperature=tau).predict(x), several.outputs(x).at(tau))


def test_inputs_before_and_after_normalisation_give_the_same() -> None:
    x, _ = unseen(10)
    space = InputSpace(mean=(0.3,), std=(0.4,))
    plain = network_victim().predict((x - 0.3) / 0.4).log_probs
    torch.testing.assert_close(NetworksVictim([small_net()], Categorical(), space).predict(x).log_probs, plain)


def test_dropout_averages_the_masks_of_its_seed() -> None:
    x, _ = unseen(12)
    attacked = dropout_victim(samples=3)
    assert torch.equal(attacked.predict(x).log_probs, attacked.predict(x).log_probs)
    one, other = (attacked.predict(x, attacked.draw(3, seed)) for seed in (1, 2))
    assert not torch.isclose(one.log_probs, other.log_probs).all(dim=1).any()
    # Of many masks, the average of the baseline; tiny probabilities have tails that no standard error describes.
    many = attacked.predict(x, attacked.draw(400, 1)).probs
    outputs = MCDropout(small_net(0.3), Categorical(), samples=400).outputs(x)
    members = outputs.outputs.double().softmax(-1)
    error = members.std(0) * math.sqrt(2 / 400)
    likely = members.mean(0) > 0.02
    assert ((many - members.mean(0)).abs() < 4.5 * error)[likely].all()
    assert error.max() < 0.05


def test_modes_parameters_and_global_generators_are_left_alone() -> None:
    x, y = unseen(8)
    net = small_net(0.3)
    net.train()
    try:
        state = torch.get_rng_state()
        for attacked in (dropout_victim(), victim(net)):
            leaf = x.clone().requires_grad_()
            attacked.log_predictive(leaf, attacked.draw(2, 1))[torch.arange(8), y].sum().backward()
            assert leaf.grad is not None
            assert bool((leaf.grad != 0).any())
        assert net.training
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        net.eval()
        net.zero_grad(set_to_none=True)


@pytest.mark.parametrize("make", [posterior_victim, dropout_victim, network_victim])
def test_the_differentiable_predictive_is_that_of_predict(make: object) -> None:
    x, _ = unseen(16)
    attacked = make()  # type: ignore[operator]
    assert isinstance(attacked, Victim)
    members = attacked.deployed()
    found = attacked.log_predictive(x, members).detach()
    torch.testing.assert_close(found, attacked.predict(x).log_probs, rtol=0, atol=1e-6)
    each = torch.stack(list(attacked.member_log_probs(x, members))).detach()
    torch.testing.assert_close(each.exp().mean(0).log(), found, rtol=0, atol=1e-9)


def test_draws_follow_from_their_seed() -> None:
    x, _ = unseen(5)
    attacked = posterior_victim()
    one, again, other = (attacked.predict(x, attacked.draw(3, seed)).log_probs for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).any()


def test_each_kind_of_predictor_finds_its_victim() -> None:
    net, bnn = small_net(), bayesian()
    assert isinstance(victim(net), NetworksVictim)
    assert isinstance(victim(MCDropout(small_net(0.3), Categorical())), DropoutVictim)
    found = victim(BayesianPredictor(bnn, samples=5, seed=2), samples=9)
    assert isinstance(found, PosteriorVictim)
    assert len(found.deployed()) == 5
    assert len(victim(bnn, samples=9).deployed()) == 9
    assert victim(bnn).temperature == bnn.predictive_temperature
    with pytest.raises(InputError, match="int cannot be attacked"):
        victim(3)


def test_what_is_no_classifier_is_refused() -> None:
    bnn = stfbnn.bayesianize(small_net(), digits()[0][:2])
    with pytest.raises(NotFittedError):
        victim(bnn)
    with pytest.raises(InputError, match="gaussian"):
        victim(PointNetwork(small_net(), stfbnn.Gaussian(noise_std=1.0)))

    class Maps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match=r"\(B, K\)"):
        victim(Maps()).predict(torch.rand(2, 3, 4, 4))
