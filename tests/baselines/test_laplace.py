"""Laplace approximations against closed forms: Bayesian linear regression, and the Gauss–Newton matrix by hand."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn import models
from stfbnn.baselines.laplace import LaplacePredictor, fit_laplace
from stfbnn.baselines.predictor import Predictor, Reading
from stfbnn.errors import InputError, LayerError, ModelChangedError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian

COUNT, NOISE, PRIOR, DRAWS = 60, 0.5, 2.0, 3000

with warnings.catch_warnings():
    # What its import says of PyTorch's deprecated compiler is not this library's to repair.
    warnings.simplefilter("ignore", DeprecationWarning)
    pytest.importorskip("laplace", reason="laplace-torch is not installed", exc_type=ImportError)


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)
    rule = torch.tensor([[1.0], [-2.0], [0.5], [0.0]], dtype=torch.float64)
    return x, x @ rule + 0.3 + NOISE * torch.randn(COUNT, 1, generator=generator, dtype=torch.float64)


def ridge(x: Tensor, y: Tensor, precision: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """The network at the posterior mean of Bayesian linear regression, that mean, and the covariance."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    inverse = torch.linalg.inv(design.T @ design / NOISE**2 + precision * torch.eye(5, dtype=x.dtype))
    mean = inverse @ design.T @ y / NOISE**2
    net = nn.Linear(4, 1).double()
    with torch.no_grad():
        net.weight.copy_(mean[:4].T)
        net.bias.copy_(mean[4])
    return net, mean, inverse


def moments(predictor: LaplacePredictor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, K) and covariance (N, K, K) of the members' outputs."""
    outputs = predictor.outputs(x).outputs
    centred = outputs - outputs.mean(0)
    return outputs.mean(0), torch.einsum("snk,snl->nkl", centred, centred) / (len(outputs) - 1)


@pytest.mark.parametrize("subset", ["last-layer", "all"])
def test_of_a_linear_model_it_is_bayesian_linear_regression(subset: str) -> None:
    x, y = regression()
    net, mean, inverse = ridge(x, y, PRIOR)
    predictor = fit_laplace(
        net,
        loader(x, y, 13),
        subset=subset,
        structure="full",
        likelihood=Gaussian(NOISE, learned=False),
        prior_precision=PRIOR,
        samples=DRAWS,
    )
    at = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    design = torch.cat([at, torch.ones(9, 1, dtype=torch.float64)], 1)
    found, covariance = moments(predictor, at)
    variance = (design @ inverse * design).sum(1)
    # The standard errors of a mean and of a variance from so many draws.
    assert ((found - design @ mean).abs().squeeze() < 4.5 * (variance / DRAWS).sqrt()).all()
    assert (covariance.flatten() / variance - 1).abs().max() < 4.5 * math.sqrt(2 / DRAWS)
    prediction = predictor.outputs(at).at()
    assert torch.allclose(prediction.std.squeeze() ** 2, variance + NOISE**2, rtol=0.03)


def test_of_all_weights_of_a_network_it_is_the_linear_model_in_its_jacobian() -> None:
    net = trained(mlp(4, 3, 1).double(), *regression(), steps=50)
    x, y = regression()
    predictor = fit_laplace(
        net,
        loader(x, y, 20),
        subset="all",
        structure="full",
        likelihood=Gaussian(NOISE, learned=False),
        prior_precision=PRIOR,
        samples=DRAWS,
    )
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    names = [name for name, _ in net.named_parameters()]
    shapes = [value.shape for value in net.parameters()]

    def run(vector: Tensor) -> Tensor:
        parts = vector.split([math.prod(shape) for shape in shapes])
        return torch.func.functional_call(
            net, {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}, (x,)
        ).squeeze()

    jacobian = torch.func.jacrev(run)(flat)
    inverse = torch.linalg.inv(jacobian.T @ jacobian / NOISE**2 + PRIOR * torch.eye(len(flat), dtype=torch.float64))
    found, covariance = moments(predictor, x)
    variance = (jacobian @ inverse * jacobian).sum(1)
    assert ((found - net(x)).abs().detach().squeeze() < 4.5 * (variance / DRAWS).sqrt()).all()
    assert (covariance.flatten() / variance - 1).abs().max() < 4.5 * math.sqrt(2 / DRAWS)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_for_classes_the_covariance_is_the_inverse_of_the_gauss_newton_matrix(structure: str) -> None:
    x, y = classification(80)
    x = x.double()
    net = trained(mlp().double(), x, y, steps=60)
    predictor = fit_laplace(net, loader(x, y, 30), structure=structure, prior_precision=PRIOR, samples=DRAWS)
    features = net[1](net[0](x)).detach()
    p = net(x).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    eye = torch.eye(3, dtype=torch.float64)
    weights = torch.einsum("nf,kl->nklf", features, eye).reshape(80, 3, -1)
    jacobian = torch.cat([weights, eye.expand(80, 3, 3)], 2)
    matrix = torch.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian)
    matrix = torch.diag(matrix.diagonal()) if structure == "diag" else matrix
    inverse = torch.linalg.inv(matrix + PRIOR * torch.eye(len(matrix), dtype=torch.float64))
    expected = jacobian @ inverse @ jacobian.mT
    found, covariance = moments(predictor, x)
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found - net(x)).detach().abs() < 5 * scale / math.sqrt(DRAWS)).all()
    # Entries of a sample covariance have standard errors of at most √(2/S) of the product of the two scales.
    assert ((covariance - expected).abs() < 5 * math.sqrt(2 / DRAWS) * scale[:, :, None] * scale[:, None, :]).all()


