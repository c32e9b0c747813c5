"""Releases: what each built-in one gives, and that it leaves stage one as it was."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from core_models import classification, mlp, trained
from stfbnn import Categorical, predict
from stfbnn.baselines import BayesianPredictor, DeepEnsemble, MCDropout, PointNetwork, Predictor, fit_temperature
from stfbnn.errors import InputError
from stfbnn.posterior import Mixture, MixturePosterior
from stfbnn.privacy.releases import (
    RELEASES,
    Dropout,
    Ensemble,
    FirstLayer,
    Network,
    Release,
    ReleaseData,
    TemperatureScaling,
    Tempered,
    WholeNetwork,
    describe,
    released_network,
    resolve_releases,
)

X, Y = classification(80)
HELD = classification(240, seed=7)
QUICK: dict[str, Release] = {
    "network": Network(),
    "temperature scaling": TemperatureScaling(),
    "stf-bnn": FirstLayer(epochs=1, temperatures=(0.1,), samples=3),
    "stf-bnn mixture": FirstLayer(
        posterior=Mixture(2, retrain_epochs=1, max_excess=9.0), epochs=1, temperatures=(0.1,), samples=4
    ),
    "mc dropout": Dropout(epochs=1, samples=3),
    "deep ensemble": Ensemble(members=2),
    "bayesian network": WholeNetwork(epochs=1, temperatures=(0.1,), samples=3),
}


def another(number: int) -> nn.Module:
    return trained(mlp(seed=number), X, Y, steps=10)


def stage_one() -> nn.Module:
    return trained(mlp(seed=0), X, Y, steps=60)


def data() -> ReleaseData:
    return ReleaseData(X, Y, *HELD, batch_size=16, another=another)


def test_every_built_in_release_has_a_quick_setting_here() -> None:
    assert QUICK.keys() == RELEASES.keys()
    assert all(type(QUICK[name]) is type(RELEASES[name]) for name in RELEASES)


@pytest.mark.parametrize("name", QUICK)
def test_a_release_predicts_and_leaves_stage_one_as_it_was(name: str) -> None:
    network = stage_one()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first, again = (QUICK[name](network, data(), 3) for _ in range(2))
    assert isinstance(first, Predictor)
    probs = first.outputs(X).at().probs
    assert probs.shape == (80, 3)
    assert torch.equal(probs, again.outputs(X).at().probs)
    assert (probs.argmax(1) == Y).double().mean() > 0.6
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    has_posterior = name in ("stf-bnn", "stf-bnn mixture", "bayesian network")
    assert (released_network(first) is not None) == has_posterior


def test_temperature_scaling_divides_the_logits_by_what_fits_held_out_examples() -> None:
    network = stage_one()
    found = TemperatureScaling()(network, data(), 0)
    assert isinstance(found, Tempered)
    with torch.no_grad():
        logits, held = network(X), network(HELD[0])
    tau = fit_temperature(held, HELD[1])
    assert tau != pytest.approx(1, abs=0.02)
    assert found.temperature == tau
    assert torch.allclose(found.outputs(X).at().log_probs, (logits.double() / tau).log_softmax(1), atol=1e-6)
    assert found.trainable_parameters == PointNetwork(network, Categorical()).trainable_parameters + 1
    assert found.artifact_bytes == 4


def test_a_tempered_posterior_is_that_of_predict() -> None:
    found = FirstLayer(epochs=1, temperatures=(0.1,), predictive_temperature="held-out", samples=5)(
        stage_one(), data(), 2
    )
    assert isinstance(found, Tempered)
    assert isinstance(found.predictor, BayesianPredictor)
    bnn = released_network(found)
    assert bnn is not None
    assert found.temperature == bnn.predictive_temperature != 1
    expected = predict(bnn, X, samples=5, seed=2).log_probs
    assert torch.allclose(found.outputs(X).at().log_probs, expected, atol=1e-6)


def test_a_mixture_has_several_components() -> None:
    bnn = released_network(QUICK["stf-bnn mixture"](stage_one(), data(), 0))
    assert bnn is not None
    assert isinstance(bnn.posterior, MixturePosterior)
    assert len(bnn.posterior) == 2


def test_dropout_is_added_and_trained_only_where_there_is_none() -> None:
    plain = stage_one()
    added = Dropout(epochs=1)(plain, data(), 0)
    assert isinstance(added, MCDropout)
    assert added.model is not plain
    own = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).eval()
    found = Dropout()(own, data(), 0)
    assert isinstance(found, MCDropout)
    assert found.model is own


def test_an_ensemble_averages_stage_one_and_the_others() -> None:
    networks = (stage_one(), another(1), another(2))
    found = Ensemble(members=3)(networks[0], data(), 0)
    assert isinstance(found, DeepEnsemble)
    with torch.no_grad():
        expected = torch.stack([net(X).softmax(1) for net in networks]).mean(0)
    assert torch.allclose(found.outputs(X).at().probs.float(), expected, atol=1e-6)


def test_the_training_loader_shuffles_by_its_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        return next(iter(data().train_loader(seed)))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert sum(len(labels) for _, labels in data().held_loader()) == 240


def test_releases_go_by_name_or_are_the_users_own() -> None:
    assert resolve_releases(["network", "stf-bnn"]) == {"network": Network(), "stf-bnn": FirstLayer()}
    own = partial(Network())
    found = resolve_releases({"plain": "network", "own": own})
    assert list(found) == ["plain", "own"]
    assert found["own"] is own
    for wrong in (["what"], [], "network", ["network", "network"], {"a": "what"}, {"a": 3}, {"": "network"}, 5):
        with pytest.raises(InputError, match="release"):
            resolve_releases(wrong)  # type: ignore[arg-type]


def test_a_description_tells_settings_apart() -> None:
    assert describe(FirstLayer(epochs=3)) == describe(FirstLayer(epochs=3))
    assert describe(FirstLayer(epochs=3)) != describe(FirstLayer(epochs=4))
    assert describe(FirstLayer(posterior=Mixture(2))) != describe(FirstLayer(posterior=Mixture(3)))
    assert describe(another) == f"{__name__}.another"


def test_wrong_settings_are_refused() -> None:
    for members in (1, True, 2.0):
        with pytest.raises(InputError, match="at least 2"):
            Ensemble(members=members)  # type: ignore[arg-type]
    network = PointNetwork(mlp(), Categorical())
    for tau in (0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="temperature"):
            Tempered(network, tau)
    with pytest.raises(InputError, match="logits"):
        Tempered(PointNetwork(mlp(), Categorical(outputs="probabilities")), 2.0)
