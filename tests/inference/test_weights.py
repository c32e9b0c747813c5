"""Weights of examples: closed forms, and that a weight of 2 is an example that is there twice."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, loader, mlp, trained
from stfbnn.batches import Batch
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference import hmc
from stfbnn.inference.components.scoring import training_nll
from stfbnn.inference.components.weights import stack, weigh_by_held_out
from stfbnn.inference.engines import build_engine
from stfbnn.inference.estimators import (
    Estimate,
    Estimator,
    LocalReparameterization,
    Minibatch,
    PerExample,
    Sampler,
    SharedSample,
)
from stfbnn.inference.estimators.base import Average
from stfbnn.inference.fit import fit
from stfbnn.inference.held_out import HeldOut
from stfbnn.inference.hmc import sample_hmc
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.inference.run import Run
from stfbnn.inference.suggest_prior import suggest_prior
from stfbnn.inference.survey import survey
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanField, Mixture
from stfbnn.prediction import predict
from stfbnn.progress import progress_bar

NOISE, PRIOR_STD, COUNT = 0.5, 0.8, 60
COUNTS = torch.tensor([2, 1, 0, 3, 1] * 8)  # copies of 40 examples: 56 rows
X, Y = classification(40)


def weighted_regression() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, weights, and the exact posterior: Λ = Xᵀ A X / noise² + I / prior², m = Λ⁻¹ Xᵀ A y / noise²."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += 0.9 * x[:, 0]
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(COUNT, generator=generator).double()
    weight = 3 * torch.rand(COUNT, generator=generator, dtype=torch.float64)
    weight[::7] = 0
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    precision = design.T @ (weight[:, None] * design) / NOISE**2 + torch.eye(4, dtype=torch.float64) / PRIOR_STD**2
    mean = torch.linalg.solve(precision, design.T @ (weight * y) / NOISE**2)
    return x, y, weight, mean, torch.linalg.inv(precision)


class Cubature(Estimator):
    """E_q by the points m ± √d L e_i, which is exact for a loss that is quadratic in the weights."""

    def estimate(self, minibatch: Minibatch, sampler: Sampler, generator: torch.Generator) -> Estimate:
        size = sampler.noise_size
        average = Average(2 * size)
        for noise in math.sqrt(size) * torch.cat([torch.eye(size), -torch.eye(size)]).to(sampler.leaves[0]):
            with torch.enable_grad():
                weights = sampler.draw(noise)
            nll, gradient = minibatch(weights.detach())
            average.add(nll, torch.autograd.grad(weights, sampler.leaves, gradient))
        return average.result()


@pytest.mark.parametrize("family", ["full", "mean-field"])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_weighted_regression_is_recovered_within_one_per_cent(family: str, temperature: float) -> None:
    x, y, weight, mean, covariance = weighted_regression()
    bnn = bayesianize(nn.Linear(3, 1).double(), x[:2], prior=PRIOR_STD, posterior=family)
    fit(
        bnn,
        [(x, y, weight)] * 15,
        epochs=9,
        num_examples=COUNT,
        engine_options={"learning_rate": 0.6, "momentum": 0.0, "curvature_trust": 1.0},
        estimator=Cubature(),
        # At temperature T the log-likelihood counts 1/T: like a noise that is √T times as large.
        likelihood=Gaussian(noise_std=NOISE / math.sqrt(temperature)),
        temperature=temperature,
    )
    best = covariance if family == "full" else torch.diag(torch.linalg.inv(covariance).diagonal().reciprocal())
    assert ((bnn.posterior.mean_vector() - mean).abs() < 0.01 * best.diagonal().sqrt()).all()
    assert torch.linalg.matrix_norm(bnn.posterior.covariance() - best) < 0.01 * torch.linalg.matrix_norm(best)


@pytest.mark.parametrize("likelihood", [Categorical(class_weights=[1.0, 2.0, 0.5]), Gaussian(noise_std=0.7)])
def test_the_curvature_is_the_weighted_gauss_newton_matrix(likelihood: Categorical | Gaussian) -> None:
    x, y = X.double()[:24], Y[:24]
    weight = COUNTS[:24].double() / 2
    bnn = bayesianize(mlp().double(), x[:2])
    targets = y if isinstance(likelihood, Categorical) else torch.randn(24, 3, dtype=torch.float64)
    with progress_bar("", None, show=False) as bar:
        found = survey(bnn, [(x, targets, weight)] * 400, likelihood, "labels", 0, True, False, bar)
    assert found.num_examples == 400 * 24
    assert found.total_weight == pytest.approx(400 * float(weight.sum()))
    at = bnn.posterior.mean_vector().detach()
    jacobian = torch.func.jacrev(lambda w: bnn.outputs(w, x))(at)
    if isinstance(likelihood, Categorical):
        p = bnn.outputs(at, x).softmax(1)
        hessian = torch.tensor([1.0, 2.0, 0.5])[y, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    else:
        hessian = torch.eye(3, dtype=torch.float64).expand(24, 3, 3) / 0.7**2
    exact = torch.einsum("n,nid,nij,njd->d", weight, jacobian, hessian, jacobian) / 24
    assert found.curvature is not None
    # The square of a Gaussian-like score has the relative error √(2/400); 84 of them at five.
    assert ((found.curvature / exact - 1).abs() < 5 * (2 / 400) ** 0.5 * 1.5).all()
    assert float((found.curvature / exact).mean()) == pytest.approx(1, abs=0.06)


def test_the_loss_of_every_estimator_is_that_of_the_copies() -> None:
    bnn = bayesianize(mlp().double(), X.double()[:2])
    x, weight = X.double(), COUNTS.double()
    rows = torch.arange(40).repeat_interleave(COUNTS)
    whole = MinibatchLoss(bnn, Categorical(), x, Y, weight)
    copies = MinibatchLoss(bnn, Categorical(), x[rows], Y[rows])
    factor = 56 / 40  # the sum is divided by the number of rows
    generator = torch.Generator().manual_seed(1)
    at = bnn.trained_vector().double() + 0.1 * torch.randn(bnn.layout.size, generator=generator, dtype=torch.float64)
    (nll, gradient), (other, expected) = whole(at), copies(at)
    assert nll == pytest.approx(factor * other)
    torch.testing.assert_close(gradient, factor * expected)

    each = at + 0.1 * torch.randn(40, bnn.layout.size, generator=generator, dtype=torch.float64)
    (nll, gradient), (other, expected) = whole.per_example(each), copies.per_example(each[rows])
    assert nll == pytest.approx(factor * other)
    summed = torch.zeros_like(gradient).index_add_(0, rows, expected)
    torch.testing.assert_close(gradient, factor * summed)

    shift = torch.randn(40, 12, generator=generator, dtype=torch.float64, requires_grad=True)

    def through(loss: MinibatchLoss, leaf: Tensor) -> tuple[float, Tensor]:
        nll, gradients = loss.through_layer(
            lambda start, stop: lambda inputs: leaf[start:stop] + 0 * inputs.sum(), (leaf,)
        )
        return nll, gradients[0]

    (nll, gradient), (other, expected) = through(whole, shift), through(copies, shift[rows].detach().requires_grad_())
    assert nll == pytest.approx(factor * other)
    torch.testing.assert_close(gradient, factor * torch.zeros_like(gradient).index_add_(0, rows, expected))


@pytest.mark.parametrize("name", ["natural-gradient", "maximum-a-posteriori"])
def test_steps_with_a_weight_of_two_are_those_with_two_copies(name: str) -> None:
    rows = torch.arange(40).repeat_interleave(COUNTS)
    x, ends = X.double(), []
    # N is the number of rows, so the copies have a larger one, and Σ over the data is the same.
    for batch in (Batch(x, Y, COUNTS.double()), Batch(x[rows], Y[rows])):
        bnn = bayesianize(mlp().double(), x[:2], posterior="mean-field" if name == "natural-gradient" else "point")
        size = len(batch)
        curvature = torch.full((bnn.layout.size,), 2.0 / size, dtype=torch.float64)
        engine = build_engine(name, bnn.posterior, bnn.prior, size, 10, curvature, SharedSample(2, antithetic=True), {})
        engine.begin(0.5, 30)
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            engine.step(MinibatchLoss(bnn, Categorical(), batch.inputs, batch.target, batch.weight), generator)
        ends.append(torch.cat([bnn.posterior.mean_vector(), bnn.posterior.std_vector()]).detach())
        assert not torch.allclose(ends[-1][: bnn.layout.size], bnn.trained_vector(), atol=1e-3)
    # Adam's ε is all that is not the same.
    torch.testing.assert_close(*ends, rtol=1e-9 if name == "natural-gradient" else 1e-4, atol=1e-9)


def test_learned_noise_is_the_weighted_mean_square() -> None:
    x, y, weight, *_ = weighted_regression()
    # What counts more is noisier here, so that the weights are seen.
    y = y + weight * torch.randn(COUNT, generator=torch.Generator().manual_seed(1)).double()
    bnn = bayesianize(nn.Linear(3, 1).double(), x[:2], prior=PRIOR_STD)
    batches = [(x[rows], y[rows], weight[rows]) for rows in torch.arange(COUNT).split(30)]
    fit(bnn, batches, epochs=150, temperature=1.0, num_examples=COUNT)
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    residual = y - design @ bnn.posterior.mean_vector().detach()
    spread = design**2 @ bnn.posterior.std_vector().detach() ** 2
    expected = math.sqrt(float((weight * (residual.square() + spread)).sum() / weight.sum()))
    assert float(bnn.require_fitted().noise_std) == pytest.approx(expected, rel=0.02)  # type: ignore[arg-type]
    assert abs(math.sqrt(float((residual.square() + spread).mean())) / expected - 1) > 0.1


def test_an_estimate_of_the_noise_by_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.zeros(40, 2), torch.randn(40, 2, generator=generator)
    rows = torch.arange(40).repeat_interleave(COUNTS)
    found = Gaussian().estimate(outputs, targets, COUNTS.float())
    torch.testing.assert_close(found, Gaussian().estimate(outputs[rows], targets[rows]))
    one = Gaussian(noise_std=1.0, learned=True)
    torch.testing.assert_close(
        one.estimate(outputs, targets, COUNTS.float()), one.estimate(outputs[rows], targets[rows])
    )


def test_the_energy_of_hamiltonian_monte_carlo() -> None:
    x, y, weight, mean, covariance = weighted_regression()
    bnn = bayesianize(nn.Linear(3, 1).double(), x[:2], prior=PRIOR_STD)
    energy = hmc._Energy(bnn, Gaussian(noise_std=NOISE), x, y, COUNT, 1.0, weight)
    # The energy of a Gaussian posterior is quadratic about its mean, with Λ as its Hessian.
    at = (mean + torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(at), at)
    torch.testing.assert_close(gradient, torch.linalg.solve(covariance, (at - mean).detach()))
    noise = Gaussian()
    hmc._Energy(bnn, noise, x, y, COUNT, 1.0, weight)
    residual = y - nn.functional.linear(x, *(part.double() for part in bnn.trained.values()))[:, 0].detach()
    assert float(noise.noise_std) == pytest.approx(float((weight * residual**2).sum() / weight.sum()) ** 0.5)


def test_weights_reach_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weight, *_ = weighted_regression()
    bnn = bayesianize(nn.Linear(3, 1).double(), x[:2], prior=PRIOR_STD)
    parts = torch.arange(COUNT).split(20)
    batches = [{"input": x[rows], "labels": y[rows], "a": weight[rows]} for rows in parts]
    made: list[Any] = []

    class Spy(hmc._Energy):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(hmc, "_Energy", Spy)
    options: dict[str, Any] = {"samples": 8, "warmup": 4, "chains": 2, "progress": False}
    with pytest.warns(UserWarning, match="no reference yet"):
        sample_hmc(bnn, batches, likelihood=Gaussian(noise_std=NOISE), weight_key="a", **options)
    direct = hmc._Energy(bnn, Gaussian(noise_std=NOISE), x, y, COUNT, 1.0, weight)
    at = torch.ones(4, dtype=torch.float64)
    assert float(made[0](at)) == pytest.approx(float(direct(at)), rel=1e-9)


def test_early_stopping_compares_weighted_means(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[float] = []
    monkeypatch.setattr(HeldOut, "nll", lambda *_, **__: 0.0)
    monkeypatch.setattr(Run, "restore", lambda _, noted: scores.append(noted.get("score", -1.0)))
    bnn = bayesianize(mlp(), X[:2])
    options: dict[str, Any] = {"epochs": 1, "temperature": 0.5, "early_stop": "free-energy", "val_loader": [(X + 1, Y)]}
    with pytest.warns(UserWarning, match="no better"):
        run = fit(bnn, [(X, Y, torch.full((40,), 4.0))], **options)
    # Of a mean loss with weights that are 4 throughout, a quarter of the free energy is an example's.
    assert scores[0] == pytest.approx(0.5 * run.history[0].kl / 40 / 4)


def held_out(bnn: BayesianNetwork, batches: list[Any]) -> HeldOut:
    return HeldOut(bnn, batches, Categorical(), "labels", 8, 0)


def test_held_out_scores_are_those_of_the_copies() -> None:
    net = trained(mlp(), *classification(200, seed=1))
    bnn = bayesianize(net, X[:2], posterior=MeanField(0.3))
    rows = torch.arange(40).repeat_interleave(COUNTS)
    # The second batch has none, so they count 1 each.
    weighted = held_out(bnn, [(X[:38], Y[:38], COUNTS[:38].float()), (X[38:], Y[38:])])
    rows = torch.cat([rows[rows < 38], torch.tensor([38, 39])])
    copies = held_out(bnn, [(X[rows], Y[rows])])
    plain = held_out(bnn, [(X, Y)])
    assert weighted.nll() == pytest.approx(copies.nll(), rel=1e-6)
    assert abs(weighted.nll() - plain.nll()) > 1e-3
    (tau, score), (expected, reached) = weighted.tuned(), copies.tuned()
    assert tau == pytest.approx(expected, rel=1e-3)
    assert score == pytest.approx(reached, rel=1e-5)


def test_stacking_weights_are_those_of_the_copies() -> None:
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    rows = torch.arange(40).repeat_interleave(COUNTS)
    found, expected = stack(logs, COUNTS.double()), stack(logs[:, rows])
    torch.testing.assert_close(found.weights, expected.weights, atol=1e-3, rtol=0)
    assert found.nll == pytest.approx(expected.nll)
    choice = weigh_by_held_out(logs, 5.0, 1e-3, COUNTS.double())
    other = weigh_by_held_out(logs[:, rows], 5.0, 1e-3)
    torch.testing.assert_close(choice.weights, other.weights, atol=1e-3, rtol=0)


def test_the_training_objective_is_a_sum_over_rows() -> None:
    bnn = bayesianize(mlp(), X[:2], posterior=MeanField(0.2))
    rows = torch.arange(40).repeat_interleave(COUNTS)
    found = training_nll(bnn, [(X, Y, COUNTS.float())], Categorical(), "labels", 4, 0)
    copies = training_nll(bnn, [(X[rows], Y[rows])], Categorical(), "labels", 4, 0)
    assert found == pytest.approx(copies * 56 / 40, rel=1e-5)


def test_a_mixture_of_points_goes_to_the_weighted_maximum() -> None:
    x, y, weight, mean, _ = weighted_regression()
    bnn = bayesianize(
        nn.Linear(3, 1).double(),
        x[:2],
        prior=PRIOR_STD,
        posterior=Mixture(2, "point", retrain_epochs=25, retrain_learning_rate=0.5, weighting="equal", max_excess=1e6),
    )
    batches, likelihood = [(x, y, weight)] * 20, Gaussian(noise_std=NOISE)
    run = fit(bnn, batches, num_examples=COUNT, temperature=1.0, likelihood=likelihood, val_loader=None)
    retrained = bnn.posterior.components[1].mean_vector().detach()
    torch.testing.assert_close(retrained, mean, atol=0.02, rtol=0.02)
    # What it reached is F = (1/N) Σ a (−log p) at that point.
    outputs = x @ retrained[:3] + retrained[3]
    reached = -(weight * torch.distributions.Normal(outputs, NOISE).log_prob(y)).mean()
    assert run.components[1].nll == pytest.approx(float(reached), rel=1e-3)


def test_the_whole_way_with_mappings() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net = Net()
    trained(net.net, X, Y)
    weight = COUNTS.float()
    batches = [{"x": X, "y": Y, "importance": weight}]
    bnn = bayesianize(net, {"x": X[:2]})
    keys = {"target_key": "y", "weight_key": "importance"}
    options: dict[str, Any] = {"temperatures": (1.0, 0.1), "epochs": 2, "val_samples": 4, **keys}
    others, labels = classification(40, seed=2)
    held = [{"x": others, "y": labels, "importance": weight}]
    run = fit(bnn, batches, val_loader=held, predictive_temperature="held-out", early_stop="free-energy", **options)
    pred = predict(bnn, held, samples=4, **keys)
    score = float((weight.double() * -pred.log_density(labels)).sum() / weight.sum())
    again = HeldOut(bnn, held, bnn.require_fitted(), "y", 4, 0, "importance")
    assert math.isfinite(run.held_out_nll or math.nan)
    assert again.nll(bnn.predictive_temperature) == pytest.approx(score, rel=1e-6)
    torch.testing.assert_close(pred.probs, predict(bnn, {"x": others}, samples=4).probs)


def test_triples_predict_like_pairs_and_are_resumed_from_a_checkpoint(tmp_path: Any) -> None:
    triples = [(X[:20], Y[:20], COUNTS[:20].float()), (X[20:], Y[20:], COUNTS[20:].float())]
    options: dict[str, Any] = {"epochs": 2, "temperature": 0.5}
    first = bayesianize(mlp(), X[:2])
    fit(first, triples, checkpoint=tmp_path / "state", **options)
    again = bayesianize(mlp(), X[:2])
    fit(again, triples, checkpoint=tmp_path / "state", **options)
    torch.testing.assert_close(again.posterior.mean_vector(), first.posterior.mean_vector(), rtol=0, atol=0)
    plain = bayesianize(mlp(), X[:2])
    fit(plain, [(x, y) for x, y, _ in triples], **options)
    assert not torch.allclose(plain.posterior.mean_vector(), first.posterior.mean_vector())
    pairs = [(x, y) for x, y, _ in triples]
    torch.testing.assert_close(predict(first, triples).probs, predict(first, pairs).probs, rtol=0, atol=0)


def test_a_prior_is_suggested_by_weighted_scores() -> None:
    net = trained(mlp(), X, Y)
    held = classification(30, seed=5)
    weight = torch.linspace(0.0, 2.0, 30)
    options: dict[str, Any] = {
        "scales": (0.3, 0.6, 1.2),
        "epochs": 2,
        "val_samples": 4,
        "fit_options": {"temperature": 0.3},
    }
    copies = torch.arange(30).repeat_interleave((weight * 14.5).round().long())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = suggest_prior(net, X[:2], loader(X, Y), [(*held, weight)], **options)
        plain = suggest_prior(net, X[:2], loader(X, Y), [(held[0][copies], held[1][copies])], **options)
    for one, other in zip(found.trials, plain.trials, strict=True):
        assert one.held_out_nll == pytest.approx(other.held_out_nll, rel=1e-4)
        assert one.difference == pytest.approx(other.difference, abs=1e-4)
        # Thirty examples of unequal weight are worth fewer than thirty, however often they are copied.
        assert one.standard_error >= other.standard_error


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(40), "weight 0"),
        (torch.full((40,), -1.0), "40 of a batch"),
        (torch.full((40,), math.nan), "finite"),
        (torch.full((40,), math.inf), "finite"),
        (torch.ones(39), "one for each example"),
        (torch.ones(40, 1), "one for each example"),
        (torch.ones(40).long(), r"\(x1, x2\), target"),
    ],
)
def test_bad_weights_are_refused(weight: Tensor, message: str) -> None:
    bnn = bayesianize(mlp(), X[:2])
    with pytest.raises(InputError, match=message):
        fit(bnn, [(X, Y, weight)], epochs=1, temperature=1.0)
    with pytest.raises(InputError, match=message):
        fit(bnn, [(X, Y)], epochs=1, val_loader=[(X + 1, Y, weight)])
    with pytest.raises(InputError, match=message):
        sample_hmc(bnn, [(X, Y, weight)], samples=8, warmup=1, chains=2)


@pytest.mark.parametrize(
    "estimator", [LocalReparameterization(2), PerExample(2), SharedSample(2, antithetic=True)], ids=repr
)
def test_a_batch_of_weight_zero_moves_nothing_of_the_likelihood(estimator: Estimator) -> None:
    x, y, weight, *_ = weighted_regression()
    bnn = bayesianize(nn.Linear(3, 1).double(), x[:2], posterior=MeanField(0.1))
    nothing = (x[:10], y[:10] + 100, torch.zeros(10, dtype=torch.float64))
    fit(bnn, [nothing, (x, y, weight), nothing], epochs=2, temperature=1.0, estimator=copy.copy(estimator))
    assert float(bnn.require_fitted().noise_std) < 5  # type: ignore[arg-type]
