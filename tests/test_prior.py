"""Priors: their scales, their centre, and empirical Bayes against numerical and closed-form optima."""

import json
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from torch import Tensor, nn

from core_models import classification, loader, mlp, trained
from stfbnn.artifact import load, save
from stfbnn.artifact_files import signed
from stfbnn.conversion import bayesianize
from stfbnn.errors import ArtifactError, InputError
from stfbnn.inference.fit import fit
from stfbnn.posterior import Filterwise, Full, LowRank, MeanField, ParameterLayout, Posterior, PosteriorFamily
from stfbnn.posterior.mean_field import MeanFieldPosterior
from stfbnn.prior import GaussianPrior, Normal, resolve_prior

WEIGHTS = torch.tensor([3.0, -4.0, 0.0, 0.0])
LAYOUT = ParameterLayout(("weight", "bias"), ((2, 1), (2,)))
WIDE = ParameterLayout(("weight", "bias"), ((10, 4), (10,)))


def built(prior: object, weights: Tensor = WEIGHTS, layout: ParameterLayout = LAYOUT) -> GaussianPrior:
    return resolve_prior(prior).build(weights, layout)  # type: ignore[arg-type]


def test_names() -> None:
    rms = built("rms")
    assert float(rms.std) == 2.5
    assert torch.equal(rms.mean, torch.zeros(4))
    pretrained = built("pretrained")
    assert torch.equal(pretrained.mean, WEIGHTS)
    assert float(pretrained.std) == 2.5
    assert float(built(0.3).std) == pytest.approx(0.3)
    assert built("empirical-bayes").learned


def test_a_scale_for_each_parameter() -> None:
    weights = torch.tensor([3.0, -4.0, 1.0, 1.0])
    prior = built("rms-per-parameter", weights)
    torch.testing.assert_close(prior.scales, torch.tensor([12.5**0.5, 1.0]))
    torch.testing.assert_close(prior.std, torch.tensor([12.5**0.5, 12.5**0.5, 1.0, 1.0]))
    # In the order of the layer, not of the mapping.
    torch.testing.assert_close(built({"bias": 2, "weight": 0.5}).std, torch.tensor([0.5, 0.5, 2.0, 2.0]))
    named = built(Normal({"weight": 0.5, "bias": 2.0}, "pretrained"), weights)
    torch.testing.assert_close(named.scales, torch.tensor([0.5, 2.0]))
    assert torch.equal(named.mean, weights)


@pytest.mark.parametrize("std", [0.5, {"weight": 0.5, "bias": 2.0}])
def test_the_log_density_is_that_of_scipy(std: object) -> None:
    prior = built(Normal(std, "pretrained"))  # type: ignore[arg-type]
    points = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = norm.logpdf(points.numpy(), prior.mean.numpy(), prior.std.numpy()).sum(axis=1)
    torch.testing.assert_close(prior.log_prob(points).double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [MeanField(), LowRank(3), Filterwise(), Full()], ids=lambda family: family.name)
@pytest.mark.parametrize("std", [1.0, {"weight": 0.3, "bias": 2.0}])
def test_empirical_bayes_maximises_the_evidence_bound(family: PosteriorFamily, std: object) -> None:
    torch.manual_seed(0)
    mean = torch.randn(WIDE.size).double() * torch.cat([torch.full((40,), 3.0), torch.ones(10)]).double()
    prior = built(Normal(std, learned=True), mean, WIDE)  # type: ignore[arg-type]
    q = family.build(WIDE, mean, prior)
    for parameter in q.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape).double()
    best = minimised_kl(q, prior)
    prior.update(q.mean_vector().detach(), q.std_vector().detach())
    torch.testing.assert_close(prior.scales.log(), best, rtol=0, atol=1e-6)


