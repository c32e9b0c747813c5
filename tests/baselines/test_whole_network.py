"""The fully Bayesian network: closed forms of linear regression, what is random in it, and where it starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn import models
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import Predictor
from stfbnn.baselines.whole_network import engine_settings, fit_whole_network, reinitialized_copy
from stfbnn.errors import InputError, LayerError, NotFittedError
from stfbnn.likelihood import Gaussian
from stfbnn.prediction import member_outputs, predict
from stfbnn.provenance import attach, provenance_of

NOISE, PRIOR_STD, COUNT = 0.5, 0.8, 200
ENGINES = ["natural-gradient", "bayes-by-backprop"]


def linear_regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, and the mean and widths of the best mean-field Gaussian: those of the exact Λ, 1/√Λ_ii."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3
    y += NOISE * torch.randn(COUNT, generator=generator, dtype=torch.float64)
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / NOISE**2 + torch.eye(4, dtype=torch.float64) / PRIOR_STD**2
    return x, y, torch.linalg.solve(precision, design.T @ y / NOISE**2), precision.diagonal().rsqrt()


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
@pytest.mark.parametrize(
    ("engine", "options", "tolerance"),
    [
        ("natural-gradient", {"curvature_rate": 1e-4, "learning_rate": 0.05}, 0.03),
        ("bayes-by-backprop", {"learning_rate": 0.03}, 0.07),
    ],
)
def test_of_a_single_layer_it_is_the_best_mean_field_gaussian(
    engine: str, options: dict[str, float], tolerance: float, start: str
) -> None:
    x, y, mean, std = linear_regression()
    bnn, _ = fit_whole_network(
        nn.Linear(3, 1).double(),
        [(x, y)] * 50,
        start=start,
        engine=engine,
        engine_options=options,
        initial_std=0.05,
        prior=PRIOR_STD,
        epochs=16,
        num_examples=COUNT,
        likelihood=Gaussian(noise_std=NOISE),
        temperature=1.0,
        estimator="antithetic",
        draws=2,
    )
    found = bnn.layout.flatten(bnn.posterior.mean())
    assert ((found - mean).abs() < 5 * tolerance * std).all()
    assert float((bnn.posterior.std_vector().detach() / std - 1).square().mean().sqrt()) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_it_learns_from_either_start(engine: str, start: str) -> None:
    x, y = classification(300)
    x_test, y_test = classification(500, seed=2)
    net = trained(mlp(hidden=16), x, y, steps=100)
    bnn, run = fit_whole_network(
        net, loader(x, y), start=start, engine=engine, epochs=30, temperature=0.1, initial_std=0.03
    )
    assert run.history[-1].nll < 0.85
    assert -float(predict(bnn, x_test).log_density(y_test).mean()) < 0.95 < math.log(3)
    assert bnn.layout.size == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_the_users_network_stays_as_it_was_and_normalisations_are_not_random(engine: str, start: str) -> None:
    net = conv_net()
    net[1].train()
    net[3].weight.requires_grad_(False)
    x, y = torch.randn(48, 1, 8, 8), torch.randint(0, 3, (48,))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    wants = [parameter.requires_grad for parameter in net.parameters()]
    rng = torch.get_rng_state()
    bnn, _ = fit_whole_network(net, loader(x, y, shuffle=False), start=start, engine=engine, epochs=1, temperature=0.1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert wants == [parameter.requires_grad for parameter in net.parameters()]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert set(bnn.layout.names) == {"0.weight", "3.weight", "3.bias", "9.weight", "9.bias"}
    if start == "pretrained":
        assert all(torch.equal(bnn.network.get_buffer(f"1.{name}"), state[f"1.{name}"]) for name in ("running_mean",))
        assert torch.equal(bnn.posterior.layout.flatten(bnn.trained)[:36], state["0.weight"].flatten())
    again, _ = fit_whole_network(
        net, loader(x, y, shuffle=False), start=start, engine=engine, epochs=1, temperature=0.1
    )
    assert torch.equal(again.posterior.mean_vector(), bnn.posterior.mean_vector())
    assert torch.equal(again.posterior.std_vector(), bnn.posterior.std_vector())


def test_from_scratch_batch_norm_has_the_statistics_of_the_random_start() -> None:
    net = conv_net()
    x, y = torch.randn(48, 1, 8, 8), torch.randint(0, 3, (48,))
    bnn, _ = fit_whole_network(
        net, [(x[:24], y[:24]), (x[24:], y[24:])], start="scratch", epochs=1, temperature=0.1, seed=3
    )
    fresh = reinitialized_copy(net, 3)
    first = torch.stack([fresh[0](half).transpose(0, 1).flatten(1) for half in (x[:24], x[24:])])
    torch.testing.assert_close(bnn.network[1].running_mean, first.mean(2).mean(0))
    torch.testing.assert_close(bnn.network[1].running_var, first.var(2).mean(0))
    assert bnn.network[1].momentum == net[1].momentum
    assert not bnn.network[1].training
    # What comes after a norm is measured with that norm's own batch statistics.
    assert not torch.equal(bnn.network[4].running_mean, torch.zeros(6))


def test_a_fresh_start_follows_from_the_seed_and_keeps_ties() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4))
    net[2].weight = net[0].weight
    state = torch.get_rng_state()
    one, same, other = (reinitialized_copy(net, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, net[0].weight)
    assert one[2].weight is one[0].weight
    assert one[0].weight.abs().max() <= 0.5  # uniform within 1/√4


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale


def test_what_cannot_be_done_is_refused() -> None:
    x, y = classification(40)
    data = loader(x, y)
    with pytest.raises(InputError, match=r"no reset_parameters\(\).*pretrained"):
        fit_whole_network(Bare(), data, start="scratch", epochs=1, temperature=1.0)
    with pytest.raises(InputError, match="start must be"):
        fit_whole_network(mlp(), data, start="fresh")
    with pytest.raises(InputError, match="engine must be"):
        fit_whole_network(mlp(), data, engine="laplace")
    with pytest.raises(InputError, match="empty"):
        fit_whole_network(mlp(), [])
    with pytest.raises(InputError, match="only once"):
        fit_whole_network(mlp(), iter(data))
    with pytest.raises(LayerError, match="passed over"):
        fit_whole_network(nn.BatchNorm1d(6).eval(), data)
    with pytest.raises(InputError, match="initial_std"):
        fit_whole_network(mlp(), data, initial_std=0.0, temperature=1.0)
    with pytest.raises(NotFittedError):
        BayesianPredictor(fresh_network(x))


def fresh_network(x: Tensor):
    from stfbnn.conversion import bayesianize

    return bayesianize(mlp(), x[:2])


def test_the_default_prior_has_a_scale_for_each_parameter() -> None:
    x, y = classification(40)
    net = mlp()
    with torch.no_grad():
        net[0].bias.zero_()
    bnn, _ = fit_whole_network(net, loader(x, y), epochs=1, temperature=0.1)
    rms = [float(net[index].weight.detach().square().mean().sqrt()) for index in (0, 2)]
    everything = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    expected = [
        rms[0],
        float(everything.square().mean().sqrt()),
        rms[1],
        float(net[2].bias.detach().square().mean().sqrt()),
    ]
    assert bnn.prior.scales.tolist() == pytest.approx(expected)
    scratch, _ = fit_whole_network(net, loader(x, y), epochs=1, temperature=0.1, start="scratch")
    assert scratch.prior.scales.tolist() == [0.5]


def test_embeddings_are_drawn_around_their_trained_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
    tokens, y = torch.randint(0, 5, (40, 2)), torch.randint(0, 2, (40,))
    bnn, _ = fit_whole_network(net, loader(tokens, y), epochs=2, temperature=0.1)
    assert torch.equal(bnn.prior.mean[:36], net[0].weight.detach().flatten())
    # Rows 5 to 8 never occur.
    torch.testing.assert_close(bnn.posterior.mean()["0.weight"][5:], net[0].weight.detach()[5:])


class Twice(nn.Module):
    """One batch norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.same = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.same(self.two(torch.relu(self.norm(self.one(x)))))))


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_a_normalisation_that_is_there_twice_stays_as_it_is(start: str) -> None:
    x, y = classification(60)
    torch.manual_seed(0)
    net = Twice().eval()
    bnn, _ = fit_whole_network(net, loader(x, y), start=start, epochs=1, temperature=0.1)
    assert not any("norm" in name or "same" in name for name in bnn.layout.names)
    assert bnn.network.same is bnn.network.norm


