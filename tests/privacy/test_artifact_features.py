"""Features of a posterior's file against loops over examples and draws, and the attack that reads them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, conv_net, mlp
from stfbnn import Categorical, Gaussian, bayesianize
from stfbnn.draws import Draws
from stfbnn.errors import InputError, NotFittedError
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture, MixturePosterior
from stfbnn.privacy.artifact_features import NAMES, artifact_features, artifact_scores
from stfbnn.privacy.figures import membership_figures
from stfbnn.privacy.shadows import Design

X, Y = classification(30)


def posterior(
    net: nn.Module | None = None, family: object = "mean-field", x: Tensor = X, seed: int = 3
) -> BayesianNetwork:
    """A posterior made by hand: means off the trained weights, widths all different."""
    bnn = bayesianize(mlp() if net is None else net, x[:2], posterior=family)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parts = bnn.posterior.components if isinstance(bnn.posterior, MixturePosterior) else [bnn.posterior]
        for part in parts:
            part.loc.add_(0.2 * torch.randn(part.loc.shape, generator=random))
            part.set_std(0.05 + 0.2 * torch.rand(part.loc.shape, generator=random))
    bnn.likelihood = Categorical()
    return bnn


def by_loops(bnn: BayesianNetwork, part: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The features at one component's mean, example by example, by autograd: log p, metric norm, norm, alignment, match."""
    mean, std = part.mean_vector().detach(), part.std_vector().detach()
    rows = []
    for example, label in zip(x, y, strict=True):
        vector = mean.clone().requires_grad_()
        log = bnn.outputs(vector, example[None]).log_softmax(1)[0, label]
        (gradient,) = torch.autograd.grad(log, vector)
        metric = sum(float(s) ** 2 * float(g) ** 2 for s, g in zip(std, gradient, strict=True))
        norm = sum(float(g) ** 2 for g in gradient) ** 0.5
        moved = sum(
            float(g) * (float(m) - float(w)) for g, m, w in zip(gradient, mean, bnn.trained_vector(), strict=True)
        )
        prior = float(bnn.prior.std) ** -2
        match = sum(float(g) ** 2 * (float(s) ** -2 - prior) for s, g in zip(std, gradient, strict=True))
        rows.append([log.item(), metric, norm, moved, match])
    return torch.tensor(rows, dtype=torch.float64)


def over_draws(bnn: BayesianNetwork, x: Tensor, y: Tensor, draws: int, seed: int) -> Tensor:
    """log p of every draw, (S, N)."""
    drawn = Draws(bnn, draws, seed)
    with torch.no_grad():
        outputs = [bnn.outputs(drawn.vector(index), x) for index in range(drawn.count)]
    return torch.stack([out.double().log_softmax(1)[range(len(y)), y] for out in outputs])


def same(one: Tensor, other: Tensor) -> bool:
    """To 1e-5 of each column's size."""
    return bool(((one - other).abs() <= 1e-5 * other.abs().amax(dim=0)).all())


def test_features_are_those_of_loops_over_examples_and_draws() -> None:
    bnn = posterior()
    found = artifact_features(bnn, X, Y, draws=7, seed=2)
    assert found.names == NAMES
    assert found.values.dtype == torch.float64
    each = over_draws(bnn, X, Y, 7, 2)
    drawn = torch.stack([each.mean(0), each.std(0, correction=0), each.amin(0)], dim=1)
    at_mean = by_loops(bnn, bnn.posterior, X, Y)
    assert same(found.values, torch.cat([at_mean[:, :1], drawn, at_mean[:, 1:]], dim=1))
    assert torch.equal(found.column("gradient norm"), found.values[:, 5])


def test_the_sizes_of_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = classification(700)
    bnn = posterior()
    found = artifact_features(bnn, x, y, draws=3).values
    assert same(found[600:], artifact_features(bnn, x[600:], y[600:], draws=3).values)
    # By its entry, for the package has a function of the module's name.
    monkeypatch.setattr(sys.modules["stfbnn.privacy.artifact_features"], "_GRADIENT_NUMBERS", 500)
    assert same(artifact_features(bnn, x, y, draws=3).values, found)


def test_a_convolution_under_batch_norm_is_no_exception() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 1, 8, 8, generator=random), torch.tensor([0, 1, 2, 0, 1])
    bnn = posterior(conv_net(), x=x)
    found = artifact_features(bnn, x, y, draws=2).values
    assert same(found[:, [0, 4, 5, 6, 7]], by_loops(bnn, bnn.posterior, x, y))


@pytest.mark.parametrize("family", ["filterwise", "low-rank"])
def test_other_families_give_their_marginal_widths(family: str) -> None:
    bnn = bayesianize(mlp(), X[:2], posterior=family)
    bnn.likelihood = Categorical()
    found = artifact_features(bnn, X[:6], Y[:6], draws=2).values
    assert same(found[:, [0, 4, 5, 7]], by_loops(bnn, bnn.posterior, X[:6], Y[:6])[:, [0, 1, 2, 4]])


def test_a_mixture_averages_its_components_by_their_weights() -> None:
    bnn = posterior(family=Mixture(2))
    assert isinstance(bnn.posterior, MixturePosterior)
    bnn.posterior.set_weights(torch.tensor([0.8, 0.2]))
    found = artifact_features(bnn, X, Y, draws=10, seed=1).values
    parts = [by_loops(bnn, part, X, Y) for part in bnn.posterior.components]
    assert same(found[:, [0, 4, 5, 6, 7]], 0.8 * parts[0] + 0.2 * parts[1])
    each, shares = over_draws(bnn, X, Y, 10, 1), Draws(bnn, 10, 1).shares
    assert shares is not None
    mean = (shares[:, None] * each).sum(0)
    spread = (shares[:, None] * (each - mean).square()).sum(0).sqrt()
    assert same(found[:, 1:4], torch.stack([mean, spread, each.amin(0)], dim=1))


