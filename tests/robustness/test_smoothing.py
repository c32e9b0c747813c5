"""Certified radii of networks: right where the answer is known, never wrong under attack, refused where no theorem holds."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from attacked import small_net, unseen
from rich.console import Console
from scipy.stats import beta, norm
from torch import Tensor, nn

import stfbnn
from stfbnn import BayesianNetwork, Categorical, Gaussian
from stfbnn.baselines import MCDropout
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.errors import InputError, NotFittedError
from stfbnn.robustness.smoothing import CertifiedRadii, certified_radius
from stfbnn.threat import InputSpace


def ready(model: nn.Module, example: Tensor, std: float = 0.1, **options: object) -> BayesianNetwork:
    """With the initial posterior, of one width."""
    bnn = stfbnn.bayesianize(model.eval(), example, posterior=stfbnn.MeanField(initial_std=std), **options)
    bnn.likelihood = Categorical()
    return bnn


class Threshold(nn.Module):
    """Label 0 where the one output of the layer is positive."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.layer = nn.Linear(len(weight), 1)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.layer.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.cat([h, torch.zeros_like(h)], dim=1)


def net(seed: int, inputs: int = 4, hidden: int = 8, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    found = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    with torch.no_grad():
        found[0].weight.mul_(4)
        found[2].weight.mul_(4)
    return found


def points(count: int, inputs: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, inputs, generator=torch.Generator().manual_seed(seed))


def test_certificates_of_a_threshold_are_wrong_no_more_often_than_alpha():
    weight, x = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[0.9, 0.3, 0.2]])
    bnn = ready(Threshold(weight, 0.0), x, std=0.3)
    mean, spread = float(x @ weight), 0.3 * math.sqrt(float(x.square().sum()) + 1)
    probability, distance = norm.cdf(mean / spread), abs(mean) / float(weight.norm())
    found = certified_radius(bnn, x.repeat(200, 1), alpha=0.1, select=30, draws=100, progress=False)
    assert (found.label == 0).all()
    wrong = found.lower > probability
    # Clopper and Pearson keep α, but do not waste it: the upper limit is at 5 standard errors.
    assert 0.01 < float(wrong.double().mean()) < 0.1 + 5 * math.sqrt(0.09 / 200)
    # Where the probability is not overestimated, the label stays up to the boundary of the two classes.
    assert float(found.radius[~wrong].max()) <= distance
    assert float(found.radius.median()) > 0


def test_lower_limits_are_those_of_clopper_and_pearson():
    bnn = ready(net(0), points(2), std=0.5)
    found = certified_radius(bnn, points(20), draws=200, alpha=0.01, progress=False)
    possible = {round(float(beta.ppf(0.01, k, 200 - k + 1)), 9) for k in range(1, 201)} | {0.0}
    assert all(round(float(one), 9) in possible for one in found.lower)
    assert torch.equal(found.abstained, found.lower <= 0.5)
    assert (found.radius[found.abstained] == 0).all()
    assert found.abstained.any()
    assert (found.radius > 0).any()


def test_draws_at_the_layers_output_have_the_law_of_draws_of_weights():
    bnn, x = ready(net(1), points(2), std=0.4), points(5)
    found = certified_radius(bnn, x, draws=20_000, alpha=0.5, progress=False)
    with torch.no_grad():
        votes = torch.stack(
            [bnn.outputs(bnn.posterior.draw(torch.randn(bnn.posterior.noise_size)), x).argmax(1) for _ in range(2000)]
        )
    share = (votes == found.label).double().mean(dim=0)
    # At α = ½ the limit is the share itself, but for rounding.
    torch.testing.assert_close(found.lower, share, atol=4 * 0.5 / math.sqrt(2000), rtol=0)


def votes_after(bnn: BayesianNetwork, x: Tensor, count: int) -> Tensor:
    """Counts of labels of independent draws of the weights, (K,)."""
    parts = bnn.layout.unflatten(bnn.posterior.draw(torch.randn(count, bnn.posterior.noise_size)))
    trunk = bnn.network[1:]  # type: ignore[index]
    h = torch.einsum("shd,d->sh", parts["weight"], x) + parts["bias"]
    return torch.bincount(trunk(h).argmax(dim=1), minlength=3)