def minimised_kl(q: Posterior, prior: GaussianPrior) -> Tensor:
    """The log scales at which KL(q‖p) is least, by a numerical search: only the KL term of the bound depends on them."""
    twin = GaussianPrior(prior.mean, prior.scales if prior.groups else prior.std, groups=prior.groups)

    def kl(log_scales: Tensor) -> float:
        twin.set_scales(torch.as_tensor(log_scales).exp())
        return float(q.kl(twin).detach())

    options = {"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
    found = minimize(kl, prior.scales.log().numpy(), method="Nelder-Mead", options=options)
    return torch.as_tensor(found.x)


def test_empirical_bayes_of_a_linear_regression_is_expectation_maximisation() -> None:
    """With the exact posterior as q, the update's fixed point maximises the evidence, which has a closed form."""
    torch.manual_seed(1)
    features, noise, scale = 6, 0.5, 1.7
    x = torch.randn(40, features).double()
    y = x @ (scale * torch.randn(features).double()) + noise * torch.randn(40).double()
    prior = built(
        Normal(0.3, learned=True), torch.zeros(features).double(), ParameterLayout(("weight",), ((features,),))
    )
    gram = x.T @ x / noise**2
    for _ in range(200):
        covariance = torch.linalg.inv(gram + torch.eye(features) / prior.std**2)
        prior.update(covariance @ (x.T @ y) / noise**2, covariance.diagonal().sqrt())

    def negative_evidence(log_scale: Tensor) -> float:
        marginal = noise**2 * torch.eye(40).double() + float(torch.as_tensor(log_scale[0]).exp()) ** 2 * (x @ x.T)
        return -float(torch.distributions.MultivariateNormal(torch.zeros(40).double(), marginal).log_prob(y))

    best = minimize(negative_evidence, [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x[0]
    assert float(prior.std.log()) == pytest.approx(best, abs=1e-6)


def test_fit_learns_a_scale_for_each_parameter() -> None:
    x, y = classification(100)
    bnn = bayesianize(trained(mlp(), x, y), x[:2], prior=Normal({"weight": 0.2, "bias": 5.0}, learned=True))
    # This engine leaves q as it was when the prior has moved.
    fit(bnn, loader(x, y), epochs=6, temperature=1.0, engine="bayes-by-backprop")
    q = bnn.posterior
    square = q.mean_vector().detach().square() + q.std_vector().detach().square()
    expected = [float(part.mean().sqrt()) for part in bnn.layout.unflatten(square).values()]
    assert bnn.prior.scales.tolist() == pytest.approx(expected, rel=1e-4)
    assert bnn.prior.scales.tolist() != pytest.approx([0.2, 5.0], rel=0.1)


@pytest.mark.parametrize(
    ("family", "engine"),
    [(family, "natural-gradient") for family in ("mean-field", "filterwise", "full")]
    + [(family, "bayes-by-backprop") for family in ("mean-field", "low-rank", "filterwise", "full")],
)
def test_one_scale_said_twice_is_one_scale(family: str, engine: str) -> None:
    """With equal scales, the two forms of the prior lead every engine and family to the same posterior."""
    x, y = classification(60)
    net = trained(mlp(hidden=5), x, y, 50)
    found = []
    for prior in (0.4, {"weight": 0.4, "bias": 0.4}):
        bnn = bayesianize(net, x[:2], prior=prior, posterior=family)
        fit(bnn, loader(x, y), epochs=2, temperature=1.0, engine=engine)
        found.append((bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_scales_of_their_own_reach_the_kl() -> None:
    q = MeanFieldPosterior(LAYOUT, WEIGHTS, torch.tensor([0.1, 0.2, 0.3, 0.4])).double()
    prior = built({"weight": 0.5, "bias": 2.0}, WEIGHTS.double())
    mine = torch.distributions.Normal(q.loc, q.std_vector())
    other = torch.distributions.Normal(torch.zeros(4), torch.tensor([0.5, 0.5, 2.0, 2.0]))
    torch.testing.assert_close(q.kl(prior), torch.distributions.kl_divergence(mine, other).sum())


def test_a_file_keeps_every_scale(tmp_path: Path) -> None:
    x, y = classification(40)
    net = trained(mlp(), x, y, 20)
    bnn = bayesianize(net, x[:2], prior=Normal({"weight": 0.2, "bias": 5.0}, learned=True))
    fit(bnn, loader(x, y), epochs=1, temperature=1.0)
    folder = save(bnn, tmp_path / "posterior")
    again = load(folder, net)
    assert torch.equal(again.prior.std, bnn.prior.std)
    assert again.prior_recipe == bnn.prior_recipe
    assert json.loads((folder / "config.json").read_text())["prior"]["std"] == bnn.prior.scales.tolist()
    assert f"{float(bnn.prior.scales[1]):.4g} (bias), learned" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": 1.0}, "type list"),
        ({"std": [1.0]}, "1 numbers.*2 parameters"),
        ({"std": [1.0, 0.0]}, "list of positive"),
        ({"std": [1.0, True]}, "list of positive"),
        ({"recipe": {"std": {"weight": 1.0}, "center": "zero", "learned": False}}, r"scales for \['weight'\]"),
    ],
)
def test_scales_in_a_file_that_do_not_fit_the_layer_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    x, y = classification(40)
    net = trained(mlp(), x, y, 20)
    bnn = bayesianize(net, x[:2], prior={"weight": 0.2, "bias": 5.0})
    fit(bnn, loader(x, y), epochs=1, temperature=1.0)
    folder = save(bnn, tmp_path / "posterior")
    entries = json.loads((folder / "config.json").read_text())
    entries["prior"].update(change)
    del entries["checksum"]
    (folder / "config.json").write_bytes(signed(entries))
    with pytest.raises(ArtifactError, match=message):
        load(folder, net)


def test_a_learned_scale_around_the_trained_weights_is_refused() -> None:
    with pytest.raises(InputError, match="collapses"):
        Normal(center="pretrained", learned=True)


def test_zero_weights_give_no_scale() -> None:
    with pytest.raises(InputError, match="all zero"):
        built("rms", torch.zeros(4))
    with pytest.raises(InputError, match="'bias' are all zero"):
        built("rms-per-parameter")


@pytest.mark.parametrize(
    ("std", "message"),
    [
        ({"weight": 0.1}, r"missing \['bias'\], unknown \[\]"),
        ({"weight": 0.1, "bias": 1.0, "gain": 1.0}, r"\['weight', 'bias'\].*unknown \['gain'\]"),
        ({"0.weight": 0.1, "bias": 1.0}, r"missing \['weight'\], unknown \['0.weight'\]"),
    ],
)
def test_scales_must_be_named_as_the_layer_names_its_parameters(std: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bayesianize(mlp(), torch.randn(2, 6), prior=std)


@pytest.mark.parametrize(
    "bad",
    [0, -0.1, float("nan"), float("inf"), True, "wide", None, [1.0], {}, {"weight": 0.0}, {"weight": "rms"}, nn.ReLU()],
)
def test_bad_priors_are_refused(bad: object) -> None:
    with pytest.raises(InputError):
        resolve_prior(bad)  # type: ignore[arg-type]


def test_a_recipe_keeps_its_own_scales() -> None:
    scales = {"weight": 1.0, "bias": 2.0}
    recipe = Normal(scales)
    scales["weight"] = -1.0
    assert recipe.std == {"weight": 1.0, "bias": 2.0}
    assert Normal(**recipe.config()) == recipe


def test_a_bad_centre_is_refused() -> None:
    with pytest.raises(InputError, match="center"):
        Normal(center="somewhere")  # type: ignore[arg-type]