def test_kronecker_factors_are_exact_for_a_regression_without_bias() -> None:
    x, y = regression()
    net = nn.Linear(4, 2, bias=False).double()
    target = torch.cat([y, -y], 1)
    found = [
        moments(
            fit_laplace(
                net,
                loader(x, target, 17),
                structure=structure,
                likelihood=Gaussian(NOISE, learned=False),
                prior_precision=PRIOR,
                samples=DRAWS,
            ),
            x,
        )[1]
        for structure in ("kron", "full")
    ]
    inverse = torch.linalg.inv(x.T @ x / NOISE**2 + PRIOR * torch.eye(4, dtype=torch.float64))
    variance = (x @ inverse * x).sum(1)[:, None, None]
    for covariance in found:
        assert ((covariance / variance - torch.eye(2)).abs() < 5 * math.sqrt(2 / DRAWS)).all()


def test_the_marginal_likelihood_is_that_of_linear_regression() -> None:
    x, y = regression()
    net, _, _ = ridge(x, y, PRIOR)
    predictor = fit_laplace(net, loader(x, y, 60), structure="full", likelihood=Gaussian(NOISE, learned=False))
    design = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    mean = torch.cat([net.weight.detach().T, net.bias.detach()[None]])
    residual = float((y - design @ mean).square().sum())

    def evidence(precision: float) -> float:
        """log p(D | θ*) + log p(θ*) − ½ log |H + δ| up to constants."""
        matrix = design.T @ design / NOISE**2 + precision * torch.eye(5, dtype=torch.float64)
        quadratic = -residual / NOISE**2 / 2 - precision * float(mean.square().sum()) / 2
        return quadratic + 2.5 * math.log(precision) - float(torch.logdet(matrix)) / 2

    best = predictor.prior_precision
    assert evidence(best) > max(evidence(best * 1.02), evidence(best / 1.02))


def test_the_noise_of_a_regression_is_found() -> None:
    x, y = regression()
    net, _, _ = ridge(x, y, PRIOR)
    given = fit_laplace(net, loader(x, y), prior_precision=1.0)
    residual = float((y - net(x)).square().mean().sqrt().detach())
    assert isinstance(given.likelihood, Gaussian)
    assert float(given.likelihood.noise_std) == pytest.approx(residual, rel=1e-6)
    found = fit_laplace(net, loader(x, y), structure="full").likelihood
    assert isinstance(found, Gaussian)
    # The evidence knows that five weights were fitted.
    assert float(found.noise_std) == pytest.approx(residual * math.sqrt(COUNT / (COUNT - 5)), rel=0.02)


