"""Hamiltonian Monte Carlo against posteriors known in closed form or by quadrature; its diagnostics against their formulas."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError, ModelChangedError
from stfbnn.inference import hmc
from stfbnn.inference.hmc import HMCRun, sample_hmc
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import SampledPosterior, Samples
from stfbnn.prediction import predict

NOISE, PRIOR_STD, COUNT = 0.5, 0.8, 60


def linear_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += 0.8 * x[:, 0]
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3
    return x, y + NOISE * torch.randn(COUNT, generator=generator, dtype=torch.float64)


def quick(bnn: BayesianNetwork, batches: Any, **options: Any) -> HMCRun:
    """A run that is too short to be a reference, without being told so."""
    settings = {"samples": 10, "warmup": 10, "chains": 2, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="these samples are no reference yet")
        return sample_hmc(bnn, batches, **settings)


def standard_errors(bnn: BayesianNetwork, function: Any, expected: Tensor, chains: int) -> Tensor:
    """How many Monte Carlo standard errors E_q[function(w)] is from ``expected``; by the chains' own autocorrelation."""
    values = function(bnn.posterior.samples.double()).unflatten(0, (chains, -1)).numpy()
    error = array_stats.mcse(values, chain_axis=0, draw_axis=1, method="mean")
    return torch.as_tensor((values.mean((0, 1)) - expected.numpy()) / error)


@pytest.mark.parametrize(("temperature", "dense"), [(1.0, False), (0.3, True)])
def test_conjugate_regression(temperature: float, dense: bool) -> None:
    x, y = linear_data()
    bnn = bayesianize(nn.Linear(3, 1).double(), x[:2], prior=PRIOR_STD)
    options = {"likelihood": Gaussian(noise_std=NOISE), "temperature": temperature, "dense_mass": dense}
    run = quick(bnn, [(x, y)], samples=220, warmup=100, **options)
    # p(w) p(D|w)^(1/T): the log-likelihood counts 1/T, the prior once.
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / (NOISE**2 * temperature) + torch.eye(4, dtype=torch.float64) / PRIOR_STD**2
    mean = torch.linalg.solve(precision, design.T @ y / (NOISE**2 * temperature))
    covariance = precision.inverse()
    rows, columns = torch.triu_indices(4, 4)

    def products(w: Tensor) -> Tensor:
        return (w - mean)[:, rows] * (w - mean)[:, columns]

    # 14 figures in all: four standard errors are exceeded by one of them once in a thousand seeds.
    assert (standard_errors(bnn, lambda w: w, mean, 2).abs() < 4).all()
    assert (standard_errors(bnn, products, covariance[rows, columns], 2).abs() < 4).all()
    # 200 independent draws put 5 % on a standard deviation: four of them, so that errors cannot hide in the chains' noise.
    assert run.smallest_ess > 200
    assert ((bnn.posterior.std_vector() / covariance.diagonal().sqrt() - 1).abs() < 0.2).all()
    assert run.largest_rhat < 1.05
    assert bnn.temperature == temperature


def test_two_weights_before_a_nonlinear_trunk_against_quadrature() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(25, 1, generator=generator)
    y = (x[:, 0] + torch.randn(25, generator=generator) > 0.4).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.5], [-1.0]]))
    bnn = bayesianize(model.eval(), x[:2], prior=2.0)
    quick(bnn, loader(x, y, 8), samples=250, warmup=80, temperature=0.5, seed=1)

    axis = np.linspace(-12, 12, 401)
    weight, bias = (part.reshape(-1) for part in np.meshgrid(axis, axis, indexing="ij"))
    slope, shift = model[2].weight.detach().double().numpy()[:, 0], model[2].bias.detach().double().numpy()

    def class_one(at: np.ndarray) -> np.ndarray:
        """p(y=1 | x, w) for grid points down and inputs across."""
        hidden = np.tanh(weight[:, None] * at + bias[:, None])
        return 1 / (1 + np.exp((slope[0] - slope[1]) * hidden + shift[0] - shift[1]))

    probs = class_one(x[:, 0].double().numpy())
    fit = np.log(np.where(y.numpy() == 1, probs, 1 - probs)).sum(1)
    log_density = fit / 0.5 - (weight**2 + bias**2) / (2 * 2.0**2)
    density = np.exp(log_density - log_density.max())
    density /= density.sum()

    def expectation(values: np.ndarray) -> Tensor:
        return torch.as_tensor((density[:, None] * values).sum(0))

    moments = np.stack([weight, bias, weight**2, bias**2, weight * bias], 1)
    found = standard_errors(
        bnn, lambda w: torch.stack([*w.T, *w.square().T, w.prod(1)], 1), expectation(moments), chains=2
    )
    assert (found.abs() < 4).all()
    at = torch.linspace(-3, 3, 7)
    expected = expectation(class_one(at.double().numpy()))
    # Over all 500 samples; probabilities spread by less than 0.5, and some hundred draws are independent.
    every = torch.stack([bnn.outputs(w, at.unsqueeze(1)).softmax(1)[:, 1] for w in bnn.posterior.samples]).mean(0)
    torch.testing.assert_close(every.double(), expected, atol=0.05, rtol=0)
    torch.testing.assert_close(predict(bnn, at.unsqueeze(1), samples=500).probs[:, 1], expected, atol=0.08, rtol=0)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(noise_std=0.7)])
