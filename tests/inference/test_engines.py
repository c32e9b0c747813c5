"""Both engines against posteriors that are known exactly."""

import math

import pytest
import torch
from torch import Tensor, nn

from core_models import loader, mlp
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference import engines
from stfbnn.inference.engine import Engine, cosine_decay
from stfbnn.inference.estimators import SharedSample
from stfbnn.inference.fit import fit
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.inference.survey import survey
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.posterior import MeanField, Mixture, ParameterLayout, Posterior
from stfbnn.posterior.filterwise import Filterwise
from stfbnn.prior import GaussianPrior
from stfbnn.progress import progress_bar

NOISE, PRIOR_STD, COUNT = 0.5, 0.8, 200


def linear_regression() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, and the best mean-field Gaussian of conjugate linear regression (weights, bias): mean, std, KL.

    The exact posterior is N(m, Λ⁻¹) with Λ = XᵀX/noise² + I/prior²; the mean-field Gaussian that minimises the free energy
    has the mean m and the variances 1/Λ_ii.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)
    x[:, 1] += 0.3 * x[:, 0]
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + 0.3
    y += NOISE * torch.randn(COUNT, generator=generator, dtype=torch.float64)
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / NOISE**2 + torch.eye(5, dtype=torch.float64) / PRIOR_STD**2
    mean = torch.linalg.solve(precision, design.T @ y / NOISE**2)
    std = precision.diagonal().rsqrt()
    kl = (math.log(PRIOR_STD) - std.log() + (std**2 + mean**2) / (2 * PRIOR_STD**2) - 0.5).sum()
    return x, y, mean, std, kl


