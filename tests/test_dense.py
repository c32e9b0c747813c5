"""Dense predictions, with positions left out, from inference to prediction, figures and a saved posterior."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.evaluation import classification_metrics, per_position
from stfbnn.evaluation.evaluate import SCALED, contenders, evaluate, side_by_side
from stfbnn.inference import hmc
from stfbnn.inference.components.scoring import disagreement
from stfbnn.inference.diagnostics import diagnose
from stfbnn.inference.fit import fit
from stfbnn.inference.held_out import HeldOut
from stfbnn.inference.hmc import sample_hmc
from stfbnn.inference.suggest_prior import suggest_prior
from stfbnn.inference.survey import survey
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanField, Mixture
from stfbnn.prediction import predict
from stfbnn.predictive import CategoricalPrediction, Prediction
from stfbnn.progress import progress_bar

VOID = 255
RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.randn(40, 1, 5, 4, generator=RANDOM)
SMOOTH = F.avg_pool2d(IMAGES, 3, 1, 1)[:, 0] + 0.2 * torch.randn(40, 5, 4, generator=RANDOM)
PIXELS = (SMOOTH > -0.2).long() + (SMOOTH > 0.2)
PIXELS[torch.rand(PIXELS.shape, generator=RANDOM) < 0.3] = VOID
PIXELS[7] = VOID
TOKENS = torch.randint(0, 12, (40, 6), generator=RANDOM)
TAGS = (TOKENS + torch.randint(0, 2, TOKENS.shape, generator=RANDOM)) % 3
TAGS[:, -1] = -100


def segmentation() -> nn.Sequential:
    """(B, 1, 5, 4) to (B, 3, 5, 4)."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))


def tagger() -> nn.Sequential:
    """(B, T) to (B, T, 3), as heads for tokens give them."""
    return nn.Sequential(nn.Embedding(12, 5), nn.Tanh(), nn.Linear(5, 3))


KINDS: dict[str, tuple[Any, Tensor, Tensor, Categorical]] = {
    "pixels": (segmentation, IMAGES, PIXELS, Categorical(ignore_index=VOID)),
    "tokens": (tagger, TOKENS, TAGS, Categorical(ignore_index=-100, class_dim=-1)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def trained(kind: str) -> nn.Sequential:
    build, x, y, likelihood = KINDS[kind]
    torch.manual_seed(0)
    net: nn.Sequential = build()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (-likelihood.log_prob(net(x[:30]), y[:30]).mean()).backward()
        optimizer.step()
    return net.eval()


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(15), y.split(15), strict=True))


def fitted(kind: str, **options: Any) -> tuple[nn.Sequential, BayesianNetwork]:
    _, x, y, likelihood = KINDS[kind]
    net = trained(kind)
    bnn = bayesianize(net, x[:2])
    fit(bnn, batches(x[:30], y[:30]), **{"likelihood": likelihood, "epochs": 2, "temperature": 0.5, **options})
    return net, bnn


@kinds
@pytest.mark.parametrize("engine", ["natural-gradient", "bayes-by-backprop", "laplace"])
def test_from_inference_to_a_saved_posterior(kind: str, engine: str, tmp_path: Path) -> None:
    _, x, y, likelihood = KINDS[kind]
    net, bnn = fitted(kind, engine=engine)
    pred = predict(bnn, [(x[30:], y[30:])], samples=8)
    assert isinstance(pred, CategoricalPrediction)
    # The classes are at dimension 1, wherever the network has them.
    assert pred.probs.shape == (10, 3, *y.shape[1:])
    assert pred.labels.shape == pred.entropy.shape == pred.epistemic.shape == y[30:].shape
    torch.testing.assert_close(pred.probs.sum(1), torch.ones_like(pred.entropy))
    density = pred.log_density(y[30:])
    own = likelihood.log_prob(net(x[30:]), y[30:]).detach()
    assert float(density.mean()) > float(own.mean()) - 0.5
    assert float(density.mean()) > float(pred.log_density(y[30:].roll(1, 0)).mean()) + 1
    path = save(bnn, tmp_path / "posterior")
    again = load(path, net)
    assert again.require_fitted().config() == likelihood.config()
    assert torch.equal(predict(again, x[30:], samples=8).log_density(y[30:]), density)


