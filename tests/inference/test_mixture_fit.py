"""Fitting a mixture: its components, their weights, exact resume, and what it is the limit of."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.draws import deal
from stfbnn.errors import CheckpointError, InputError
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanField, Mixture, MixturePosterior
from stfbnn.prediction import predict
from stfbnn.randomness import generator

Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data, Data]:
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:600], y[:600]), (x[600:1200], y[600:1200]), (x[1200:], y[1200:])


@pytest.fixture(scope="module")
def digit_fit() -> tuple[nn.Module, BayesianNetwork, FitRun]:
    train, held, _ = digits()
    net = trained(mlp(64, 32, 10), *train)
    bnn = bayesianize(net, train[0][:2], posterior=Mixture(components=3))
    run = fit(bnn, loader(*train), epochs=4, temperatures=(0.1, 0.03), val_loader=loader(*held))
    return net, bnn, run


def test_the_mixture_is_never_worse_on_held_out_data_than_its_best_component(
    digit_fit: tuple[nn.Module, BayesianNetwork, FitRun],
) -> None:
    _, bnn, run = digit_fit
    _, held, test = digits()
    scores = [one.held_out_nll for one in run.components]
    assert None not in scores
    assert run.held_out_nll is not None
    assert run.held_out_nll <= min(scores) + 1e-9  # type: ignore[type-var, operator]
    assert run.network_held_out_nll is not None
    assert run.held_out_nll < run.network_held_out_nll
    # What is predicted afterwards is what was scored, but for fewer draws of each component.
    again = -float(predict(bnn, held[0], samples=96).log_density(held[1]).mean())
    assert again == pytest.approx(run.held_out_nll, abs=0.02)
    one = bayesianize(digit_fit[0], test[0][:2])
    fit(one, loader(*digits()[0]), epochs=4, temperature=run.temperature)
    alone = -float(predict(one, test[0], samples=96).log_density(test[1]).mean())
    assert -float(predict(bnn, test[0], samples=96).log_density(test[1]).mean()) < alone + 0.01


def test_the_records_say_what_became_of_each_component(
    digit_fit: tuple[nn.Module, BayesianNetwork, FitRun],
) -> None:
    _, bnn, run = digit_fit
    mixture = bnn.posterior
    assert isinstance(mixture, MixturePosterior)
    assert [one.number for one in run.components] == [0, 1, 2]
    assert [one.start for one in run.components] == ["trained", "reinitialize", "reinitialize"]
    kept = [one for one in run.components if one.kept]
    torch.testing.assert_close(mixture.weights, torch.tensor([one.weight for one in kept]))
    assert sum(one.weight for one in run.components) == pytest.approx(1)
    assert run.components[0].distance == 0
    assert run.components[0].disagreement == 0
    for one in run.components[1:]:
        # A disparate optimum: as far as the layer's own size, and another function.
        assert one.distance > 0.3
        assert one.disagreement is not None
        assert one.disagreement > 0.005
        # Only at the T that component 0 chose.
        assert {record.temperature for record in one.history} == {run.temperature}
        assert len(one.history) == 4
        assert 3 <= len(one.retraining) <= 20
        assert one.retraining[-1].nll < one.retraining[0].nll
        assert one.retraining_seconds > 0
    assert run.history == run.components[0].history
    assert run.seconds > sum(one.retraining_seconds + one.inference_seconds for one in run.components[1:])
    console = Console(width=80, file=io.StringIO())
    console.print(run.component_table())
    assert "reinitialize" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def small(family: object, **options: object) -> tuple[BayesianNetwork, Data, Data, nn.Module]:
    train, held = classification(240), classification(300, seed=1)
    net = trained(mlp(hidden=32), *train, steps=300)
    settings = {"components": 3, "retrain_epochs": 4, **options}
    bnn = bayesianize(net, train[0][:2], posterior=Mixture(family=family, **settings))  # type: ignore[arg-type]
    return bnn, train, held, net


def test_components_combine_in_proportion_to_their_weights() -> None:
    bnn, train, held, net = small("mean-field", min_weight=0.0)
    fit(bnn, loader(*train), epochs=3, temperature=0.1, val_loader=loader(*held))
    mixture = bnn.posterior
    assert isinstance(mixture, MixturePosterior)
    count, x = len(mixture), held[0]
    assert count > 1
    samples = 24
    prediction = predict(bnn, x, samples=samples, seed=5)
    assert prediction.samples == samples
    # Draw by draw, from what is documented: draw s has the noise of (seed, "draw", s) and a component dealt to it.
    dealt = deal(mixture, samples)
    assert dealt[:count] == list(range(count))
    probs, entropies = [], []
    with torch.no_grad():
        for index, number in enumerate(dealt):
            part = mixture.components[number]
            vector = part.draw(torch.randn(part.noise_size, generator=generator(5, "draw", index)))
            # Through the user's own model, not this library's call.
            twin = mlp(hidden=32)
            twin.load_state_dict(net.state_dict())
            twin[0].load_state_dict(bnn.layout.unflatten(vector))
            one = twin(x).double().softmax(1)
            probs.append(one)
            entropies.append(-(one * one.log()).sum(1))
    expected, aleatoric = 0.0, 0.0
    for number, weight in enumerate(mixture.weights.double().tolist()):
        own = [index for index, other in enumerate(dealt) if other == number]
        assert len(own) == pytest.approx(weight * samples, abs=1) or len(own) == 1
        expected = expected + weight * torch.stack([probs[index] for index in own]).mean(0)
        aleatoric = aleatoric + weight * torch.stack([entropies[index] for index in own]).mean(0)
    torch.testing.assert_close(prediction.probs, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(prediction.aleatoric, aleatoric, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.entropy, prediction.aleatoric + prediction.epistemic)
    # The first draws are the same whatever their number.
    assert deal(mixture, 100)[:samples] == dealt
    assert predict(bnn, x, samples=1).samples == count
    stacked = predict(bnn, x, samples=samples, seed=5, execution="stacked")
    torch.testing.assert_close(stacked.probs, prediction.probs, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="between disparate optima"):
        predict(bnn, x, weights="mean")
    # A single call takes one component at random, in the shares of the weights.
    assert bnn(x).shape == (300, 3)


def test_component_0_is_the_posterior_that_a_fit_without_a_mixture_finds() -> None:
    bnn, train, held, net = small("mean-field", components=2)
    fit(bnn, loader(*train), epochs=2, temperature=0.1, val_loader=loader(*held), seed=4)
    alone = bayesianize(net, train[0][:2])
    fit(alone, loader(*train), epochs=2, temperature=0.1, val_loader=loader(*held), seed=4)
    first = bnn.posterior.components[0]
    assert torch.equal(first.loc, alone.posterior.loc)
    assert torch.equal(first.log_std, alone.posterior.log_std)


def test_a_component_that_never_becomes_good_is_dropped_and_the_rest_is_saved(tmp_path: Path) -> None:
    bnn, train, held, net = small(
        "mean-field",
        start="perturb",
        perturbation=30.0,
        retrain_epochs=1,
        retrain_learning_rate=1e-6,
        inference_epochs=1,
    )
    options = {"engine_options": {"learning_rate": 1e-6}, "temperature": 0.01}
    run = fit(bnn, loader(*train), epochs=1, val_loader=loader(*held), **options)  # type: ignore[arg-type]
    assert [one.kept for one in run.components] == [True, False, False]
    for one in run.components[1:]:
        assert "never became good" in one.reason
        assert one.weight == 0
    assert len(bnn.posterior) == 1  # type: ignore[arg-type]
    assert "never became good" in str(run.component_table().caption)
    save(bnn, tmp_path / "kept")
    again = load(tmp_path / "kept", net)
    assert len(again.posterior) == 1  # type: ignore[arg-type]
    x = held[0]
    assert torch.equal(predict(again, x).log_probs, predict(bnn, x).log_probs)
    # A further fit has all its components again, and one that fails leaves what there was.
    with pytest.raises(InputError, match="learning rate"):
        fit(bnn, loader(*train), epochs=3, temperature=1.0, engine_options={"learning_rate": 1e30})
    assert len(bnn.posterior) == 1  # type: ignore[arg-type]
    assert torch.equal(predict(again, x).log_probs, predict(bnn, x).log_probs)
    second = fit(bnn, loader(*train), epochs=1, val_loader=loader(*held), **options)  # type: ignore[arg-type]
    assert len(second.components) == 3
    assert second.held_out_nll == run.held_out_nll


@pytest.mark.parametrize("family", ["low-rank", "filterwise", "point"])
def test_every_family_goes_through_fit_predict_save_and_load(family: str, tmp_path: Path) -> None:
    x, y = torch.randn(96, 1, 8, 8), torch.randint(0, 3, (96,))
    net = conv_net()
    bnn = bayesianize(net, x[:2], posterior=Mixture(components=2, family=family, retrain_epochs=2, weighting="equal"))
    temperature = None if family == "point" else 1.0
    run = fit(bnn, loader(x, y), epochs=1, temperature=temperature)
    assert [one.weight for one in run.components] == [0.5, 0.5]
    prediction = predict(bnn, x, samples=8)
    assert prediction.samples == (2 if family == "point" else 8)
    save(bnn, tmp_path / "mixture")
    again = load(tmp_path / "mixture", net)
    assert torch.equal(predict(again, x, samples=8).log_probs, prediction.log_probs)
    assert again.posterior.family == "mixture"


def test_an_ensemble_of_points_is_the_limit_of_narrow_gaussians() -> None:
    bnn, train, held, _ = small("point", min_weight=0.0)
    run = fit(bnn, loader(*train), val_loader=loader(*held))
    ensemble = bnn.posterior
    assert isinstance(ensemble, MixturePosterior)
    # Component 0 is the trained layer as it is.
    assert torch.equal(ensemble.components[0].loc, bnn.trained_vector())
    assert run.components[0].history == ()
    assert run.held_out_nll <= min(one.held_out_nll for one in run.components)  # type: ignore[type-var, operator]
    prediction = predict(bnn, held[0])
    assert prediction.samples == len(ensemble)
    gaps = []
    for std in (1e-1, 1e-3, 1e-5):
        parts = [MeanField(std).build(bnn.layout, part.loc.detach(), bnn.prior) for part in ensemble.components]
        bnn.posterior = MixturePosterior(bnn.layout, parts, ensemble.weights)
        gaps.append(float((predict(bnn, held[0], samples=64).probs - prediction.probs).abs().max()))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]
    assert gaps[2] < 1e-4


def test_the_predictive_temperature_is_that_of_the_mixture() -> None:
    bnn, train, held, _ = small("mean-field")
    run = fit(
        bnn,
        loader(*train),
        epochs=2,
        temperature=0.01,
        val_loader=loader(*held),
        predictive_temperature="held-out",
    )
    assert run.predictive_temperature == bnn.predictive_temperature != 1

    def nll(tau: float) -> float:
        return -float(predict(bnn, held[0], samples=128, predictive_temperature=tau).log_density(held[1]).mean())

    tau = run.predictive_temperature
    assert nll(tau) < min(nll(1.4 * tau), nll(tau / 1.4))


def test_without_held_out_data_the_weights_are_equal_and_a_warning_says_so() -> None:
    bnn, train, _, _ = small("mean-field", components=2)
    with pytest.warns(UserWarning, match="nothing is held out to weigh"):
        run = fit(bnn, loader(*train), epochs=2, temperature=0.1)
    assert run.held_out_nll is None
    assert [one.held_out_nll for one in run.components] == [None, None]
    kept = [one.weight for one in run.components if one.kept]
    assert kept == pytest.approx([1 / len(kept)] * len(kept))


def test_few_held_out_examples_are_a_warning() -> None:
    bnn, train, held, _ = small("mean-field")
    with pytest.warns(UserWarning, match="30 held-out examples are few"):
        fit(bnn, loader(*train), epochs=1, temperature=0.1, val_loader=loader(held[0][:30], held[1][:30]))


def test_weights_by_free_energy() -> None:
    bnn, train, _, _ = small("mean-field", weighting="free-energy", min_weight=0.0)
    run = fit(bnn, loader(*train), epochs=3, temperature=1.0)
    weights = [one.weight for one in run.components]
    assert sum(weights) == pytest.approx(1)
    # The ratios are those of free energies; the epochs' own, noisier, agree on the order of clear cases.
    best = min(run.components, key=lambda one: one.history[-1].free_energy)
    assert max(weights) == best.weight


def test_regression_shares_the_noise_and_weights_the_variances() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = (x @ torch.randn(6, 1)).tanh() + 0.3 * torch.randn(200, 1)
    held = (x[150:], y[150:])
    net = trained(mlp(hidden=24, outputs=1), x[:150], y[:150], steps=200)
    bnn = bayesianize(net, x[:2], posterior=Mixture(components=2, retrain_epochs=3, min_weight=0.0))
    with pytest.warns(UserWarning, match="few"):
        run = fit(bnn, loader(x[:150], y[:150]), epochs=3, temperature=0.1, val_loader=loader(*held))
    alone = bayesianize(net, x[:2])
    fit(alone, loader(x[:150], y[:150]), epochs=3, temperature=0.1, val_loader=loader(*held))
    # The noise is what component 0 made of it, and the others keep to it.
    assert torch.equal(bnn.likelihood.noise_std, alone.likelihood.noise_std)
    prediction = predict(bnn, x, samples=16)
    torch.testing.assert_close(prediction.std.square(), prediction.aleatoric + prediction.epistemic)
    assert all(one.disagreement is not None for one in run.components)


def test_a_learned_prior_is_settled_by_component_0() -> None:
    train, net = classification(120), trained(mlp(), *classification(120), steps=100)
    options = {"epochs": 2, "temperature": 0.1}
    bnn = bayesianize(net, train[0][:2], posterior=Mixture(components=2, weighting="equal"), prior="empirical-bayes")
    fit(bnn, loader(*train), **options)  # type: ignore[arg-type]
    alone = bayesianize(net, train[0][:2], prior="empirical-bayes")
    fit(alone, loader(*train), **options)  # type: ignore[arg-type]
    assert torch.equal(bnn.prior.std, alone.prior.std)


class Killed:
    """A loader with a generator of its own that is interrupted at one of its batches."""

    def __init__(self, data: Data, at: int | None) -> None:
        self.inner = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*data),
            batch_size=40,
            shuffle=True,
            generator=torch.Generator().manual_seed(8),
        )
        self.generator, self.dataset = self.inner.generator, self.inner.dataset
        self.at, self.given = at, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.inner:
            if self.given == self.at:
                raise KeyboardInterrupt
            self.given += 1
            yield batch


def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_result(tmp_path: Path) -> None:
    bnn, train, held, net = small("mean-field", retrain_epochs=3)
    options = {"epochs": 2, "temperatures": (0.3, 0.1), "val_loader": loader(*held), "early_stop": "nll"}

    def attempt(at: int | None, checkpoint: Path) -> tuple[BayesianNetwork, FitRun, int]:
        own = bayesianize(net, train[0][:2], posterior=bnn.family)
        feed = Killed(train, at)
        return own, fit(own, feed, checkpoint=checkpoint, **options), feed.given  # type: ignore[arg-type]

    whole, run, batches = attempt(None, tmp_path / "whole")
    # In the survey, an epoch of component 0, the retraining, survey and inference of the others, and near the end.
    for number, at in enumerate([3, 20, *range(30, batches, 17), batches - 1]):
        path = tmp_path / f"killed-{number}"
        with pytest.raises(KeyboardInterrupt):
            attempt(at, path)
        again, resumed, given = attempt(None, path)
        for name, value in whole.posterior.state_dict().items():
            assert torch.equal(value, again.posterior.state_dict()[name]), (at, name)
        assert resumed.held_out_nll == run.held_out_nll
        assert [one.reason for one in resumed.components] == [one.reason for one in run.components]
        # At most the epoch in which it was killed is done again, with the look at the data before it if it was the first;
        # the first look is one batch more.
        assert given <= batches - at + 6 + 6 + 2
    # All of it is there: nothing is read but the first look.
    _, _, given = attempt(None, tmp_path / "whole")
    assert given == 1


def test_a_checkpoint_that_is_begun_anew_takes_nothing_over(tmp_path: Path) -> None:
    bnn, train, held, _ = small("point", components=2, retrain_epochs=2)
    path = tmp_path / "run"
    fit(bnn, Killed(train, None), val_loader=loader(*held), checkpoint=path)
    assert {entry.name for entry in tmp_path.iterdir()} >= {"run", "run.retraining-1"}
    other = tmp_path / "moved"
    shutil.move(path, other)
    feed = Killed(train, None)
    fit(bnn, feed, val_loader=loader(*held), checkpoint=path)
    # The first look, the survey, component 0's score, and two epochs of retraining.
    assert feed.given == 1 + 4 * 6
    shutil.copy(path.with_name("run.retraining-1"), path)
    with pytest.raises(CheckpointError, match="component"):
        fit(bnn, Killed(train, None), val_loader=loader(*held), checkpoint=path)


def test_a_run_that_is_interrupted_leaves_the_network_as_it_was() -> None:
    bnn, train, held, _ = small("mean-field")
    fit(bnn, loader(*train), epochs=1, temperature=0.1, val_loader=loader(*held))
    posterior, before = bnn.posterior, {k: v.clone() for k, v in bnn.posterior.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        fit(bnn, Killed(train, 40), epochs=1, temperature=0.1, val_loader=loader(*held))
    assert bnn.posterior is posterior
    for name, value in bnn.posterior.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert bnn.fitted
