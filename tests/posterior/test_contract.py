"""The contract suite: every family of the library keeps it, and families that are broken on purpose are caught."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stfbnn.errors import InputError
from stfbnn.posterior import (
    Filterwise,
    Full,
    LowRank,
    MeanField,
    MeanFieldPosterior,
    Mixture,
    MixturePosterior,
    ParameterLayout,
    PointMass,
    Posterior,
    PosteriorFamily,
    SampledPosterior,
    Samples,
)
from stfbnn.prior import GaussianPrior
from stfbnn.testing import CLAUSES, Clause, ContractError, Setting, check_family

EMBEDDING = ParameterLayout(("weight",), ((5, 2),))
WITHOUT_DENSITY = {
    "kl is a scalar",
    "kl differs between priors as it must",
    "kl is that of draws",
    "kl gradients are slopes",
    "kl falls towards the prior",
    "density has the right shape",
    "density is that of draws",
}


def apart(posterior: Posterior) -> None:
    """Move the components of a mixture apart, in mean and width, with unequal weights."""
    assert isinstance(posterior, MixturePosterior)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for component in posterior.components:
            for parameter in component.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    posterior.set_weights(torch.tensor([0.7, 0.3], dtype=torch.float64))


def scattered(posterior: Posterior) -> None:
    assert isinstance(posterior, SampledPosterior)
    random = torch.Generator().manual_seed(0)
    posterior.samples.add_(torch.randn(posterior.samples.shape, generator=random, dtype=torch.float64))


@pytest.mark.parametrize(
    ("family", "layout", "prepare", "skipped"),
    [
        (MeanField(), None, None, set()),
        (LowRank(), None, None, set()),
        (LowRank(rank=1), EMBEDDING, None, set()),
        (Filterwise(), None, None, set()),
        (Filterwise(), EMBEDDING, None, set()),
        (Full(), None, None, set()),
        (PointMass(), EMBEDDING, None, WITHOUT_DENSITY | {"set std sets or does nothing"}),
        (
            Samples(count=7),
            EMBEDDING,
            scattered,
            WITHOUT_DENSITY
            | {"set std sets or does nothing", "draws reach every parameter", "draw gradients are slopes"},
        ),
        (Mixture(components=2), EMBEDDING, apart, set()),
        (Mixture(components=2, family="filterwise"), EMBEDDING, apart, set()),
    ],
    ids=lambda value: value.name if isinstance(value, PosteriorFamily) else "",
)
def test_every_family_keeps_the_contract(
    family: PosteriorFamily, layout: ParameterLayout | None, prepare: Any, skipped: set[str]
) -> None:
    report = check_family(family, layout, prepare=prepare)
    assert report.family == family.name
    assert set(report.not_applicable) == skipped
    assert set(report.held) == {clause.name for clause in CLAUSES} - skipped


@pytest.mark.parametrize("clause", CLAUSES, ids=str)
def test_clauses_run_one_by_one(clause: Clause) -> None:
    assert clause.check(Setting(MeanField(), draws=1000)) is None
    assert clause.statement


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_right_family_passes_for_other_seeds(seed: int) -> None:
    check_family(LowRank(rank=2), EMBEDDING, seed=seed, draws=20_000)


class DoubleExponentialPosterior(Posterior):
    """A family of a user's own that is not Gaussian: independent Laplace distributions."""

    family = "double-exponential"

    def __init__(self, layout: ParameterLayout, mean: Tensor, std: Tensor) -> None:
        super().__init__(layout)
        self.center = nn.Parameter(mean.clone())
        self.log_scale = nn.Parameter((std / math.sqrt(2)).log().expand_as(mean).clone())

    @property
    def noise_size(self) -> int:
        return self.layout.size

    def draw(self, noise: Tensor) -> Tensor:
        # −log(2 Φ(−|ε|)) is exponentially distributed.
        size = -(math.log(2) + torch.special.log_ndtr(-noise.abs()))
        return self.center + self.log_scale.exp() * noise.sign() * size

    def mean_vector(self) -> Tensor:
        return self.center

    def std_vector(self) -> Tensor:
        return math.sqrt(2) * self.log_scale.exp()

    def log_prob(self, weights: Tensor) -> Tensor:
        off = (weights - self.center).abs() * (-self.log_scale).exp()
        return -(off + self.log_scale + math.log(2)).sum(dim=-1)

    def kl(self, prior: GaussianPrior) -> Tensor:
        second_moment = self.std_vector().square() + (self.center - prior.mean).square()
        cross = prior.std.log() + 0.5 * math.log(2 * math.pi) + 0.5 * second_moment / prior.std.square()
        return (cross - 1 - math.log(2) - self.log_scale).sum()

    def config(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class DoubleExponential:
    @property
    def name(self) -> str:
        return DoubleExponentialPosterior.family

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
        return DoubleExponentialPosterior(layout, mean, 0.2 * prior.std)


def test_a_right_family_that_is_not_gaussian_passes() -> None:
    report = check_family(DoubleExponential())
    assert set(report.not_applicable) == {"set std sets or does nothing", "covariance is that of draws"}


def broken(**methods: Any) -> PosteriorFamily:
    """A mean-field family with some methods of its posterior, or of its recipe, replaced."""
    recipe_methods = {name: methods.pop(name) for name in ("name", "build", "__repr__") if name in methods}
    posterior = type("BrokenPosterior", (MeanFieldPosterior,), methods)

    def build(self: Any, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
        return posterior(layout, mean, (0.3 * prior.std).to(mean))

    return type("BrokenRecipe", (MeanField,), {"build": build, **recipe_methods})()


Q = MeanFieldPosterior


def kl_without_logarithm(self: Q, prior: GaussianPrior) -> Tensor:
    ratio = (self.std_vector() / prior.std).square()
    return 0.5 * (ratio + ((self.loc - prior.mean) / prior.std).square()).sum()


def kl_without_square(self: Q, prior: GaussianPrior) -> Tensor:
    ratio = self.std_vector() / prior.std
    return 0.5 * (ratio + ((self.loc - prior.mean) / prior.std).square() - 1 - 2 * ratio.log()).sum()


def kl_without_gradient_by_width(self: Q, prior: GaussianPrior) -> Tensor:
    log_std = self.log_std.detach() - prior.std.log()
    return 0.5 * ((2 * log_std).exp() + ((self.loc - prior.mean) / prior.std).square() - 1 - 2 * log_std).sum()


def undefined_by_the_wrong_error(self: Q, prior: GaussianPrior) -> Tensor:
    raise NotImplementedError("no kl")


def correlated_draw(self: Q, noise: Tensor) -> Tensor:
    mixed = math.cos(0.1) * noise + math.sin(0.1) * noise.roll(1, dims=-1)
    return Q.draw(self, mixed)


def draw_of_another_batch(self: Q, noise: Tensor) -> Tensor:
    return Q.draw(self, noise.flatten().reshape(noise.shape[-1], -1).T.reshape(noise.shape))


def log_prob_of_a_wider_one(self: Q, weights: Tensor) -> Tensor:
    std = 1.05 * self.std_vector()
    return torch.distributions.Normal(self.loc, std).log_prob(weights).sum(dim=-1)


def forgetful_tensors(self: Q) -> dict[str, Tensor]:
    return {name: value for name, value in Posterior.tensors(self).items() if not name.startswith("log_std")}


def load_what_is_there(self: Q, tensors: Any) -> None:
    self.loc.data.copy_(self.layout.flatten({name: tensors[f"loc.{name}"] for name in self.layout.names}))


def load_then_check(self: Q, tensors: Any) -> None:
    with torch.no_grad():
        self.loc.zero_()
    Posterior.load_tensors(self, tensors)


def set_twice_the_std(self: Q, std: Tensor) -> None:
    Q.set_std(self, 2 * std)


def set_std_and_move(self: Q, std: Tensor) -> None:
    Q.set_std(self, std)
    with torch.no_grad():
        self.loc.add_(1)


def build_that_keeps_the_mean(self: Any, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
    posterior = Q(layout, mean, 0.3 * prior.std)
    posterior.loc = nn.Parameter(mean)
    return posterior


def build_off_the_mean(self: Any, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
    return Q(layout, mean + 1e-3, 0.3 * prior.std)


def random_build(self: Any, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
    return Q(layout, mean, (0.1 + torch.rand(()).to(mean)) * prior.std)


def single_precision_build(self: Any, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> Posterior:
    return Q(layout, mean.double(), 0.3 * prior.std.double())


BROKEN: dict[str, tuple[Callable[[], PosteriorFamily], set[str]]] = {
    "kl twice": (
        lambda: broken(kl=lambda q, p: 2 * Q.kl(q, p)),
        {"kl differs between priors as it must", "kl is that of draws"},
    ),
    "kl averaged": (
        lambda: broken(kl=lambda q, p: Q.kl(q, p) / q.layout.size),
        {"kl differs between priors as it must", "kl is that of draws"},
    ),
    "kl for each weight": (
        lambda: broken(kl=lambda q, p: Q.kl(q, p).expand(q.layout.size) / q.layout.size),
        {"kl is a scalar"},
    ),
    "kl without its logarithm": (lambda: broken(kl=kl_without_logarithm), {"kl is that of draws"}),
    "kl off by 0.05 nats": (lambda: broken(kl=lambda q, p: Q.kl(q, p) + 0.05), {"kl is that of draws"}),
    "kl with σ for σ²": (
        lambda: broken(kl=kl_without_square),
        {"kl differs between priors as it must", "kl is that of draws"},
    ),
    "kl negative": (lambda: broken(kl=lambda q, p: -Q.kl(q, p)), {"kl is a scalar", "kl falls towards the prior"}),
    "kl detached": (lambda: broken(kl=lambda q, p: Q.kl(q, p).detach()), {"kl gradients are slopes"}),
    "kl detached in σ": (lambda: broken(kl=kl_without_gradient_by_width), {"kl gradients are slopes"}),
    "kl not implemented": (lambda: broken(kl=undefined_by_the_wrong_error), {"kl is a scalar"}),
    "draw detached": (
        lambda: broken(draw=lambda q, e: Q.draw(q, e).detach()),
        {"draws reach every parameter", "draw gradients are slopes"},
    ),
    "draw detached in σ": (
        lambda: broken(draw=lambda q, e: q.loc + q.std_vector().detach() * e),
        {"draws reach every parameter", "draw gradients are slopes"},
    ),
    "draw with a wrong gradient": (
        lambda: broken(draw=lambda q, e: Q.draw(q, e) + q.log_std - q.log_std.detach()),
        {"draw gradients are slopes"},
    ),
    "draw 5 % too wide": (
        lambda: broken(draw=lambda q, e: Q.draw(q, 1.05 * e)),
        {"std is that of draws", "density is that of draws", "kl is that of draws"},
    ),
    "draw off the mean": (
        lambda: broken(draw=lambda q, e: Q.draw(q, e + 0.06)),
        {"mean is that of draws", "density is that of draws"},
    ),
    "draw correlated": (lambda: broken(draw=correlated_draw), {"covariance is that of draws"}),
    "draw from another's noise": (lambda: broken(draw=draw_of_another_batch), {"stacked draws are draws"}),
    "draw of one shape": (
        lambda: broken(draw=lambda q, e: Q.draw(q, e).reshape(-1, q.layout.size)),
        {"draws have the right shape"},
    ),
    "draw with noise of its own": (
        lambda: broken(draw=lambda q, e: Q.draw(q, torch.randn_like(e))),
        {"draws follow from the noise"},
    ),
    "draw in single precision": (
        lambda: broken(draw=lambda q, e: Q.draw(q, e).float()),
        {"dtype follows the mean"},
    ),
    "noise size a float": (
        lambda: broken(noise_size=property(lambda q: float(q.layout.size))),
        {"noise size is a count"},
    ),
    "std 5 % off": (lambda: broken(std_vector=lambda q: 1.05 * Q.std_vector(q)), {"std is that of draws"}),
    "std squared": (lambda: broken(std_vector=lambda q: Q.std_vector(q).square()), {"std is that of draws"}),
    "mean 6 % of σ off": (
        lambda: broken(mean_vector=lambda q: q.loc + 0.06 * q.std_vector()),
        {"mean is that of draws", "starts at the trained weights"},
    ),
    "covariance of σ": (
        lambda: broken(covariance=lambda q: torch.diag(q.std_vector())),
        {"covariance is that of draws"},
    ),
    "covariance between weights": (
        lambda: broken(covariance=lambda q: Q.covariance(q) + 5e-3 * (1 - torch.eye(q.layout.size))),
        {"covariance is that of draws"},
    ),
    "density 5 % off": (
        lambda: broken(log_prob=lambda q, w: Q.log_prob(q, w) + 0.05),
        {"density is that of draws", "kl is that of draws"},
    ),
    "density of a wider one": (lambda: broken(log_prob=log_prob_of_a_wider_one), {"density is that of draws"}),
    "density of a stack": (
        lambda: broken(log_prob=lambda q, w: Q.log_prob(q, w).sum()),
        {"density has the right shape"},
    ),
    "tensors incomplete": (lambda: broken(tensors=forgetful_tensors), {"tensors and config rebuild"}),
    "tensors shared": (
        lambda: broken(tensors=lambda q: {f"loc.{k}": v for k, v in q.layout.unflatten(q.loc.detach()).items()}),
        {"tensors are copies"},
    ),
    "tensors unchecked": (
        lambda: broken(load_tensors=load_what_is_there),
        {"foreign tensors are refused", "tensors and config rebuild"},
    ),
    "tensors checked too late": (lambda: broken(load_tensors=load_then_check), {"foreign tensors are refused"}),
    "config not JSON": (lambda: broken(config=lambda q: {"initial_std": math.inf}), {"config is json"}),
    "config with a tuple": (lambda: broken(config=lambda q: {"initial_std": (1, 2)}), {"config is json"}),
    "config unknown": (lambda: broken(config=lambda q: {"rank": 3}), {"tensors and config rebuild"}),
    "set_std twice": (lambda: broken(set_std=set_twice_the_std), {"set std sets or does nothing"}),
    "set_std moves": (lambda: broken(set_std=set_std_and_move), {"set std sets or does nothing"}),
    "views not copies": (
        lambda: broken(mean=lambda q: q.layout.unflatten(q.loc.detach())),
        {"named views are copies"},
    ),
    "another name": (lambda: broken(name="median-field"), {"recipe builds"}),
    "the mean kept": (lambda: broken(build=build_that_keeps_the_mean), {"build takes copies"}),
    "the mean moved": (lambda: broken(build=build_off_the_mean), {"starts at the trained weights"}),
    "a random build": (lambda: broken(build=random_build), {"build is repeatable"}),
    "a build in one precision": (lambda: broken(build=single_precision_build), {"dtype follows the mean"}),
    "an address in the repr": (lambda: broken(__repr__=object.__repr__), {"recipe prints alike"}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_families_are_caught(case: str) -> None:
    make, expected = BROKEN[case]
    setting = Setting(make())
    for clause in CLAUSES:
        if clause.name in expected:
            with pytest.raises(ContractError, match=clause.name):
                clause.check(setting)


def test_what_the_broken_families_are_made_of_is_right() -> None:
    check_family(broken())


def test_all_broken_clauses_are_listed_with_what_was_found() -> None:
    with pytest.raises(ContractError) as caught:
        check_family(BROKEN["kl twice"][0](), draws=20_000)
    message = str(caught.value)
    assert "breaks 2 of" in message
    assert "between two priors kl changes by" in message
    assert "Expected: kl = E_q[log q − log p]" in message


def test_too_few_draws_and_unknown_families_are_refused() -> None:
    with pytest.raises(InputError, match="1000"):
        check_family("mean-field", draws=10)
    with pytest.raises(InputError, match="horseshoe"):
        check_family("horseshoe")