@kinds
def test_what_marks_the_positions_left_out_is_of_no_matter(kind: str) -> None:
    _, x, y, likelihood = KINDS[kind]
    marked = y.masked_fill(y == likelihood.ignore_index, -7)
    other = Categorical(ignore_index=-7, class_dim=likelihood.class_dim)  # type: ignore[arg-type]
    net, bnn = fitted(kind)
    again = bayesianize(net, x[:2])
    fit(again, batches(x[:30], marked[:30]), likelihood=other, epochs=2, temperature=0.5)
    assert torch.equal(again.posterior.mean_vector(), bnn.posterior.mean_vector())
    assert torch.equal(again.posterior.std_vector(), bnn.posterior.std_vector())
    first, second = predict(bnn, x, samples=4), predict(again, x, samples=4)
    assert torch.equal(first.log_density(y), second.log_density(marked))
    assert evaluate(first, y) == evaluate(second, marked)


def test_one_position_that_counts_is_a_plain_classifier() -> None:
    net = trained("pixels")
    y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
    grid = torch.full((40, 5, 4), VOID)
    grid[:, 2, 3] = y
    # A width of its own, so that no curvature is drawn: its draws come in another order.
    options: dict[str, Any] = {"epochs": 3, "engine": "bayes-by-backprop", "val_samples": 6}
    options |= {"temperatures": (1.0, 0.1), "predictive_temperature": "held-out"}
    dense = bayesianize(net, IMAGES[:2], posterior=MeanField(0.1))
    plain = bayesianize(net, IMAGES[:2], posterior=MeanField(0.1), output=lambda out: out[:, :, 2, 3])
    held = slice(30, 40)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="on the held-out data")
        one = fit(
            dense,
            batches(IMAGES[:30], grid[:30]),
            likelihood=Categorical(ignore_index=VOID),
            val_loader=[(IMAGES[held], grid[held])],
            **options,
        )
        two = fit(plain, batches(IMAGES[:30], y[:30]), val_loader=[(IMAGES[held], y[held])], **options)
    torch.testing.assert_close(dense.posterior.mean_vector(), plain.posterior.mean_vector())
    torch.testing.assert_close(dense.posterior.std_vector(), plain.posterior.std_vector())
    assert one.temperature == two.temperature
    assert one.predictive_temperature == pytest.approx(two.predictive_temperature, rel=1e-3)
    assert one.held_out_nll == pytest.approx(two.held_out_nll, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_curvature_counts_only_what_was_observed(weighted: bool) -> None:
    torch.manual_seed(0)
    x, y = IMAGES[:6].double(), PIXELS[:6].clone()
    y[0] = VOID
    bnn = bayesianize(segmentation().double(), x[:2])
    classes = [0.5, 1.0, 3.0]
    likelihood = Categorical(ignore_index=VOID, class_weights=classes if weighted else None)
    rows = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 3.0], dtype=torch.float64)
    batch = (x, y, rows) if weighted else (x, y)
    with progress_bar("", None, show=False) as bar:
        found = survey(bnn, [batch] * 400, likelihood, "labels", 0, True, False, bar).curvature
    at = bnn.posterior.mean_vector().detach()
    jacobian = torch.func.jacrev(lambda w: bnn.outputs(w, x))(at)
    p = bnn.outputs(at, x).softmax(1).movedim(1, -1)
    hessian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    weights = (y != VOID).double()
    if weighted:
        labels = torch.where(y == VOID, 0, y)
        weights = weights * torch.tensor(classes, dtype=torch.float64)[labels] * rows[:, None, None]
    exact = torch.einsum("nhw,nihwd,nhwij,njhwd->d", weights, jacobian, hessian, jacobian) / 6
    assert found is not None
    assert ((found / exact - 1).abs() < 5 * (2 / 400) ** 0.5 * 1.5).all()
    assert float((found / exact).mean()) == pytest.approx(1, abs=0.06)


def test_the_energy_of_hamiltonian_monte_carlo() -> None:
    x, y = IMAGES[:8].double(), PIXELS[:8]
    net = segmentation().double()
    classes, rows = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), torch.rand(8, generator=RANDOM).double()
    bnn = bayesianize(net, x[:2], prior=0.7)
    likelihood = Categorical(ignore_index=VOID, class_weights=classes.tolist())
    energy = hmc._Energy(bnn, likelihood, x, y, 8, 0.5, rows)
    values, expected = [], []
    for seed in (1, 2):
        w = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
        parts = {"0.weight": w[:36].reshape(4, 1, 3, 3), "0.bias": w[36:]}
        outputs = torch.func.functional_call(net, parts, (x,))
        losses = F.cross_entropy(outputs, y, weight=classes, ignore_index=VOID, reduction="none").sum((1, 2))
        exact = (rows * losses).sum() / 0.5 + w.square().sum() / (2 * 0.7**2)
        values.append(energy(w))
        expected.append(exact)
        torch.testing.assert_close(torch.autograd.grad(values[-1], w)[0], torch.autograd.grad(exact, w)[0])
    torch.testing.assert_close(values[1] - values[0], expected[1] - expected[0])