def test_a_point_mass_has_no_width() -> None:
    bnn = bayesianize(mlp(), X[:2], posterior="point")
    bnn.likelihood = Categorical()
    found = artifact_features(bnn, X, Y)
    for name in ("spread of draws' log-likelihoods", "gradient norm in the posterior's metric", "curvature match"):
        assert not found.column(name).any()
    assert torch.allclose(found.column("mean log-likelihood of draws"), found.column("log-likelihood at the mean"))
    assert not found.column("alignment with the mean's move").any()
    assert found.column("gradient norm").all()


def test_the_curvature_match_finds_the_example_that_dominates_the_precision() -> None:
    # Examples with a pixel each, so that their gradients lie apart but for the bias.
    x, y = 3 * torch.eye(12), torch.arange(12) % 3
    bnn = posterior(mlp(inputs=12), x=x)
    for one in (0, 4, 11):
        leaf = bnn.posterior.mean_vector().detach().clone().requires_grad_()
        log = bnn.outputs(leaf, x[one][None]).log_softmax(1)[0, y[one]]
        (gradient,) = torch.autograd.grad(log, leaf)
        # The fixed point at T = 1 of a posterior that this example alone has shaped, a hundred times.
        bnn.posterior.set_std((float(bnn.prior.std) ** -2 + 100 * gradient.square()).rsqrt())
        found = artifact_features(bnn, x, y, draws=1)
        share = found.column("curvature match") / found.column("gradient norm").square()
        assert int(share.argmax()) == one
        assert share[one] > 5 * share.sort().values[-2]
        expected = float(100 * gradient.double().pow(4).sum())
        assert float(found.column("curvature match")[one]) == pytest.approx(expected, rel=1e-3)


def made_up(strength: float, models: int = 8, examples: int = 300, seed: int = 0) -> tuple[Tensor, Design]:
    """Features of which the first hides membership behind how hard an example is; the second is noise."""
    random = torch.Generator().manual_seed(seed)
    design = Design.balanced(examples, models, seed)
    hard = 5 * torch.randn(1, examples, generator=random)
    first = hard + strength * design.membership + 0.5 * torch.randn(models, examples, generator=random)
    return torch.stack([first, torch.randn(models, examples, generator=random)], dim=2), design


@pytest.mark.parametrize("model", ["logistic", "boosting"])
def test_the_attack_finds_what_only_calibration_shows(model: str) -> None:
    features, design = made_up(strength=2.0)
    inside = design.membership[0]
    raw = membership_figures(features[0, :, 0], inside, bootstrap=100).auc
    found = membership_figures(artifact_scores(features, design, 0, model=model), inside, bootstrap=100).auc  # type: ignore[arg-type]
    assert raw.value < 0.65
    assert found.low > 0.8


@pytest.mark.parametrize("model", ["logistic", "boosting"])
def test_the_attack_finds_nothing_where_there_is_nothing(model: str) -> None:
    features, design = made_up(strength=0.0, models=6, examples=400)
    scores = [artifact_scores(features, design, target, model=model) for target in range(3)]  # type: ignore[arg-type]
    found = membership_figures(torch.cat(scores), design.membership[:3].flatten(), confidence=0.99, bootstrap=100).auc
    assert found.low < 0.5 < found.high


@pytest.mark.parametrize("model", ["logistic", "boosting"])
def test_the_attack_never_looks_at_the_attacked_models_membership(model: str) -> None:
    features, design = made_up(strength=1.0, examples=80)
    flipped = design.membership.clone()
    flipped[2] = ~flipped[2]
    scores = artifact_scores(features, design, 2, model=model)  # type: ignore[arg-type]
    assert torch.equal(scores, artifact_scores(features, Design(flipped), 2, model=model))  # type: ignore[arg-type]
    assert not torch.equal(scores, artifact_scores(features, Design(flipped), 3, model=model))  # type: ignore[arg-type]


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(NotFittedError):
        artifact_features(bayesianize(mlp(), X[:2]), X, Y)
    bnn = posterior()
    with pytest.raises(InputError, match="0 to 2"):
        artifact_features(bnn, X, Y + 1)
    with pytest.raises(InputError, match="one label"):
        artifact_features(bnn, X, Y[:-1])
    with pytest.raises(InputError, match="NaN"):
        artifact_features(bnn, X.log(), Y)
    bnn.likelihood = Gaussian(noise_std=1.0)
    with pytest.raises(InputError, match="classifiers"):
        artifact_features(bnn, X, Y)
    with pytest.raises(InputError, match="no feature 'what'"):
        artifact_features(posterior(), X, Y, draws=1).column("what")


def test_an_attack_that_cannot_be_made_is_refused() -> None:
    features, design = made_up(1.0, models=4, examples=10)
    with pytest.raises(InputError, match="at least 6 models"):
        artifact_scores(features, design, 0)
    features, design = made_up(1.0, models=6, examples=10)
    with pytest.raises(InputError, match="logistic"):
        artifact_scores(features, design, 0, model="forest")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="as in the design"):
        artifact_scores(features, design, 6)
    features[1, 2, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        artifact_scores(features, design, 0)