def test_from_scratch_held_out_data_may_be_what_stage_one_saw() -> None:
    x, y = classification(60)
    x_val, y_val = classification(60, seed=1)
    net = mlp()
    attach(net, provenance_of(loader(x_val, y_val)))
    common = {"val_loader": loader(x_val, y_val), "epochs": 1, "temperatures": (0.1,)}
    with pytest.raises(InputError, match="seen by stage one"):
        fit_whole_network(net, loader(x, y), **common)
    _, run = fit_whole_network(
        net, loader(x, y), start="scratch", epochs=3, val_loader=loader(x_val, y_val), temperatures=(0.1,)
    )
    assert run.held_out_nll is not None


def test_the_draws_are_a_predictor() -> None:
    x, y = classification(60)
    net = trained(mlp(), x, y, steps=20)
    bnn, _ = fit_whole_network(net, loader(x, y), epochs=1, temperature=0.1)
    predictor = BayesianPredictor(bnn, samples=6, seed=4)
    assert isinstance(predictor, Predictor)
    outputs = predictor.outputs(x)
    assert torch.equal(outputs.outputs, member_outputs(bnn, x, samples=6, seed=4).outputs)
    torch.testing.assert_close(predictor.outputs(loader(x, y, 7, shuffle=False)).outputs, outputs.outputs)
    assert outputs.likelihood is predictor.likelihood
    count = sum(parameter.numel() for parameter in net.parameters())
    assert predictor.trainable_parameters == 2 * count
    assert predictor.artifact_bytes == 8 * count
    with pytest.raises(InputError, match="samples"):
        BayesianPredictor(bnn, samples=0)


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_a_residual_network_runs(start: str) -> None:
    torch.manual_seed(0)
    net = models.resnet20((1, 8, 8), 3)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
    net.train()(x)
    for engine in ENGINES:
        bnn, run = fit_whole_network(net.eval(), loader(x, y, 8), start=start, engine=engine, epochs=1, temperature=0.1)
        assert math.isfinite(run.history[-1].nll)
        assert torch.isfinite(member_outputs(bnn, x, samples=2).outputs).all()
        # All but the scales and shifts of its 19 batch norms.
        assert bnn.layout.size == sum(p.numel() for p in net.parameters()) - 2 * (16 * 7 + 32 * 6 + 64 * 6)


def test_settings_of_ones_own_win() -> None:
    assert engine_settings("natural-gradient", "scratch", 0.02) == {"largest_std": 0.02, "wander": 10.0}
    assert engine_settings("bayes-by-backprop", "scratch", 0.02) == {"learning_rate": 3e-3}
    assert engine_settings("natural-gradient", "pretrained", 0.02, {"wander": 2.0})["wander"] == 2.0