def attacked(bnn: BayesianNetwork, x: Tensor, label: int, radius: float) -> Tensor:
    """Gradient descent on a smooth form of the label's probability over draws, within the ball."""
    parts = bnn.layout.unflatten(bnn.posterior.draw(torch.randn(2000, bnn.posterior.noise_size)).detach())
    trunk = bnn.network[1:]  # type: ignore[index]
    delta = torch.zeros_like(x)
    for _ in range(30):
        delta.requires_grad_()
        outputs = trunk(torch.einsum("shd,d->sh", parts["weight"], x + delta) + parts["bias"])
        others = outputs.masked_fill(nn.functional.one_hot(torch.tensor(label), 3).bool(), -math.inf).amax(dim=1)
        (slope,) = torch.autograd.grad(torch.sigmoid(4 * (outputs[:, label] - others)).mean(), delta)
        delta = delta.detach() - 0.3 * radius * slope / slope.norm()
        delta = delta * min(1.0, 0.999 * radius / float(delta.norm()))
    return x + delta


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_no_attack_within_the_radius_changes_the_vote(seed):
    torch.manual_seed(seed)
    bnn = ready(net(seed), points(2), std=0.1 + 0.05 * seed)
    x = points(3, seed=seed)
    found = certified_radius(bnn, x, draws=5000, seed=seed, progress=False)
    assert (found.radius > 0.01).any()
    for one, label, radius in zip(x, found.label.tolist(), found.radius.tolist(), strict=True):
        if radius > 0:
            with torch.enable_grad():
                changed = attacked(bnn, one, label, radius)
            assert float((changed - one).norm()) < radius
            assert int(votes_after(bnn, changed, 100_000).argmax()) == label


def test_a_normalisation_is_part_of_the_space():
    x = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    plain = nn.Sequential(nn.Flatten(), *net(0, inputs=6))
    wide = InputSpace(mean=(0.4, 0.1), std=(0.5, 0.25))
    narrow = InputSpace(mean=(0.4, 0.1), std=(1.0, 1.0))
    scaled = nn.Sequential(nn.Flatten(), *net(0, inputs=6))
    scale = torch.tensor([2.0, 2.0, 2.0, 4.0, 4.0, 4.0])
    with torch.no_grad():
        scaled[1].weight.mul_(scale)
    one, other = ready(plain, x[:2]), ready(scaled, x[:2])
    with torch.no_grad():
        other.posterior.log_std[: 8 * 6] += scale.log().repeat(8)
    first = certified_radius(one, x, space=wide, draws=300, alpha=0.01, progress=False)
    second = certified_radius(other, x, space=narrow, draws=300, alpha=0.01, progress=False)
    assert (first.radius > 0).any()
    torch.testing.assert_close(first.lower, second.lower)
    torch.testing.assert_close(first.radius, second.radius, rtol=1e-4, atol=1e-7)


def test_a_batch_norm_after_the_layer_changes_nothing_whether_it_is_folded_or_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(4)
        # Of one sign, so that one noise gives one output.
        model[1].weight.copy_(0.1 + 2 * torch.rand(8))
        model[1].bias.copy_(torch.randn(8))
    model(2 * torch.randn(50, 4))
    both = [ready(model, points(2), fold_batch_norm=folding) for folding in (True, False)]
    assert both[0].folding.first_layer_affine is not None
    first, second = (certified_radius(bnn, points(5), draws=300, alpha=0.01, progress=False) for bnn in both)
    assert (first.radius > 0).any()
    torch.testing.assert_close(first.radius, second.radius, rtol=1e-3, atol=1e-6)


def test_a_layer_without_a_bias_and_a_predictor_around_the_network_are_covered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    bnn = ready(model, points(2), std=0.6)
    found = certified_radius(BayesianPredictor(bnn), points(3), draws=200, alpha=0.01, progress=False)
    again = certified_radius(bnn, points(3), draws=200, alpha=0.01, progress=False)
    assert torch.equal(found.radius, again.radius)
    assert (found.radius > 0).any()
    other = certified_radius(bnn, points(3), draws=200, alpha=0.01, seed=1, progress=False)
    assert not torch.equal(found.lower, other.lower)


def test_more_draws_certify_more():
    bnn = ready(net(2), points(2), std=0.05)
    few, many = (certified_radius(bnn, points(4), draws=count, progress=False).radius for count in (50, 5000))
    assert (many >= few).all()
    assert (many > few).any()