def test_the_energy_and_its_gradient(likelihood: Categorical | Gaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stfbnn.inference.minibatch.chunk_rows", lambda inputs, device: 7)
    torch.manual_seed(0)
    net, x = conv_net().double(), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    bnn = bayesianize(net, x[:2], prior=0.6)
    y = torch.arange(20) % 3 if isinstance(likelihood, Categorical) else torch.randn(20, 3, dtype=torch.float64)
    energy = hmc._Energy(bnn, likelihood, x, y, 50, 0.3)
    weights = [
        torch.randn(bnn.layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)
    ]

    def minus_log_posterior(w: Tensor) -> Tensor:
        # The whole network, unfolded, with torch's own distributions; 50/20 as N is 50 for 20 rows that were read.
        out = torch.func.functional_call(net, {"0.weight": w.reshape(4, 1, 3, 3)}, (x,))
        noise, scale = torch.tensor([0.7, 0.6], dtype=torch.float64)
        if isinstance(likelihood, Categorical):
            log_likelihood = torch.distributions.Categorical(logits=out).log_prob(y).sum()
        else:
            log_likelihood = torch.distributions.Normal(out, noise).log_prob(y).sum()
        return -50 / 20 / 0.3 * log_likelihood - torch.distributions.Normal(0 * scale, scale).log_prob(w).sum()

    values, expected = [], []
    for w in weights:
        w.requires_grad_()
        values.append(energy(w))
        expected.append(minus_log_posterior(w))
        torch.testing.assert_close(
            torch.autograd.grad(values[-1], w)[0], torch.autograd.grad(expected[-1], w)[0], rtol=1e-8, atol=1e-8
        )
    # The energy leaves the prior's constant out.
    torch.testing.assert_close(values[1] - values[0], expected[1] - expected[0], rtol=1e-9, atol=0)
    assert energy.evaluations == 2


def test_everything_follows_from_the_seed() -> None:
    x, y = classification(30)
    model = trained(mlp(hidden=2), x, y, steps=30)
    runs = []
    for seed in (5, 5, 6):
        bnn = bayesianize(model, x[:2])
        torch.manual_seed(seed * len(runs))
        before = torch.get_rng_state()
        quick(bnn, loader(x, y, 10, shuffle=False), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(bnn.posterior.samples)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    chains = runs[0].unflatten(0, (2, -1))
    assert not torch.equal(chains[0], chains[1])


def test_what_it_leaves_behind(tmp_path: Path) -> None:
    x, y = classification(40)
    model = trained(mlp(hidden=2), x, y, steps=30)
    bnn = bayesianize(model, x[:2], prior="pretrained")
    run = quick(bnn, loader(x, y), temperature=0.2, num_examples=80)
    assert isinstance(bnn.posterior, SampledPosterior)
    assert bnn.posterior.samples.shape == (20, 14)
    assert bnn.posterior.samples.dtype == torch.float32
    assert (bnn.temperature, bnn.num_examples, bnn.predictive_temperature) == (0.2, 80, 1.0)
    assert bnn.family == Samples(20)
    assert torch.isfinite(predict(bnn, x).log_probs).all()
    again = load(save(bnn, tmp_path / "posterior"), model)
    assert torch.equal(predict(again, x).probs, predict(bnn, x).probs)
    assert (run.chains, run.samples, run.warmup, run.num_examples, run.temperature) == (2, 10, 10, 80, 0.2)
    assert {name: tuple(value.shape) for name, value in run.ess.items()} == {"weight": (2, 6), "bias": (2,)}
    assert run.gradients >= 40
    assert len(run.acceptance) == len(run.divergences) == len(run.step_size) == 2
    assert run.table().row_count == 2
    assert run.as_dict()["rhat"]["bias"] == run.rhat["bias"].tolist()
    assert run.as_dict()["smallest_ess"] == min(float(value.min()) for value in run.ess.values())


@pytest.mark.parametrize("given", [None, 0.4])
def test_a_learned_noise_is_kept_where_it_is_known(given: float | None) -> None:
    x, y = linear_data()
    model = nn.Linear(3, 1).double()
    bnn = bayesianize(model, x[:2], prior=PRIOR_STD)
    quick(bnn, loader(x, y, 25), likelihood=Gaussian(noise_std=given, learned=True))
    with torch.no_grad():
        residual = float((y - model(x)[:, 0]).square().mean().sqrt())
    likelihood = bnn.require_fitted()
    assert isinstance(likelihood, Gaussian)
    assert float(likelihood.noise_std) == pytest.approx(residual if given is None else given)


def test_chains_that_are_no_reference_are_called_that() -> None:
    x, y = classification(30)
    bnn = bayesianize(trained(mlp(hidden=2), x, y, steps=30), x[:2])
    with pytest.warns(UserWarning, match="no reference yet.*independent draws"):
        sample_hmc(bnn, [(x, y)], samples=8, warmup=5, chains=2, max_tree_depth=2)


def split_rhat(chains: np.ndarray) -> float:
    """Rank-normalised split R̂, the larger of the bulk's and of the folded draws', from Vehtari et al. (2021), eqs. 1–4, 14."""
    halves = chains.reshape(len(chains) * 2, -1)

    def of(values: np.ndarray) -> float:
        ranks = stats.rankdata(values).reshape(values.shape)
        z = stats.norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4))
        n = z.shape[1]
        within, between = z.var(1, ddof=1).mean(), n * z.mean(1).var(ddof=1)
        return float(np.sqrt(((n - 1) / n * within + between / n) / within))

    return max(of(halves), of(np.abs(halves - np.median(halves))))


