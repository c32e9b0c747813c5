"""Predictions and targets to figures, and the contenders, against direct computation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stfbnn.baselines import fit_temperature
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.evaluation.evaluate import (
    BAYESIAN,
    SCALED,
    TRAINED,
    contenders,
    evaluate,
    network_outputs,
    point_prediction,
    side_by_side,
    targets_of,
)
from stfbnn.inference.fit import fit
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.prediction import predict
from stfbnn.predictive import CategoricalPrediction, GaussianPrediction


def batches(x, y, size=16):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.fixture(scope="module")
def classified():
    torch.manual_seed(0)
    x = torch.randn(120, 4)
    y = (x[:, 0] + 0.7 * torch.randn(120) > 0).long() + (x[:, 1] > 1).long()
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[3].weight *= 6
    bnn = bayesianize(model, x[:4])
    fit(bnn, batches(x[:60], y[:60]), epochs=2, temperature=0.3, progress=False)
    return model, bnn, x, y


def test_figures_of_classes_are_those_of_the_formulas():
    log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    found = evaluate(CategoricalPrediction(1, True, log_probs, torch.zeros(2)), torch.tensor([0, 1]))
    assert found.accuracy == 0.5
    assert found.nll == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    assert found.brier == pytest.approx((0.09 + 0.04 + 0.01 + 0.09 + 0.49 + 0.16) / 2)


def test_positions_of_an_example_count_one_by_one():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 3, 2, 2), torch.randint(0, 3, (5, 2, 2))
    found = evaluate(point_prediction(logits, Categorical()), targets)
    assert found.count == 20
    assert found.nll == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)


def test_figures_of_numbers_match_a_column_to_a_vector():
    draws, y = torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]]), torch.tensor([2.0, 5.0])
    found = evaluate(GaussianPrediction(2, False, draws, torch.tensor(1.0)), y)
    assert found.rmse == pytest.approx(math.sqrt((0 + 9) / 2))
    assert found.sharpness == pytest.approx(math.sqrt(((1 + 1) + 1) / 2))
    normal = torch.distributions.Normal(draws.squeeze(-1), 1.0)
    expected = (normal.log_prob(y).logsumexp(0) - math.log(2)).mean()
    assert found.mean_log_density == pytest.approx(float(expected))


def test_a_networks_outputs_are_those_of_eval_mode_and_its_modes_come_back(classified):
    model, _, x, y = classified
    model.train()
    model[2].eval()
    found = network_outputs(model, batches(x, y))
    assert [module.training for module in model] == [True, True, False, True]
    model.eval()
    with torch.no_grad():
        assert torch.allclose(found, model(x), atol=1e-6)
    assert torch.equal(network_outputs(model, x[:3]), network_outputs(model, [x[:3]]))


def test_empty_loaders_are_refused(classified):
    with pytest.raises(InputError, match="nothing to evaluate"):
        targets_of([])
    with pytest.raises(InputError, match="nothing to predict"):
        network_outputs(classified[0], [])


def test_the_contenders_are_what_their_names_say(classified):
    model, bnn, x, y = classified
    held, test = batches(x[60:90], y[60:90]), batches(x[90:], y[90:])
    found = {method.name: method.predict(test) for method in contenders(model, bnn, held, 8, 3, False)}
    assert list(found) == [TRAINED, SCALED, BAYESIAN]
    with torch.no_grad():
        logits = {name: model.eval()(part).double() for name, part in {"held": x[60:90], "test": x[90:]}.items()}
    tau = fit_temperature(logits["held"], y[60:90])
    assert abs(math.log(tau)) > 0.05
    for name, scale in ((TRAINED, 1.0), (SCALED, tau)):
        assert torch.allclose(found[name].probs, (logits["test"] / scale).softmax(1), atol=1e-6)
    assert torch.equal(found[BAYESIAN].probs, predict(bnn, x[90:], samples=8, seed=3, progress=False).probs)
    assert [method.name for method in contenders(model, bnn, None)] == [TRAINED, BAYESIAN]


def test_side_by_side_separates_strange_examples_as_pairs_do(classified):
    model, bnn, x, y = classified
    strange = 6 * torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    test = batches(x[90:], y[90:])
    side = side_by_side(contenders(model, bnn, None, 8, 0, False), test, {"far": strange})
    assert torch.equal(side.targets, y[90:])
    assert side.metrics[TRAINED] == evaluate(side.predictions[TRAINED], y[90:])
    seen = side.outside["far"]
    assert seen[TRAINED].auroc_epistemic is None
    for score, found in (
        ("entropy", seen[BAYESIAN].auroc_entropy),
        ("epistemic", seen[BAYESIAN].auroc_epistemic),
    ):
        inside, outside = getattr(side.predictions[BAYESIAN], score), getattr(seen[BAYESIAN].prediction, score)
        wins = (outside[:, None] > inside[None]).double() + 0.5 * (outside[:, None] == inside[None]).double()
        assert found == pytest.approx(float(wins.mean()))


def test_a_regressions_network_gets_the_noise_of_its_held_out_residuals():
    torch.manual_seed(0)
    x = torch.randn(90, 3)
    y = x.sum(1) + 0.5 * torch.randn(90)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    bnn = bayesianize(model, x[:4])
    fit(bnn, batches(x[:50], y[:50]), epochs=1, temperature=1.0, likelihood=Gaussian(), progress=False)
    held = batches(x[50:], y[50:])
    with torch.no_grad():
        residuals = y[50:] - model(x[50:]).squeeze(1)
    trained, bayesian = contenders(model, bnn, held, 4, 0, False)
    assert (trained.name, bayesian.name) == (TRAINED, BAYESIAN)
    noise = trained.predict(held).std
    assert noise.flatten()[0].item() == pytest.approx(residuals.square().mean().sqrt().item(), rel=1e-5)
    assert noise.min() == noise.max()
    without = next(contenders(model, bnn, None, 4, 0, False))
    assert without.predict(held).std.flatten()[0].item() == pytest.approx(float(bnn.likelihood.noise_std), rel=1e-5)
    with pytest.raises(InputError, match="regression"):
        side_by_side(contenders(model, bnn, held, 4, 0, False), held, {"far": x})