def made(**changes: object) -> CertifiedRadii:
    fields = {
        "radius": torch.tensor([0.0, 0.25, 0.75, 0.0]).double(),
        "label": torch.tensor([0, 1, 2, 1]),
        "abstained": torch.tensor([True, False, False, False]),
        "lower": torch.tensor([0.4, 0.9, 0.99, 0.6]).double(),
        "targets": torch.tensor([0, 1, 1, 1]),
        "alpha": 0.001,
        "select": 10,
        "draws": 100,
    }
    return CertifiedRadii(**(fields | changes))


def test_shares_count_what_is_certified_and_right():
    assert [made().share(epsilon).value for epsilon in (0, 0.1, 0.25, 0.5)] == [0.5, 0.25, 0, 0]
    shares = [made(targets=None).share(epsilon).value for epsilon in (0, 0.1, 0.25, 0.5, 0.75)]
    assert shares == [0.75, 0.5, 0.25, 0.25, 0]
    assert made().certified(0.1).tolist() == [False, True, False, False]


def test_results_are_shown_and_kept():
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(made().table((0.1,)))
    console.print(made(targets=None).table())
    text = console.export_text()
    assert "Certified accuracy" in text
    assert "25.0 %" in text
    assert "Examples with a certificate" in text
    kept = json.loads(json.dumps(made().as_dict()))
    assert kept["shares"][0] == {"epsilon": 0.0, **vars(made().share(0.0))}
    assert "1 got no certificate" in made().verdict()
    assert "median l2 radius is 0.25" in made().verdict()
    assert "4 got no certificate" in made(abstained=torch.ones(4, dtype=torch.bool)).verdict()


class Ahead(nn.Module):
    """What comes before the layer, or past it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.last = how, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        given = x.clamp(0.2, 0.8) if self.how == "before" else x
        h = self.layer(given)
        if self.how == "again":
            h = h + self.layer(h[:, :4])
        outputs = self.last(torch.tanh(h))
        if self.how == "past":
            outputs = outputs + x[:, :3]
        if self.how == "past, without a gradient":
            outputs = outputs + x[:, :3].detach().round()
        if self.how == "read":
            outputs = outputs + self.layer.weight[:3, 0]
        return outputs


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(x)).mean(dim=1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("before", "not given the network's input as it is"),
        ("again", "applied 2 times"),
        ("past", "past 'layer'"),
        ("past, without a gradient", "past 'layer'"),
        ("read", "another way than by one call"),
    ],
)
def test_a_network_whose_randomness_is_not_all_at_the_layer_is_refused(how, reason):
    torch.manual_seed(0)
    bnn = ready(Ahead(how), points(2), layer="layer")
    with pytest.raises(InputError, match=reason):
        certified_radius(bnn, points(3), progress=False)


def test_a_layer_on_several_positions_is_refused():
    x = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="several positions"):
        certified_radius(ready(Tokens(), x[:2]), x, progress=False)


def test_a_convolution_is_refused_with_the_reason():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    images, _ = unseen(2)
    with pytest.raises(InputError, match=r"Conv2d: .*singular"):
        certified_radius(ready(model, images), images, progress=False)


@pytest.mark.parametrize("family", ["low-rank", "filterwise", stfbnn.Mixture(components=2), "point"])
def test_other_posteriors_are_refused(family):
    bnn = stfbnn.bayesianize(net(0), points(2), posterior=family)
    bnn.likelihood = Categorical()
    with pytest.raises(InputError, match="not one Gaussian of independent weights"):
        certified_radius(bnn, points(2), progress=False)


def test_methods_without_such_a_layer_are_refused():
    images, _ = unseen(2)
    for method in (small_net(), MCDropout(small_net(0.3), Categorical())):
        with pytest.raises(InputError, match="no posterior over a dense first layer"):
            certified_radius(method, images, progress=False)  # type: ignore[arg-type]


def test_unusable_arguments_are_refused():
    bnn, x = ready(net(0), points(2)), points(3)
    with pytest.raises(InputError, match="alpha must be a probability"):
        certified_radius(bnn, x, alpha=1.0)
    with pytest.raises(InputError, match="draws"):
        certified_radius(bnn, x, draws=0)
    with pytest.raises(InputError, match="the inputs span"):
        certified_radius(bnn, x + 1)
    with pytest.raises(InputError, match="targets"):
        certified_radius(bnn, x, torch.tensor([0, 1, 3]))
    regression = ready(net(0), points(2))
    regression.likelihood = Gaussian(noise_std=0.5)
    with pytest.raises(InputError, match="for classifiers"):
        certified_radius(regression, x)
    with pytest.raises(NotFittedError):
        certified_radius(stfbnn.bayesianize(net(0), points(2)), x)