def test_diagnostics_of_chains_whose_law_is_known() -> None:
    """AR(1) chains: the effective sample size is n (1 − ρ)/(1 + ρ)."""
    random = np.random.default_rng(0)
    rho = np.array([0.0, 0.5, 0.9])
    draws = np.zeros((4, 20_000, 3))
    draws[:, 0] = random.normal(size=(4, 3))
    for step in range(1, draws.shape[1]):
        draws[:, step] = rho * draws[:, step - 1] + np.sqrt(1 - rho**2) * random.normal(size=(4, 3))
    ess = hmc._each(array_stats.ess, torch.as_tensor(draws))
    np.testing.assert_allclose(ess.numpy(), 80_000 * (1 - rho) / (1 + rho), rtol=0.1)

    short = draws[:, :200].copy()
    short[0, :, 1] += 1.0
    short[:, :, 2] *= np.array([1.0, 1.0, 1.0, 4.0])[:, None]
    rhat = hmc._each(array_stats.rhat, torch.as_tensor(short))
    np.testing.assert_allclose(rhat.numpy(), [split_rhat(short[:, :, k]) for k in range(3)], rtol=1e-6)
    assert rhat[0] < 1.02
    assert (rhat[1:] > 1.1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 7}, "samples must be at least 8"),
        ({"samples": 2.5}, "samples must be a positive integer"),
        ({"warmup": 0}, "warmup"),
        ({"chains": 1}, "chains must be at least 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"num_examples": 0}, "num_examples"),
        ({"max_parameters": 13}, "14 weights, more than max_parameters=13"),
        ({"seed": -1}, "seed"),
        ({"likelihood": "poison"}, "not known"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    x, y = classification(20)
    bnn = bayesianize(mlp(hidden=2), x[:2])
    with pytest.raises(InputError, match=message):
        sample_hmc(bnn, [(x, y)], **options)
    assert not bnn.fitted


def test_bad_data_are_refused() -> None:
    x, y = classification(20)
    bnn = bayesianize(mlp(hidden=2), x[:2])
    with pytest.raises(InputError, match="no batch"):
        sample_hmc(bnn, [])
    with pytest.raises(InputError, match="NaN"):
        sample_hmc(bnn, [(torch.full_like(x, torch.nan), y)])
    with pytest.raises(InputError, match=r"0 … 2"):
        sample_hmc(bnn, [(x, y + 1)])
    with pytest.raises(InputError, match="does not run"):
        sample_hmc(bnn, [(x[:, :4], y)])


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = classification(20)
    for module in ("pyro.infer.mcmc", "arviz_stats.base.array"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(InputError, match=r"pip install 'stfbnn\[hmc\]'"):
                sample_hmc(bayesianize(mlp(hidden=2), x[:2]), [(x, y)])


def test_an_interrupted_run_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = classification(20)
    model = mlp(hidden=2)
    bnn = bayesianize(model, x[:2])
    before = bnn.posterior

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Categorical, "log_prob", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quick(bnn, [(x, y)])
    assert bnn.posterior is before
    assert not bnn.fitted
    monkeypatch.undo()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(ModelChangedError):
        quick(bnn, [(x, y)])
