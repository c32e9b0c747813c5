"""SWAG against the closed form of its covariance, numpy over the recorded iterates, and batch norm by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn import Bernoulli, Categorical, Gaussian
from stfbnn.baselines import SWAG, Predictor, Reading, SWAGPosterior, fit_swag, residual_noise
from stfbnn.baselines.swag import Moments
from stfbnn.errors import InputError


def images(count: int = 64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    return torch.randn(count, 1, 8, 8, generator=random), torch.randint(0, 3, (count,), generator=random)


def iterates_of(net: nn.Module, batches: Any, epochs: int, lr: float, momentum: float, decay: float) -> np.ndarray:
    """The weights after every step of SGD with momentum, in plain arithmetic."""
    parameters = list(net.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    recorded = []
    for _ in range(epochs):
        for x, y in batches:
            gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), parameters)
            with torch.no_grad():
                for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                    velocity.mul_(momentum).add_(gradient + decay * parameter)
                    parameter.sub_(lr * velocity)
            recorded.append(torch.cat([parameter.detach().flatten() for parameter in parameters]).double().numpy())
    return np.array(recorded)


@pytest.mark.parametrize(("every", "rank"), [(None, 3), (2, 20)])
def test_the_moments_are_those_of_the_iterates_in_numpy(every: int | None, rank: int) -> None:
    x, y = classification(60)
    batches = [(x[:20], y[:20]), (x[20:40], y[20:40]), (x[40:], y[40:])]
    swag = fit_swag(
        mlp(), batches, Categorical(), epochs=6, lr=0.3, momentum=0.8, weight_decay=0.01, rank=rank, collect_every=every
    )
    iterates = iterates_of(mlp(), batches, 6, 0.3, 0.8, 0.01)[(every or 3) - 1 :: every or 3]
    found = swag.posterior
    assert found.iterates == len(iterates) == (6 if every is None else 9)
    np.testing.assert_allclose(found.mean, iterates.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.variance, (iterates**2).mean(0) - iterates.mean(0) ** 2, atol=1e-6)
    means = np.cumsum(iterates, axis=0) / np.arange(1, len(iterates) + 1)[:, None]
    np.testing.assert_allclose(found.deviations, (iterates - means)[-rank:], atol=1e-6)
    assert found.variance.max() > 1e-3


def test_the_covariance_of_the_draws_is_the_closed_form() -> None:
    random = torch.Generator().manual_seed(2)
    mean, variance = torch.randn(4, generator=random), torch.rand(4, generator=random)
    deviations = torch.randn(3, 4, generator=random)
    posterior = SWAGPosterior(mean, variance, deviations, 3)
    draws = torch.stack([posterior.draw(random) for _ in range(100_000)]).double().numpy()
    columns = deviations.double().numpy().T
    expected = 0.5 * np.diag(variance.double().numpy()) + columns @ columns.T / (2 * (3 - 1))
    # The standard error of an entry of a covariance is √((c_ii c_jj + c_ij²) / n).
    diagonal = np.diag(expected)
    error = np.sqrt((np.outer(diagonal, diagonal) + expected**2) / len(draws))
    assert (np.abs(np.cov(draws.T) - expected) < 4.5 * error).all()
    assert (np.abs(draws.mean(0) - mean.double().numpy()) < 4.5 * np.sqrt(diagonal / len(draws))).all()


def test_moments_keep_their_digits_where_the_iterates_hardly_differ() -> None:
    random = np.random.default_rng(0)
    iterates = (1000 + 1e-3 * random.normal(size=(50, 6))).astype(np.float64)
    moments = Moments(2)
    for iterate in iterates:
        moments.add(torch.as_tensor(iterate))
    found = moments.posterior(torch.device("cpu"), torch.float64)
    np.testing.assert_allclose(found.variance, iterates.var(0), rtol=1e-6)
    one = Moments(2)
    one.add(torch.zeros(3))
    with pytest.raises(InputError, match="at least two iterates"):
        one.posterior(torch.device("cpu"), torch.float32)


def test_outputs_are_those_of_networks_that_hold_the_draws_and_the_users_network_is_left_alone() -> None:
    x, y = classification(60)
    net = mlp().train()
    net[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    batches = loader(x, y, 20)
    torch.manual_seed(0)
    swag = fit_swag(net, batches, Categorical(), epochs=4, lr=0.1, samples=3, seed=5)
    assert isinstance(swag, Predictor)
    found = swag.outputs(x)
    assert found.outputs.shape == (3, 60, 3)
    for index in range(3):
        other = mlp()
        missing, unexpected = other.load_state_dict(swag.state(index), strict=False)
        assert missing == ["0.bias"]
        assert not unexpected
        with torch.no_grad():
            assert torch.allclose(other(x), found.outputs[index], atol=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert not net[0].bias.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(swag.outputs(loader(x, y, 7, shuffle=False)).outputs, found.outputs)
    # P without the frozen bias, of 4 bytes each; 4 iterates, so 4 deviations.
    weights = 6 * 12 + 12 * 3 + 3
    assert swag.trainable_parameters == (2 + 4) * weights
    assert swag.artifact_bytes == 4 * (2 + 4) * weights
    torch.manual_seed(1)
    again = fit_swag(net, batches, Categorical(), epochs=4, lr=0.1, samples=2, seed=5)
    assert torch.equal(again.outputs(x).outputs, found.outputs[:2])
    third = fit_swag(net, batches, Categorical(), epochs=4, lr=0.1, samples=2, seed=6)
    assert not torch.allclose(third.outputs(x).outputs, found.outputs[:2])


def test_every_draw_has_the_batch_norm_statistics_of_its_own_weights() -> None:
    x, y = images()
    net = conv_net()
    net[6] = nn.Identity()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = DataLoader(TensorDataset(x, y), batch_size=32)
    swag = fit_swag(net, batches, Categorical(), epochs=3, lr=0.05, samples=2)
    seen = []
    for index in range(2):
        state = swag.state(index)
        halves = [nn.functional.conv2d(part, state["0.weight"], padding=1) for part in x.split(32)]
        mean = torch.stack([part.mean((0, 2, 3)) for part in halves]).mean(0)
        variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in halves]).mean(0)
        assert torch.allclose(state["1.running_mean"], mean, atol=1e-6)
        assert torch.allclose(state["1.running_var"], variance, atol=1e-6)
        seen.append(state["4.running_mean"])
        other = conv_net()
        other[6] = nn.Identity()
        other.load_state_dict(state)
        with torch.no_grad():
            assert torch.allclose(swag.outputs(x).outputs[index], other.eval()(x), atol=1e-5)
    assert not torch.allclose(*seen, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    statistics = 2 * (2 * 4 * 4 + 8 + 2 * 6 * 4 + 8)
    assert swag.artifact_bytes == 4 * swag.trainable_parameters + statistics


def test_draws_too_large_to_keep_are_drawn_anew_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = classification(1200)
    net = mlp()
    kept = fit_swag(net, loader(x, y, 400, shuffle=False), Categorical(), epochs=2, lr=0.1, samples=3)
    monkeypatch.setattr("stfbnn.baselines.swag._KEPT_BYTES", 0)
    anew = SWAG(mlp().eval(), kept.posterior, Categorical(), 3, 0)
    assert torch.equal(anew.outputs(x).outputs, kept.outputs(x).outputs)


def test_a_regression_has_more_spread_where_there_are_no_data() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(100, 1, generator=random) * 2 - 1
    y = x.sin() + 0.1 * torch.randn(100, 1, generator=random)
    net = trained(mlp(1, 20, 1), x, y)
    with torch.no_grad():
        noise = residual_noise(net(x), y)
    swag = fit_swag(net, loader(x, y, 10), Gaussian(noise_std=noise), epochs=10, lr=0.02, samples=20)
    inside, outside = (swag.outputs(data).at() for data in (x, 10 * x.sign()))
    assert outside.epistemic.mean() > 5 * inside.epistemic.mean()
    assert float(inside.log_density(y).mean()) > 0.5


def test_mappings_with_weights_and_a_loss_of_ones_own_come_through() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 1)

        def forward(self, features: Tensor) -> dict[str, Tensor]:
            return {"score": self.layer(self.norm(features))}

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    batches = [{"features": part, "y": (part[:, :1] > 0).float(), "w": torch.ones(len(part))} for part in x.split(10)]
    seen: list[Tensor] = []

    def loss(outputs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        seen.append(weight)
        return binary_cross_entropy_with_logits(outputs, target)

    reading = Reading(output=lambda raw: raw["score"], target_key="y", weight_key="w")
    swag = fit_swag(Named(), batches, Bernoulli(), epochs=3, lr=0.1, samples=2, loss=loss, reading=reading)
    assert len(seen) >= 12
    assert torch.allclose(swag.state(0)["norm.running_mean"], x.mean(0), atol=1e-6)
    assert swag.outputs(batches).outputs.shape == (2, 40, 1)


class Stream(IterableDataset):
    """Without a length."""

    def __iter__(self) -> Any:
        return iter(zip(*classification(40), strict=True))


def test_bad_settings_are_refused_before_training() -> None:
    x, y = classification(40)
    batches = loader(x, y, 20)
    for changed, message in (
        ({"epochs": 0}, "epochs"),
        ({"rank": 1}, "rank must be an integer of at least 2"),
        ({"samples": 0}, "samples"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"seed": -1}, "seed"),
        ({"collect_every": 0}, "collect_every"),
        ({"collect_every": 4}, "at least two iterates, but 3 epochs of 2 steps"),
        ({"loss": "mse"}, "loss"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
    ):
        settings: dict[str, Any] = {"epochs": 3, "lr": 0.1, **changed}
        with pytest.raises(InputError, match=message):
            fit_swag(mlp(), batches, Categorical(), **settings)
    with pytest.raises(InputError, match="at least two iterates"):
        fit_swag(mlp(), batches, Categorical(), epochs=1, lr=0.1)
    with pytest.raises(InputError, match="collect_every="):
        fit_swag(mlp(), DataLoader(Stream(), batch_size=20), Categorical(), epochs=3, lr=0.1)
    with pytest.raises(InputError, match="no batch"):
        fit_swag(mlp(), [], Categorical(), epochs=3, lr=0.1)
    with pytest.raises(InputError, match="no noise yet"):
        fit_swag(mlp(), batches, Gaussian(), epochs=3, lr=0.1)


def test_a_likelihood_that_does_not_fit_the_targets_is_refused_at_the_first_batch() -> None:
    x, y = classification(40)
    steps: list[int] = []
    net = mlp()
    net.register_full_backward_hook(lambda *_: steps.append(1))
    with pytest.raises(InputError, match="float targets"):
        fit_swag(net, loader(x, y), Gaussian(noise_std=1.0), epochs=3, lr=0.1)
    assert not steps


def test_a_diverging_run_says_so_and_streams_without_length_work() -> None:
    x, y = classification(40)
    with pytest.raises(InputError, match="lower lr"):
        fit_swag(
            mlp(), loader(x, 1e30 * y.float().unsqueeze(1).expand(-1, 3)), Gaussian(noise_std=1.0), epochs=9, lr=9.0
        )
    swag = fit_swag(mlp(), DataLoader(Stream(), batch_size=20), Categorical(), epochs=2, lr=0.1, collect_every=1)
    assert swag.posterior.iterates == 4
    assert math.isfinite(float(swag.posterior.mean.sum()))