def test_samples_of_a_dense_posterior(tmp_path: Path) -> None:
    net = trained("tokens")[1:]  # from the embedded tokens on
    inputs = trained("tokens")[0](TOKENS).detach()
    bnn = bayesianize(net, inputs[:2])
    with pytest.warns(UserWarning, match="no reference yet"):
        sample_hmc(bnn, [(inputs, TAGS)], samples=8, warmup=8, chains=2, likelihood=KINDS["tokens"][3], progress=False)
    pred = predict(bnn, inputs, samples=16)
    assert pred.probs.shape == (40, 3, 6)
    again = load(save(bnn, tmp_path / "posterior"), net)
    torch.testing.assert_close(predict(again, inputs, samples=16).log_density(TAGS), pred.log_density(TAGS))


def test_predictions_where_the_classes_come_last_are_those_where_they_do_not() -> None:
    net = trained("pixels")
    bnn = bayesianize(net, IMAGES[:2], posterior=MeanField(0.2))
    last = bayesianize(net, IMAGES[:2], posterior=MeanField(0.2), output=lambda out: out.movedim(1, -1))
    for one, likelihood in ((bnn, Categorical()), (last, Categorical(class_dim=-1))):
        one.likelihood = likelihood
        one.temperature = 1.0
    first, second = predict(bnn, IMAGES, samples=4), predict(last, IMAGES, samples=4)
    torch.testing.assert_close(first.probs, second.probs)
    torch.testing.assert_close(first.aleatoric, second.aleatoric)
    # Weights of classes are the objective's alone.
    bnn.likelihood = Categorical(class_weights=[1.0, 5.0, 0.1])
    assert torch.equal(predict(bnn, IMAGES, samples=4).probs, first.probs)
    labels = PIXELS.clamp_max(2)
    assert torch.equal(predict(bnn, IMAGES, samples=4).log_density(labels), first.log_density(labels))


def test_held_out_scores_leave_positions_out() -> None:
    bnn = bayesianize(trained("pixels"), IMAGES[:2], posterior=MeanField(0.3))
    likelihood = KINDS["pixels"][3]
    held = HeldOut(bnn, batches(IMAGES[:30], PIXELS[:30]), likelihood, "labels", 6, 0)
    pred = held.predict()
    counted = PIXELS[:30] != VOID
    each = pred.log_probs.movedim(1, -1)[counted].gather(1, PIXELS[:30][counted][:, None])
    assert held.nll() == pytest.approx(-float(each.sum()) / 30, rel=1e-6)
    assert float(held.log_density(pred)[7]) == 0
    tau, score = held.tuned()
    scores = {}
    for factor in (0.97, 1.0, 1.03):
        scaled = held.predict(tau * factor).log_probs.movedim(1, -1)[counted]
        scores[factor] = -float(scaled.gather(1, PIXELS[:30][counted][:, None]).mean())
    assert scores[1.0] < min(scores[0.97], scores[1.03])
    assert score == pytest.approx(held.nll(tau))
    other = disagreement(pred, held.predict(weights="mean"), held.counted)
    differ = (pred.labels != held.predict(weights="mean").labels)[counted]  # type: ignore[attr-defined]
    assert other == pytest.approx(float(differ.double().mean()))
    with pytest.raises(InputError, match="all targets of val_loader"):
        HeldOut(bnn, [(IMAGES[7:8], PIXELS[7:8])], likelihood, "labels", 6, 0)
    with pytest.raises(InputError, match="all targets of train_loader"):
        fit(bnn, [(IMAGES[7:8], PIXELS[7:8])] * 2, likelihood=likelihood, epochs=1, temperature=1.0)


