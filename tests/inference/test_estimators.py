"""The estimators of E_q[NLL] and its gradients: unbiased, equal in law where they should be, refused where they are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.estimators import (
    Estimator,
    Flipout,
    LocalReparameterization,
    PerExample,
    Sampler,
    SharedSample,
    resolve_estimator,
)
from stfbnn.inference.fit import fit
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.network import BayesianNetwork

NOISE = 0.5
IMAGES = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
MEAN_FIELD = [
    SharedSample(),
    SharedSample(2, antithetic=True),
    SharedSample(3),
    PerExample(1, antithetic=False),
    PerExample(),
    Flipout(1, antithetic=False),
    Flipout(),
    LocalReparameterization(1, antithetic=False),
    LocalReparameterization(),
]


def mean_field(bnn: BayesianNetwork, std: float = 0.3) -> tuple[Sampler, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    loc = bnn.posterior.mean_vector().detach().clone()
    sigma = std * (0.5 + torch.rand(loc.shape, generator=generator, dtype=loc.dtype))
    loc.requires_grad_()
    sigma.requires_grad_()
    return Sampler((loc, sigma), lambda noise: loc + sigma * noise, lambda: (loc, sigma), len(loc)), loc, sigma


def regression(rows: int = 12) -> tuple[BayesianNetwork, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    return bayesianize(nn.Linear(3, 2).double(), x[:2]), x, y


@pytest.mark.parametrize("estimator", MEAN_FIELD, ids=repr)
def test_unbiased_on_a_linear_model(estimator: Estimator) -> None:
    """E_q[NLL] = Σ_j mean_n ((y − xμ)² + Σ x²σ²) / (2 s²) + const: value and gradients in closed form; 5 standard errors."""
    bnn, x, y = regression()
    sampler, loc, sigma = mean_field(bnn)
    mean, std = bnn.layout.unflatten(loc), bnn.layout.unflatten(sigma)
    residual = y - x @ mean["weight"].T - mean["bias"]
    spread = x.square() @ std["weight"].square().T + std["bias"].square()
    exact = ((residual.square() + spread) / (2 * NOISE**2)).sum(1).mean() + 2 * math.log(NOISE * math.sqrt(2 * math.pi))
    by_loc, by_sigma = torch.autograd.grad(exact, (loc, sigma))

    minibatch = MinibatchLoss(bnn, Gaussian(noise_std=NOISE), x, y)
    generator = torch.Generator().manual_seed(0)
    found = [estimator.estimate(minibatch, sampler, generator) for _ in range(1500)]
    columns = torch.stack([torch.cat([torch.tensor([one.nll], dtype=loc.dtype), *one.gradients]) for one in found])
    expected = torch.cat([exact.detach().reshape(1), by_loc, by_sigma])
    error = columns.std(0) / math.sqrt(len(found))
    # 17 numbers for each of nine estimators at five standard errors: a false alarm in about 10⁴ runs. What does not vary
    # at all (the mean's gradient under antithetic draws of a quadratic) must agree to rounding.
    assert ((columns.mean(0) - expected).abs() <= 5 * error + 1e-9).all()
    if estimator.antithetic:
        assert error[1 : 1 + len(loc)].max() < 1e-9


def test_local_reparameterisation_has_the_law_of_per_example_draws() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    bnn = bayesianize(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), x[:2])
    sampler, *_ = mean_field(bnn, 0.5)
    minibatch = MinibatchLoss(bnn, Categorical(), x, y)
    generator = torch.Generator().manual_seed(1)

    def losses(estimator: Estimator) -> Tensor:
        return torch.tensor([estimator.estimate(minibatch, sampler, generator).nll for _ in range(2000)])

    local, plain = losses(LocalReparameterization(1, antithetic=False)), losses(PerExample(1, antithetic=False))
    # The variance of a minibatch's loss; its relative standard error is √(2/2000) = .03 for each.
    assert float(local.var() / plain.var()) == pytest.approx(1, abs=0.2)
    assert float(local.mean()) == pytest.approx(float(plain.mean()), abs=5 * float(plain.std()) / math.sqrt(1000))


def test_independent_draws_average_out_over_the_examples() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1, 5).expand(8, 5), torch.randint(0, 3, (1,)).expand(8)
    bnn = bayesianize(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), x[:2])
    sampler, *_ = mean_field(bnn, 0.5)
    minibatch = MinibatchLoss(bnn, Categorical(), x, y)
    generator = torch.Generator().manual_seed(1)

    def variance(estimator: Estimator) -> float:
        return float(torch.tensor([estimator.estimate(minibatch, sampler, generator).nll for _ in range(1500)]).var())

    # Eight equal examples: the loss of one draw, against the mean of eight. Relative standard error about .05.
    shared = variance(SharedSample())
    for estimator in (PerExample(1, antithetic=False), LocalReparameterization(1, antithetic=False)):
        assert shared / variance(estimator) == pytest.approx(8, rel=0.25)
    # Signs make the examples uncorrelated to first order only: the loss is not linear.
    assert 3 < shared / variance(Flipout(1, antithetic=False)) < 9


def test_flipout_runs_every_example_with_the_weights_that_it_says() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 4, 6, 6), torch.randint(0, 3, (5,))
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=1)
    bnn = bayesianize(nn.Sequential(conv, nn.Flatten(), nn.ReLU(), nn.Linear(216, 3)), x[:2])
    sampler, loc, sigma = mean_field(bnn)
    found = Flipout(1, antithetic=False).estimate(
        MinibatchLoss(bnn, Categorical(), x, y), sampler, torch.Generator().manual_seed(4)
    )
    again = torch.Generator().manual_seed(4)
    noise = torch.randn(len(loc), generator=again)
    before = torch.randint(0, 2, (5, 4), generator=again) * 2.0 - 1
    after = torch.randint(0, 2, (5, 6), generator=again) * 2.0 - 1
    deviation = bnn.layout.unflatten(sigma * noise)
    total = torch.zeros(())
    for row in range(5):
        flips = after[row].reshape(-1, 1, 1, 1) * before[row].reshape(1, -1, 1, 1)
        parts = {"weight": deviation["weight"] * flips, "bias": deviation["bias"] * after[row]}
        logits = bnn.outputs(loc + bnn.layout.flatten(parts), x[row : row + 1])
        total = total + nn.functional.cross_entropy(logits, y[row : row + 1]) / 5
    by_loc, by_sigma = torch.autograd.grad(total, (loc, sigma))
    assert found.nll == pytest.approx(float(total.detach()), rel=1e-5)
    assert torch.allclose(found.gradients[0], by_loc, atol=1e-5)
    assert torch.allclose(found.gradients[1], by_sigma, atol=1e-5)


@pytest.mark.parametrize("estimator", [Flipout(), LocalReparameterization(), PerExample()], ids=repr)
def test_with_a_folded_batch_norm(estimator: Estimator) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        norm.weight.uniform_(-2, 2)
        if isinstance(estimator, LocalReparameterization):
            # A negative scale would turn the sign of the noise: equal in law, but not number by number.
            norm.weight.abs_()
        norm.bias.normal_()
    results = []
    for folded in (True, False):
        bnn = bayesianize(model.eval(), x[:2], fold_batch_norm=folded)
        assert (bnn.folding.first_layer_affine is not None) == folded
        sampler, *_ = mean_field(bnn)
        minibatch = MinibatchLoss(bnn, Categorical(), x, y)
        results.append(estimator.estimate(minibatch, sampler, torch.Generator().manual_seed(0)))
    first, second = results
    assert first.nll == pytest.approx(second.nll, rel=1e-5)
    for one, other in zip(first.gradients, second.gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("estimator", [SharedSample(), PerExample(), Flipout(), LocalReparameterization()], ids=repr)
def test_cutting_a_minibatch_into_chunks_changes_nothing(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(37, 5), torch.randint(0, 3, (37,))
    bnn = bayesianize(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), x[:2])
    sampler, *_ = mean_field(bnn)
    whole = estimator.estimate(MinibatchLoss(bnn, Categorical(), x, y), sampler, torch.Generator().manual_seed(0))
    monkeypatch.setattr("stfbnn.inference.minibatch.chunk_rows", lambda *_: 8)
    monkeypatch.setattr("stfbnn.inference.minibatch._PER_EXAMPLE_BYTES", 36 * 4 * 3)
    parts = estimator.estimate(MinibatchLoss(bnn, Categorical(), x, y), sampler, torch.Generator().manual_seed(0))
    assert parts.nll == pytest.approx(whole.nll, rel=1e-5)
    for one, other in zip(parts.gradients, whole.gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["shared", "antithetic", "per-example", "flipout", "local-reparameterization"])
@pytest.mark.parametrize("engine", ["natural-gradient", "bayes-by-backprop"])
def test_every_estimator_fits(name: str, engine: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = (x[:, 0] > 0).long()
    bnn = bayesianize(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)), x[:2])
    options = {"learning_rate": 0.05}
    run = fit(bnn, [(x, y)] * 5, epochs=12, engine=engine, estimator=name, engine_options=options, temperature=0.3)
    assert run.history[-1].free_energy < run.history[0].free_energy


def test_what_auto_chooses() -> None:
    dense = bayesianize(nn.Linear(5, 2), torch.randn(2, 5))
    assert repr(resolve_estimator("auto", None, dense, torch.randn(2, 5))) == repr(LocalReparameterization(2))
    assert repr(resolve_estimator("auto", 3, dense, torch.randn(2, 5))) == repr(
        LocalReparameterization(3, antithetic=False)
    )
    conv = bayesianize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.randn(2, 1, 3, 3))
    assert repr(resolve_estimator("auto", None, conv, IMAGES)) == repr(SharedSample(2, antithetic=True))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))  # type: ignore[no-any-return]


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]  # type: ignore[no-any-return]


def test_refusals() -> None:
    conv = bayesianize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.randn(2, 1, 3, 3))
    with pytest.raises(InputError, match="only for a Linear first layer"):
        resolve_estimator("local-reparameterization", None, conv, IMAGES)
    with pytest.raises(InputError, match="called 2 times"):
        resolve_estimator(LocalReparameterization(), None, bayesianize(Twice(), torch.randn(2, 4)), torch.randn(2, 4))
    embedding = bayesianize(nn.Embedding(5, 3), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="flipout is for"):
        resolve_estimator("flipout", None, embedding, torch.tensor([0, 1]))
    full = bayesianize(nn.Linear(3, 2), torch.randn(2, 3), posterior="full")
    with pytest.raises(InputError, match="independent weights"):
        resolve_estimator("flipout", None, full, torch.randn(2, 3))
    with pytest.raises(InputError, match="even"):
        resolve_estimator("antithetic", 3, conv, IMAGES)
    with pytest.raises(InputError, match="pairs"):
        PerExample(3)
    with pytest.raises(InputError, match="choose"):
        resolve_estimator("best", None, conv, IMAGES)
    with pytest.raises(InputError, match="given by name"):
        resolve_estimator(SharedSample(), 2, conv, IMAGES)
    recurrent = bayesianize(Last(), torch.randn(2, 4, 3))
    with pytest.raises(InputError, match="weights of their own"):
        resolve_estimator("per-example", None, recurrent, torch.randn(2, 4, 3))
    tokens = bayesianize(nn.Sequential(nn.Linear(3, 2), nn.Flatten()), torch.randn(2, 4, 3))
    x, y = torch.randn(6, 4, 3), torch.randint(0, 8, (6,))
    with pytest.raises(InputError, match="applied once"):
        fit(tokens, [(x, y)], epochs=1, temperature=1.0, estimator="local-reparameterization")
    assert repr(resolve_estimator("auto", None, tokens, x[:2])) == repr(SharedSample(2, antithetic=True))