def test_a_scale_after_the_last_layer_counts() -> None:
    x, y = regression()
    torch.manual_seed(0)
    plain = models.mlp((4,), 1, hidden=5, depth=1).double()
    scaled = models.mlp((4,), 1, hidden=5, depth=1, target_mean=[2.0], target_std=[3.0]).double()
    scaled[1].load_state_dict(plain[1].state_dict())
    scaled[3].load_state_dict(plain[3].state_dict())
    common = {"structure": "full", "prior_precision": PRIOR, "samples": 50}
    one = fit_laplace(plain, loader(x, y), likelihood=Gaussian(NOISE, learned=False), **common)
    other = fit_laplace(scaled, loader(x, 3 * y + 2), likelihood=Gaussian(3 * NOISE, learned=False), **common)
    torch.testing.assert_close(other.outputs(x).outputs, 3 * one.outputs(x).outputs + 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subset", ["last-layer", "all"])
def test_same_seed_same_outputs_whatever_the_batching(subset: str) -> None:
    x, y = classification(90)
    net = trained(mlp(), x, y, steps=30)
    state = torch.get_rng_state()
    predictor = fit_laplace(net, loader(x, y), subset=subset, samples=5)
    again = fit_laplace(net, loader(x, y), subset=subset, samples=5)
    outputs = predictor.outputs(x).outputs
    assert torch.equal(torch.get_rng_state(), state)
    assert outputs.shape == (5, 90, 3)
    torch.testing.assert_close(again.outputs(x).outputs, outputs)
    torch.testing.assert_close(predictor.outputs(loader(x, y, 7, shuffle=False)).outputs, outputs)
    assert not torch.allclose(
        fit_laplace(net, loader(x, y), subset=subset, samples=5, seed=1).outputs(x).outputs, outputs
    )
    assert isinstance(predictor, Predictor)
    assert predictor.trainable_parameters == (39 if subset == "last-layer" else 6 * 12 + 12 + 39)
    # Kronecker factors: out², in², and out² again for the bias.
    sizes = 9 + 144 + 9 + (0 if subset == "last-layer" else 144 + 36 + 144)
    assert predictor.artifact_bytes == 4 * sizes


@pytest.mark.parametrize(("subset", "structure"), [("all", "kron"), ("all", "diag"), ("last-layer", "full")])
def test_the_users_network_stays_as_it_was(subset: str, structure: str) -> None:
    net = conv_net()
    net[1].train()
    net[3].weight.requires_grad_(False)
    x, y = torch.randn(24, 1, 8, 8), torch.randint(0, 3, (24,))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    wants = [parameter.requires_grad for parameter in net.parameters()]
    predictor = fit_laplace(net, loader(x, y), subset=subset, structure=structure, samples=3)
    probs = predictor.outputs(x).at().probs
    assert torch.allclose(probs.sum(1), torch.ones(24).to(probs))
    assert modes == [module.training for module in net.modules()]
    assert wants == [parameter.requires_grad for parameter in net.parameters()]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not hasattr(net, "output_size")


def test_a_tighter_prior_needs_no_new_pass() -> None:
    x, y = classification(60)
    net = trained(mlp(), x, y, steps=30)
    wide = fit_laplace(net, loader(x, y), prior_precision=1.0, samples=200)
    tight = wide.with_prior_precision(1e6)
    fitted = fit_laplace(net, loader(x, y), prior_precision=1e6, samples=200)
    torch.testing.assert_close(tight.outputs(x).outputs, fitted.outputs(x).outputs)
    assert wide.prior_precision == 1.0
    assert wide.outputs(x).outputs.std(0).mean() > 50 * tight.outputs(x).outputs.std(0).mean()


class Pair(nn.Module):
    """Two named inputs, as tokenisers give them; the outputs behind ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.first(a) + self.second(b)))}


@pytest.mark.parametrize("subset", ["last-layer", "all"])
def test_mappings_of_inputs(subset: str) -> None:
    torch.manual_seed(0)
    net = Pair()
    a, b, y = torch.randn(30, 3), torch.randn(30, 2), torch.randint(0, 3, (30,))
    batches = [{"a": a[i : i + 10], "b": b[i : i + 10], "y": y[i : i + 10]} for i in (0, 10, 20)]
    predictor = fit_laplace(net, batches, subset=subset, samples=400, reading=Reading(target_key="y"))
    mean, _ = moments(predictor, {"a": a, "b": b})
    assert torch.allclose(mean, net(a, b)["logits"], atol=0.5)
    torch.testing.assert_close(predictor.outputs(batches).outputs, predictor.outputs({"a": a, "b": b}).outputs)


def test_what_cannot_be_done_is_refused() -> None:
    x, y = classification(20)
    net = mlp()
    with pytest.raises(InputError, match=r"plain logits .* bernoulli"):
        fit_laplace(net, loader(x, torch.zeros(20, 3)), likelihood=Bernoulli())
    with pytest.raises(InputError, match="class_weights"):
        fit_laplace(net, loader(x, y), likelihood=Categorical(class_weights=[1.0, 2.0, 1.0]))
    with pytest.raises(InputError, match="no weights of examples"):
        fit_laplace(net, [(x, y, torch.ones(20))])
    with pytest.raises(InputError, match="prior_precision must be positive"):
        fit_laplace(net, loader(x, y), prior_precision=-1.0)
    with pytest.raises(InputError, match="structure must be"):
        fit_laplace(net, loader(x, y), structure="lowrank")
    with pytest.raises(InputError, match="subset must be"):
        fit_laplace(net, loader(x, y), subset="first-layer")
    with pytest.raises(InputError, match="empty"):
        fit_laplace(net, [])
    with pytest.raises(InputError, match="span"):
        fit_laplace(net, [(x, y), (x, y + 3)])
    with pytest.raises(LayerError, match="Kronecker factors are for"):
        fit_laplace(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten()), loader(x[:, None], y))
    with pytest.raises(InputError, match="too large"):
        fit_laplace(mlp(6, 2000), loader(x, y), subset="all", structure="full")
    predictor = fit_laplace(net, loader(x, y))
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(ModelChangedError):
        predictor.outputs(x)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    x, y = classification(20)
    with pytest.raises(InputError, match=r"torchvision.*pip install --no-deps laplace-torch"):
        fit_laplace(mlp(), loader(x, y))
