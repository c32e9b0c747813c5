"""Every likelihood from inference to prediction, evaluation and a saved posterior."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Laplace

from core_models import loader, mlp
from stfbnn.artifact import load, save
from stfbnn.cli.prediction_files import columns_of
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.evaluation.evaluate import TRAINED, contenders, evaluate, side_by_side
from stfbnn.inference.fit import fit
from stfbnn.likelihood import Bernoulli, CustomLikelihood, HeteroscedasticGaussian, Likelihood, Poisson
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import predict
from stfbnn.predictive import (
    BernoulliPrediction,
    CustomPrediction,
    HeteroscedasticPrediction,
    PoissonPrediction,
    Prediction,
)

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(300, 6, generator=RANDOM)
SIGNAL = X @ torch.randn(6, 2, generator=RANDOM) / 2


def laplace(outputs: Tensor, targets: Tensor) -> Tensor:
    return Laplace(outputs, 0.5).log_prob(targets).sum(1)


def laplace_draw(outputs: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(outputs.shape, generator=generator) - 0.5
    return outputs - 0.5 * uniform.sign() * (-2 * uniform.abs()).log1p()


@dataclass(frozen=True)
class Case:
    likelihood: str | Likelihood
    targets: Tensor
    outputs: int
    prediction: type[Prediction]
    loss: Callable[[Tensor, Tensor], Tensor]


def _loss(likelihood: Likelihood) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: -likelihood.log_prob(outputs, targets).mean()


NOISE = torch.randn(300, 2, generator=RANDOM)
NUMBERS = SIGNAL + NOISE * (0.2 + 0.5 * (X[:, :1] > 0))
CASES = {
    "bernoulli": Case("bernoulli", (SIGNAL + NOISE / 2 > 0).long(), 2, BernoulliPrediction, _loss(Bernoulli())),
    "heteroscedastic": Case("heteroscedastic", NUMBERS, 4, HeteroscedasticPrediction, _loss(HeteroscedasticGaussian())),
    "poisson": Case(
        "poisson", torch.poisson((SIGNAL / 2 + 1).exp(), generator=RANDOM), 2, PoissonPrediction, _loss(Poisson())
    ),
    "custom": Case(CustomLikelihood(laplace), NUMBERS, 2, CustomPrediction, _loss(CustomLikelihood(laplace))),
    "custom with draws": Case(
        CustomLikelihood(laplace, sample=laplace_draw), NUMBERS, 2, CustomPrediction, _loss(CustomLikelihood(laplace))
    ),
}


def trained(case: Case) -> nn.Module:
    net = mlp(outputs=case.outputs)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        case.loss(net(X[:200]), case.targets[:200]).backward()
        optimizer.step()
    return net.eval()


def fitted(case: Case, engine: str = "auto", **options: object) -> tuple[nn.Module, BayesianNetwork]:
    net = trained(case)
    bnn = bayesianize(net, X[:2])
    options = {"temperature": 1.0, "epochs": 3, **options}
    fit(bnn, loader(X[:200], case.targets[:200]), likelihood=case.likelihood, engine=engine, **options)  # type: ignore[arg-type]
    return net, bnn


cases = pytest.mark.parametrize("name", CASES)


@cases
@pytest.mark.parametrize("engine", ["natural-gradient", "bayes-by-backprop"])
def test_inference_and_prediction(name: str, engine: str) -> None:
    case = CASES[name]
    net, bnn = fitted(case, engine)
    pred = predict(bnn, X[200:], samples=8)
    assert type(pred) is case.prediction
    assert len(pred) == 100
    density = float(pred.log_density(case.targets[200:]).mean())
    # The posterior has learned as much as the network: its density is near, and far above that of shuffled targets.
    own = -float(case.loss(net(X[200:]), case.targets[200:]).detach())
    assert density > own - 0.1
    assert density > float(pred.log_density(case.targets[200:].roll(1, 0)).mean()) + 0.3
    # Given what the posterior is, batching is of no matter.
    parts = Prediction.concatenate([predict(bnn, X[200:230], samples=8), predict(bnn, X[230:], samples=8)])
    torch.testing.assert_close(parts.log_density(case.targets[200:]), pred.log_density(case.targets[200:]))


@pytest.mark.parametrize("name", ["bernoulli", "heteroscedastic", "poisson"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    net, bnn = fitted(case)
    save(bnn, tmp_path / "posterior")
    again = load(tmp_path / "posterior", net)
    assert again.likelihood is not None
    assert bnn.likelihood is not None
    assert again.likelihood.config() == bnn.likelihood.config()
    targets = case.targets[200:]
    assert torch.equal(
        predict(again, X[200:], samples=4).log_density(targets), predict(bnn, X[200:], samples=4).log_density(targets)
    )


def test_functions_are_not_saved(tmp_path: Path) -> None:
    _, bnn = fitted(CASES["custom"], epochs=1)
    with pytest.raises(InputError, match=r"CustomLikelihood cannot be built again.*user's own making"):
        save(bnn, tmp_path / "posterior")
    assert not (tmp_path / "posterior").exists()


def test_a_run_with_functions_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    case = CASES["custom"]
    _, whole = fitted(case, epochs=2)
    state = tmp_path / "state"

    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        if state.exists():
            raise KeyboardInterrupt
        return laplace(outputs, targets)

    failing.__module__, failing.__qualname__ = laplace.__module__, laplace.__qualname__
    stopped = Case(CustomLikelihood(failing), case.targets, case.outputs, case.prediction, case.loss)
    with pytest.raises(KeyboardInterrupt):
        fitted(stopped, epochs=2, checkpoint=state)
    _, resumed = fitted(case, epochs=2, checkpoint=state)
    torch.testing.assert_close(resumed.posterior.mean_vector(), whole.posterior.mean_vector(), rtol=0, atol=0)


@cases
def test_held_out_data_choose_the_temperature(name: str) -> None:
    case = CASES[name]
    held = [(X[200:], case.targets[200:])]
    options = {"temperature": "held-out", "temperatures": (1.0, 0.1), "epochs": 2, "val_loader": held, "val_samples": 4}
    if name == "bernoulli":
        _, bnn = fitted(case, **options, predictive_temperature="held-out")
        around = {
            tau: float(
                predict(bnn, X[200:], samples=4, predictive_temperature=tau).log_density(case.targets[200:]).mean()
            )
            for tau in (0.3, 1.0, 3.0)
        }
        assert bnn.predictive_temperature != 1
        best = float(predict(bnn, X[200:], samples=4).log_density(case.targets[200:]).mean())
        assert best > max(around[0.3], around[3.0])
    else:
        _, bnn = fitted(case, **options)
        assert bnn.predictive_temperature == 1
        with pytest.raises(InputError, match="logits"):
            predict(bnn, X[:4], predictive_temperature=2.0)
        with pytest.raises(InputError, match="predictive temperature"):
            fitted(case, **{**options, "predictive_temperature": "held-out"})


def test_held_out_targets_are_checked_before_long_work() -> None:
    case = CASES["poisson"]
    held = [(X[200:], case.targets[200:]), (X[:60], case.targets[:60] - 20)]
    with pytest.raises(InputError, match="negative"):
        fitted(case, val_loader=held)


@pytest.mark.parametrize("name", ["bernoulli", "heteroscedastic", "poisson"])
def test_figures_and_contenders(name: str) -> None:
    case = CASES[name]
    net, bnn = fitted(case)
    held, test = [(X[200:250], case.targets[200:250])], [(X[250:], case.targets[250:])]
    methods = list(contenders(net, bnn, held, samples=4, progress=False))
    assert len(methods) == (3 if name == "bernoulli" else 2)
    side = side_by_side(methods, test)
    score = "nll" if name == "bernoulli" else "mean_log_density"
    own = side.predictions[TRAINED].log_density(case.targets[250:])
    losses = torch.stack([case.loss(net(X[i : i + 1]), case.targets[i : i + 1]) for i in range(250, 300)])
    torch.testing.assert_close(own.float(), -losses, rtol=1e-4, atol=1e-4)
    # For labels the mean is over each of the two of an example.
    expected = -float(own.mean()) / 2 if name == "bernoulli" else float(own.mean())
    assert getattr(side.metrics[TRAINED], score) == pytest.approx(expected, rel=1e-5)
    columns = columns_of(side.predictions["STF-BNN"], None)
    assert all(len(values) == 50 for values in columns.values())
    assert ("probability_1" if name == "bernoulli" else "std_1") in columns
    with pytest.raises(InputError, match="entropy of their class"):
        side_by_side(methods, test, {"strange": [(X[:10], case.targets[:10])]})


def test_temperature_scaling_of_labels_is_that_of_their_logits() -> None:
    case = CASES["bernoulli"]
    net, bnn = fitted(case)
    held = [(X[200:], case.targets[200:])]
    scaled = list(contenders(net, bnn, held, samples=4, progress=False))[1]
    tau = float(scaled.note.split("=")[1].split()[0])
    with torch.no_grad():
        losses = {
            factor: float(-Bernoulli().label_log_probs(net(X[200:]), case.targets[200:], tau * factor).mean())
            for factor in (0.97, 1.0, 1.03)
        }
    assert losses[1.0] < min(losses[0.97], losses[1.03])


def test_a_custom_prediction_has_no_figures_and_no_table() -> None:
    _, bnn = fitted(CASES["custom"], epochs=1)
    pred = predict(bnn, X[200:], samples=2)
    with pytest.raises(InputError, match="log_density"):
        evaluate(pred, CASES["custom"].targets[200:])
    with pytest.raises(InputError, match="custom likelihood"):
        columns_of(pred, None)


def test_one_logit_and_bool_targets_are_bernoulli() -> None:
    targets = CASES["bernoulli"].targets[:, 0].bool()
    net = mlp(outputs=1)
    bnn = bayesianize(net, X[:2])
    fit(bnn, loader(X, targets), epochs=1, temperature=1.0)
    assert isinstance(bnn.likelihood, Bernoulli)
    pred = predict(bnn, X, samples=3)
    assert isinstance(pred, BernoulliPrediction)
    assert pred.probs.shape == (300, 1)
    assert math.isfinite(float(pred.log_density(targets).mean()))
