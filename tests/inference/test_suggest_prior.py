"""The search for the prior's scale: against closed-form answers of linear regression, and what it refuses and leaves alone."""

import json
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core_models import classification, loader, mlp, trained
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.suggest_prior import MULTIPLES, PriorSuggestion, suggest_prior
from stfbnn.likelihood import Gaussian
from stfbnn.posterior import Mixture
from stfbnn.prior import Normal

FEATURES, NOISE, TRUE_SCALE = 8, 1.5, 0.5
GRID = (0.05, 0.15, 0.5, 1.5, 5.0)


def regression(train: int, held_out: int = 3000) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """y = xᵀw + noise with w ~ N(0, TRUE_SCALE²), and the least-squares fit, which is far too sure where there are few x."""
    random = torch.Generator().manual_seed(4)
    weights = TRUE_SCALE * torch.randn(FEATURES, 1, generator=random)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, FEATURES, generator=random)
        return x, x @ weights + NOISE * torch.randn(count, 1, generator=random)

    first, second = draw(train), draw(held_out)
    net = nn.Linear(FEATURES, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.linalg.lstsq(*first).solution.T)
    return net, first, second


def exact_nlls(scale: float, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Of the Bayesian linear regression's predictive N(xᵀm, xᵀSx + noise²), example by example."""
    (x, y), (x_new, y_new) = (tuple(part.double() for part in pair) for pair in (first, second))
    covariance = torch.linalg.inv(x.T @ x / NOISE**2 + torch.eye(FEATURES) / scale**2)
    mean = x_new @ covariance @ x.T @ y / NOISE**2
    variance = ((x_new @ covariance) * x_new).sum(1, keepdim=True) + NOISE**2
    return nn.functional.gaussian_nll_loss(mean, y_new, variance, full=True, reduction="none").squeeze(1)


def search(train: int, **changes: Any) -> PriorSuggestion:
    net, first, second = regression(train)
    arguments: dict[str, Any] = {
        "scales": GRID,
        "posterior": "full",
        "epochs": 40,
        "val_samples": 256,
        "fit_options": {
            "likelihood": Gaussian(noise_std=NOISE),
            "temperature": 1.0,
            "engine_options": {"learning_rate": 0.5},
        },
    } | changes
    return suggest_prior(net, first[0][:2], loader(*first, batch_size=12), loader(*second, batch_size=500), **arguments)


def test_the_best_scale_is_that_of_the_exact_predictive() -> None:
    net, first, second = regression(24)
    exact = {scale: exact_nlls(scale, first, second) for scale in GRID}
    best = min(exact, key=lambda scale: float(exact[scale].mean()))
    assert best == TRUE_SCALE  # in the interior
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = search(24)
    assert found.best.scale == best
    assert found.prior == Normal(std=best)
    assert found.at_edge is None
    for trial in found.trials:
        assert trial.held_out_nll == pytest.approx(float(exact[trial.scale].mean()), abs=0.01)
        paired = exact[trial.scale] - exact[best]
        assert trial.difference == pytest.approx(float(paired.mean()), abs=0.01)
        assert trial.standard_error == pytest.approx(float(paired.std()) / math.sqrt(len(paired)), rel=0.1)
    # 3,000 held-out examples tell a scale ten times too small from the right one.
    assert not found.trials[0].within_noise
    own = bayesianize(net, first[0][:2], prior=found.prior)
    assert float(own.prior.std) == pytest.approx(TRUE_SCALE)


def test_the_same_seed_finds_the_same_and_another_does_not() -> None:
    found, again, other = (
        search(12, scales=(0.2, 0.5, 3.0), epochs=2, val_samples=16, seed=seed) for seed in (0, 0, 1)
    )
    scores, same, different = ([trial.held_out_nll for trial in one.trials] for one in (found, again, other))
    assert scores == pytest.approx(same, abs=1e-6)
    assert scores != pytest.approx(different, abs=1e-6)


def test_the_edge_of_the_grid_and_differences_within_noise_are_told() -> None:
    with pytest.warns(UserWarning, match="largest that was tried: try larger"):
        found = search(12, scales=(0.05, 0.1), epochs=20, val_samples=32)
    assert found.at_edge == "largest"
    assert found.best.scale == 0.1
    # 400 examples outweigh any prior that is wide enough, so neither of these is better.
    with pytest.warns(UserWarning, match="that was tried"):
        found = search(400, scales=(2.0, 2.5), epochs=4, val_samples=32)
    assert len(found.as_good) == 1
    assert any("cannot tell" in note for note in found.notes())


def test_the_default_grid_is_in_units_of_the_weights_and_each_scale_chooses_its_temperature() -> None:
    x, y = classification(120)
    x_val, y_val = classification(200, seed=1)
    net = trained(mlp(hidden=32), x, y, steps=300)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the best scale")
        found = suggest_prior(net, x[:2], loader(x, y), loader(x_val, y_val), epochs=2)
    weights = torch.cat([parameter.detach().flatten() for parameter in net[0].parameters()])
    assert found.rms == pytest.approx(float(weights.square().mean().sqrt()), rel=1e-5)
    assert [trial.scale / found.rms for trial in found.trials] == pytest.approx(MULTIPLES)
    assert found.prior.center == "zero"
    assert found.best.held_out_nll < found.network_held_out_nll
    assert len({trial.temperature for trial in found.trials}) > 1
    assert found.num_held_out == 200
    written = json.loads(json.dumps(found.as_dict()))
    assert written["prior"]["std"] == found.best.scale
    assert len(found.table().rows) == len(MULTIPLES)
    assert "network's own" in str(found.table().caption)


def test_nothing_of_the_users_changes() -> None:
    net, first, second = regression(40, held_out=50)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    own = torch.Generator().manual_seed(5)
    train = DataLoader(TensorDataset(*first), batch_size=10, shuffle=True, generator=own)
    states = own.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    options = {"temperature": 1.0, "likelihood": Gaussian(noise_std=NOISE)}
    with pytest.warns(UserWarning, match="that was tried"):
        suggest_prior(net, first[0][:2], train, loader(*second), scales=(0.01, 0.02), epochs=1, fit_options=options)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(own.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[3])


def test_embeddings_are_centred_on_their_trained_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(12, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.randint(0, 12, (90, 3), generator=torch.Generator().manual_seed(1)).unique(dim=0)
    labels = tokens.sum(dim=1) % 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the best scale")
        found = suggest_prior(
            net,
            tokens[:2],
            loader(tokens[:50], labels[:50]),
            loader(tokens[50:], labels[50:]),
            scales=(0.5, 1.0),
            epochs=1,
            fit_options={"temperature": 0.3},
        )
    assert found.prior.center == "pretrained"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (0.1,)}, "at least two"),
        ({"scales": (0.1, 0.1)}, "at least two"),
        ({"scales": (0.1, -1.0)}, r"scales\[1\] must be positive"),
        ({"scales": (0.1, "rms")}, r"scales\[1\] must be positive"),
        ({"scales": 0.1}, "standard deviations to compare"),
        ({"center": "mode"}, "center"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"posterior": "cauchy"}, "cauchy"),
        ({"fit_options": {"seed": 3}}, r"\['seed'\], which suggest_prior sets"),
        ({"fit_options": {"temprature": 1.0}}, r"\['temprature'\]"),
        ({"fit_options": {"engine": "guess"}}, "guess"),
    ],
)
def test_bad_arguments_are_refused_before_any_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(12, **changes)


def test_held_out_data_must_be_there_and_unseen() -> None:
    net, first, second = regression(40, held_out=50)
    train = loader(*first)
    with pytest.raises(InputError, match="NoneType"):
        suggest_prior(net, first[0][:2], train, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="several times"):
        suggest_prior(net, first[0][:2], train, iter(loader(*second)))
    with pytest.raises(InputError, match="not held out"):
        suggest_prior(net, first[0][:2], train, loader(*first))


def test_an_ensemble_of_points_has_no_free_energy_to_tell() -> None:
    x, y = classification(60)
    recipe = Mixture(components=2, family="point", weighting="equal", max_excess=50.0)
    options = {"temperature": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = suggest_prior(
            mlp(),
            x[:2],
            loader(x, y),
            loader(*classification(60, seed=1)),
            scales=(0.1, 1.0),
            posterior=recipe,
            epochs=1,
            fit_options=options,
        )
    assert [trial.free_energy for trial in found.trials] == [None, None]
    assert found.table().row_count == 2