@pytest.mark.parametrize(
    ("engine", "options", "epochs", "tolerance"),
    [
        # 10,000 antithetic pairs: the curvature's standard error is about 1.4 %, that of σ half of it.
        ("natural-gradient", {"curvature_rate": 1e-4, "learning_rate": 0.05}, 25, 0.01),
        ("bayes-by-backprop", {"learning_rate": 0.03}, 50, 0.035),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_conjugate_regression(
    engine: str, options: dict[str, float], epochs: int, tolerance: float, temperature: float
) -> None:
    x, y, mean, std, kl = linear_regression()
    model = nn.Linear(4, 1).double()
    bnn = bayesianize(model, x[:2], prior=PRIOR_STD)
    # At temperature T the log-likelihood counts 1/T: like a noise that is √T times as large.
    noise = NOISE / math.sqrt(temperature)
    fit(
        bnn,
        [(x, y)] * 50,
        epochs=epochs,
        num_examples=COUNT,
        engine=engine,
        engine_options=options,
        estimator="antithetic",
        draws=16 if engine == "natural-gradient" else 2,
        likelihood=Gaussian(noise_std=noise),
        temperature=temperature,
    )
    found = bnn.layout.flatten(bnn.posterior.mean())
    assert ((found - mean).abs() < tolerance * std * 5).all()
    assert float((bnn.posterior.std_vector().detach() / std - 1).square().mean().sqrt()) < tolerance
    assert float(bnn.posterior.kl(bnn.prior).detach()) == pytest.approx(float(kl), rel=tolerance)


def test_learned_noise_of_a_regression() -> None:
    x, y, *_ = linear_regression()
    bnn = bayesianize(nn.Linear(4, 1).double(), x[:2], prior=PRIOR_STD)
    fit(bnn, loader(x, y, 50), epochs=150, temperature=1.0)
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    residual = y - design @ bnn.layout.flatten(bnn.posterior.mean())
    # The noise that maximises E_q[log p]: residuals at the mean plus the spread that q gives the outputs.
    spread = (design**2 @ bnn.posterior.std_vector().detach() ** 2).mean()
    expected = (residual.square().mean() + spread).sqrt()
    likelihood = bnn.require_fitted()
    assert isinstance(likelihood, Gaussian)
    assert float(likelihood.noise_std) == pytest.approx(float(expected), rel=0.02)
    assert float(likelihood.noise_std) == pytest.approx(NOISE, rel=0.15)


def test_empirical_bayes_reaches_its_fixed_point() -> None:
    x, y, *_ = linear_regression()
    bnn = bayesianize(nn.Linear(4, 1).double(), x[:2], prior="empirical-bayes")
    fit(bnn, [(x, y)] * 20, epochs=40, num_examples=COUNT, temperature=1.0, likelihood=Gaussian(noise_std=NOISE))
    mean, std = bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach()
    assert float(bnn.prior.std) == pytest.approx(float((mean**2 + std**2).mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(noise_std=0.7)])
def test_curvature_is_the_diagonal_gauss_newton(likelihood: Categorical | Gaussian) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6, dtype=torch.float64)
    bnn = bayesianize(mlp().double(), x[:2])
    y = torch.randint(0, 3, (64,)) if isinstance(likelihood, Categorical) else torch.randn(64, 3, dtype=torch.float64)
    with progress_bar("", None, show=False) as bar:
        found = survey(bnn, [(x, y)] * 400, likelihood, "labels", 0, True, False, bar).curvature
    weights = bnn.posterior.mean_vector().detach()
    jacobian = torch.func.jacrev(lambda w: bnn.outputs(w, x))(weights)
    if isinstance(likelihood, Categorical):
        p = bnn.outputs(weights, x).softmax(1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    else:
        hessian = torch.eye(3, dtype=torch.float64).expand(64, 3, 3) / 0.7**2
    exact = torch.einsum("nid,nij,njd->d", jacobian, hessian, jacobian) / 64
    # The square of a Gaussian-like score: relative error √(2/400) each; 5 of them.
    assert ((found / exact - 1).abs() < 5 * (2 / 400) ** 0.5 * 1.5).all()
    assert float((found / exact).mean()) == pytest.approx(1, abs=0.05)


def make(name: str, **options: object) -> tuple[Engine, Posterior]:
    layout = ParameterLayout(("w",), ((3,),))
    prior = GaussianPrior(torch.zeros(3), torch.tensor(1.0))
    posterior = MeanField(0.3).build(layout, torch.tensor([0.5, -0.2, 0.1]), prior)
    estimator = SharedSample(2, antithetic=True)
    return engines.build_engine(name, posterior, prior, 100, 10, torch.full((3,), 0.2), estimator, options), posterior


def test_one_newton_step_by_hand() -> None:
    engine, posterior = make("natural-gradient", learning_rate=0.05, momentum=0.5, curvature_trust=10.0)
    engine.begin(2.0, 100)
    h0, delta, effective = 0.2, 2.0 / 100, 50.0
    m0 = torch.tensor([0.5, -0.2, 0.1])
    std = torch.full((3,), (effective * (h0 + delta)) ** -0.5)
    torch.testing.assert_close(posterior.std_vector().detach(), std)

    def gradient(w: Tensor) -> Tensor:
        return 4 * w**3 + torch.tensor([1.0, 0.0, -1.0])

    noise = torch.randn(3, generator=torch.Generator().manual_seed(7))
    up, down = gradient(m0 + std * noise), gradient(m0 - std * noise)
    g_hat, h_hat = (up + down) / 2, (up - down) * noise / 2 / std
    value = engine.step(lambda w: (float((w**4).sum() + w[0] - w[2]), gradient(w)), torch.Generator().manual_seed(7))
    rho = 1 / 10
    h1 = (1 - rho) * h0 + rho * h_hat + 0.5 * rho**2 * (h0 - h_hat) ** 2 / (h0 + delta)
    # The momentum g = ½ ĝ, over 1 − ½.
    m1 = m0 - 0.05 * (g_hat + delta * m0) / (h1 + delta)
    torch.testing.assert_close(posterior.mean_vector().detach(), m1)
    torch.testing.assert_close(posterior.std_vector().detach(), (effective * (h1 + delta)).rsqrt())
    assert math.isfinite(value)


def test_no_weight_starts_wider_than_it_may() -> None:
    layout = ParameterLayout(("w",), ((3,),))
    prior = GaussianPrior(torch.zeros(3), torch.tensor(1.0))
    curvature, estimator = torch.tensor([0.0, 0.2, 50.0]), SharedSample(2, antithetic=True)
    widths = {}
    for largest in (None, 0.05):
        posterior = MeanField().build(layout, torch.zeros(3), prior)
        options = {"largest_std": largest}
        engine = engines.build_engine("natural-gradient", posterior, prior, 100, 10, curvature, estimator, options)
        engine.begin(1.0, 10)
        widths[largest] = posterior.std_vector().detach().clone()
    free = (100 * (curvature + 0.01)).rsqrt()
    torch.testing.assert_close(widths[None], free)
    torch.testing.assert_close(widths[0.05], free.clamp(max=0.05))
    assert free[2] < 0.05 < free[1]
    # At another temperature the same: 0.05 again where H₀ asks for more.
    engine.begin(4.0, 10)
    torch.testing.assert_close(posterior.std_vector().detach()[:2], torch.full((2,), 0.05))
    block, blocks = Filterwise().build(layout, torch.zeros(3), prior), torch.zeros(3, 1, 1)
    with pytest.raises(InputError, match="largest_std is for mean-field"):
        engines.build_engine("natural-gradient", block, prior, 100, 10, blocks, estimator, {"largest_std": 0.05})
    with pytest.raises(InputError, match="largest_std must be"):
        make("natural-gradient", largest_std=-1.0)


def test_precision_stays_positive_on_a_saddle() -> None:
    engine, posterior = make("natural-gradient", learning_rate=1e-6)
    engine.begin(1.0, 10_000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        engine.step(lambda w: (-5 * float((w**2).sum()), -10 * w), generator)
    assert torch.isfinite(posterior.std_vector()).all()
    # A colder stage has a smaller δ: a negative h may not make the precision negative there.
    engine.begin(0.01, 100)
    assert torch.isfinite(posterior.std_vector()).all()


def test_backprop_gradients_are_unbiased() -> None:
    """The mean of many one-draw gradients of a quadratic equals the gradient of its exact expectation."""
    _, posterior = make("bayes-by-backprop")
    slope = torch.tensor([1.0, -1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100_000, 3, generator=generator)
    draws = posterior.draw(noise)
    (3 * draws**2 + slope * draws).sum(1).mean().backward()
    mean, std = posterior.mean_vector().detach(), posterior.std_vector().detach()
    grads = dict(posterior.named_parameters())
    assert grads["loc"].grad is not None
    assert grads["log_std"].grad is not None
    # E[3w² + cw] = 3(μ² + σ²) + cμ; standard errors are below 0.01 here.
    torch.testing.assert_close(grads["loc"].grad, 6 * mean + slope, atol=0.05, rtol=0)
    torch.testing.assert_close(grads["log_std"].grad, 6 * std**2, atol=0.03, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_add_up_to_the_minibatch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stfbnn.inference.minibatch.chunk_rows", lambda inputs, device: chunk)
    torch.manual_seed(0)
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(0, 3, (10,))
    bnn = bayesianize(mlp().double(), x[:2])
    weights = bnn.posterior.mean_vector().detach().requires_grad_()
    expected = nn.functional.cross_entropy(bnn.outputs(weights, x), y)
    expected.backward()
    value, gradient = MinibatchLoss(bnn, Categorical(), x, y)(weights)
    assert value == pytest.approx(float(expected.detach()))
    torch.testing.assert_close(gradient, weights.grad)


def test_cosine() -> None:
    assert cosine_decay(0, 10) == 1
    assert cosine_decay(5, 10) == pytest.approx(0.5)
    assert cosine_decay(10, 10) == pytest.approx(0)
    assert cosine_decay(99, 10) == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {}, "natural-gradient"),
        ("natural-gradient", {"lr": 1.0}, "learning_rate"),
        ("natural-gradient", {"learning_rate": -1.0}, "learning_rate must be positive"),
        ("natural-gradient", {"momentum": 1.0}, "momentum"),
        ("natural-gradient", {"curvature_every": 0}, "curvature_every"),
        ("bayes-by-backprop", {"learning_rate": float("nan")}, "learning_rate"),
        ("laplace", {"learning_rate": 0.1}, "settings"),
    ],
)
def test_bad_engines_are_refused(name: str, options: dict[str, object], message: str) -> None:
    posterior, prior = make("natural-gradient")[1], GaussianPrior(torch.zeros(3), torch.tensor(1.0))
    with pytest.raises(InputError, match=message):
        engines.check_engine(engines.resolve_engine(name, posterior), options, posterior, prior, SharedSample())


@pytest.mark.parametrize("engine", ["natural-gradient", "bayes-by-backprop", "laplace"])
@pytest.mark.parametrize("family", ["point", Mixture(components=2, family="point")], ids=["point", "ensemble"])
def test_a_point_mass_is_only_retrained(family: str | Mixture, engine: str) -> None:
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    with pytest.raises(InputError, match="not inferred but retrained"):
        fit(bayesianize(mlp(6), x[:2], posterior=family), [(x, y)], temperature=1.0, engine=engine)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("natural-gradient", "mean-field"),
        ("natural-gradient", "full"),
        ("laplace", "filterwise"),
        ("bayes-by-backprop", "mean-field"),
    ],
)
def test_the_state_of_an_engine_is_taken_to_where_the_posterior_is(name: str, family: str) -> None:
    # Checkpoints are read onto the CPU. The device "meta" stands for an accelerator.
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    here, there = (bayesianize(mlp(), x[:2], posterior=family, prior="rms-per-parameter") for _ in range(2))
    shape = engines.no_curvature(here.posterior).shape
    found = torch.ones(shape) if len(shape) == 1 else torch.eye(shape[-1]).expand(shape).clone()
    there.posterior.to("meta")
    there.prior.to("meta")

    def engine(bnn, curvature):  # type: ignore[no-untyped-def]
        return engines.build_engine(name, bnn.posterior, bnn.prior, 40, 5, curvature, SharedSample(), {})

    started = engine(here, found)
    started.begin(0.5, 5)
    resumed = engine(there, found.to("meta"))
    resumed.load_state(started.state())
    held = [resumed, *(part for part in vars(resumed).values() if type(part).__name__.endswith("Precision"))]
    tensors = [value for part in held for value in vars(part).values() if isinstance(value, Tensor)]
    assert tensors
    assert {value.device.type for value in tensors if value.numel()} == {"meta"}