def test_a_mixture_is_weighted_and_diagnosed() -> None:
    net = trained("pixels")
    bnn = bayesianize(net, IMAGES[:2], posterior=Mixture(2, retrain_epochs=2))
    held = [(IMAGES[30:], PIXELS[30:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(
            bnn,
            batches(IMAGES[:30], PIXELS[:30]),
            likelihood=KINDS["pixels"][3],
            val_loader=held,
            epochs=2,
            temperatures=(0.3,),
            val_samples=4,
        )
    assert sum(one.weight for one in run.components) == pytest.approx(1)
    assert all(one.held_out_nll is not None and math.isfinite(one.held_out_nll) for one in run.components)
    diagnose(bnn, run)
    assert predict(bnn, IMAGES, samples=4).log_density(PIXELS).shape == (40,)


def test_a_prior_is_suggested() -> None:
    options: dict[str, Any] = {"likelihood": KINDS["pixels"][3], "temperature": 0.3}
    held = [(IMAGES[30:], PIXELS[30:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = batches(IMAGES[:30], PIXELS[:30])
        found = suggest_prior(
            trained("pixels"), IMAGES[:2], data, held, scales=(0.3, 1.0), epochs=1, val_samples=4, fit_options=options
        )
    assert all(math.isfinite(trial.held_out_nll) for trial in found.trials)


@kinds
def test_figures_are_those_of_the_positions_that_count(kind: str) -> None:
    _, x, y, likelihood = KINDS[kind]
    net, bnn = fitted(kind, epochs=1)
    test = [(x[30:], y[30:])]
    side = side_by_side(contenders(net, bnn, [(x[:30], y[:30])], samples=4, progress=False), test)
    assert SCALED in side.metrics
    for name, pred in side.predictions.items():
        rows: list[tuple[Tensor, int]] = []
        for index, target in enumerate(y[30:]):
            for place in torch.cartesian_prod(*[torch.arange(size) for size in target.shape]).reshape(
                target.numel(), -1
            ):
                at = tuple(place.tolist())
                if int(target[at]) != likelihood.ignore_index:
                    rows.append((pred.log_probs[(index, slice(None), *at)], int(target[at])))
        logs, labels = torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])
        assert side.metrics[name] == classification_metrics(logs.exp(), logs, labels)


def test_positions_are_rows() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    targets = torch.tensor([[0, 1, -100, 2], [-100, -100, 1, 0]])
    found, labels = per_position(values, targets, -100)
    assert labels.tolist() == [0, 1, 2, 1, 0]
    assert found[:, 0].tolist() == [0.0, 1.0, 3.0, 14.0, 15.0]
    assert per_position(values, targets)[0].shape == (8, 3)
    plain, same = per_position(torch.eye(3), torch.arange(3))
    assert torch.equal(plain, torch.eye(3))
    assert same.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"must have the shape \(2, 4\)"):
        per_position(values, targets.T)
    with pytest.raises(InputError, match="nothing to evaluate"):
        per_position(values, torch.full((2, 4), -100), -100)


def test_targets_of_another_shape_are_refused_by_the_density() -> None:
    _, bnn = fitted("pixels", epochs=1)
    pred = predict(bnn, IMAGES, samples=2)
    for bad in (PIXELS[:5], PIXELS[:, :2], PIXELS.mT):
        with pytest.raises(InputError, match="shape"):
            pred.log_density(bad)
    joined = Prediction.concatenate([predict(bnn, part, samples=2) for part in IMAGES.split(20)])
    torch.testing.assert_close(joined.log_density(PIXELS), pred.log_density(PIXELS))


def test_sequences_padded_batch_by_batch() -> None:
    net, likelihood = trained("tokens"), KINDS["tokens"][3]
    data = [(TOKENS[:20], TAGS[:20]), (TOKENS[20:, :4], TAGS[20:, :4])]
    bnn = bayesianize(net, TOKENS[:2])
    fit(bnn, data, likelihood=likelihood, epochs=2, temperature=0.5)
    assert predict(bnn, TOKENS[20:, :4], samples=2).probs.shape == (20, 3, 4)
    with pytest.raises(InputError, match="pad all examples to one length"):
        predict(bnn, data, samples=2)
    with pytest.raises(InputError, match="pad all examples to one length"):
        fit(bnn, data, likelihood=likelihood, epochs=1, val_loader=data)


def test_automatic_likelihood_says_what_to_say() -> None:
    with pytest.raises(InputError, match=r"class_dim=-1"):
        fit(bayesianize(tagger(), TOKENS[:2]), [(TOKENS, TAGS)], epochs=1, temperature=1.0)
    with pytest.raises(InputError, match=r"ignore_index=…"):
        fit(bayesianize(segmentation(), IMAGES[:2]), [(IMAGES, PIXELS)], epochs=1, temperature=1.0)
