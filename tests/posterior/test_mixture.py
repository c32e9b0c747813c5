"""The mixture against torch.distributions, quadrature and brute force."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily
from torch.distributions import Normal as TorchNormal

from stfbnn.errors import ArtifactError, InputError
from stfbnn.inference.components.weights import free_energy_weights
from stfbnn.posterior import (
    MeanField,
    MeanFieldPosterior,
    Mixture,
    MixturePosterior,
    ParameterLayout,
    PointMass,
    PointMassPosterior,
    resolve_family,
)
from stfbnn.prior import GaussianPrior

LAYOUT = ParameterLayout(("weight", "bias"), ((2, 3), (2,)))
LINE = ParameterLayout(("w",), ((1,),))
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def mixture(apart: float = 1.0, weights: Tensor = WEIGHTS) -> MixturePosterior:
    generator = torch.Generator().manual_seed(0)
    parts = [
        MeanFieldPosterior(
            LAYOUT,
            apart * torch.randn(8, generator=generator).double(),
            0.1 + torch.rand(8, generator=generator).double(),
        )
        for _ in weights
    ]
    return MixturePosterior(LAYOUT, parts, weights)


def as_torch(q: MixturePosterior) -> MixtureSameFamily:
    loc = torch.stack([part.mean_vector() for part in q.components]).detach()
    std = torch.stack([part.std_vector() for part in q.components]).detach()
    return MixtureSameFamily(Categorical(probs=q.weights), Independent(TorchNormal(loc, std), 1))


def prior(std: float = 0.7) -> GaussianPrior:
    return GaussianPrior(torch.linspace(-1, 1, 8, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))


def test_density_and_moments_equal_torch_distributions() -> None:
    q = mixture()
    reference = as_torch(q)
    w = reference.sample((5, 7))
    torch.testing.assert_close(q.log_prob(w), reference.log_prob(w))
    torch.testing.assert_close(q.mean_vector().detach(), reference.mean)
    torch.testing.assert_close(q.std_vector().detach(), reference.stddev)


def test_a_draw_comes_from_the_component_in_whose_share_its_first_number_falls() -> None:
    q = mixture()
    first = torch.special.ndtri(torch.tensor([0.01, 0.49, 0.51, 0.69, 0.71, 0.99], dtype=torch.float64))
    rest = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    noise = torch.cat([first.unsqueeze(1), rest], dim=1)
    expected = torch.stack([q.components[k].draw(rest[i]) for i, k in enumerate([0, 0, 1, 1, 2, 2])])
    assert torch.equal(q.draw(noise), expected)
    assert torch.equal(q.draw(noise.reshape(2, 3, 9)), expected.reshape(2, 3, 8))
    assert torch.equal(torch.vmap(q.draw)(noise), expected)
    assert torch.equal(q.draw(noise[3]), expected[3])
    # Gradients reach the component that was drawn, and no other.
    q.draw(noise[2]).sum().backward()
    assert [bool((part.loc.grad != 0).any()) for part in q.components] == [False, True, False]
    # Noise beyond every float's quantile still falls into a component.
    assert torch.isfinite(q.draw(torch.full((2, 9), 50.0) * torch.tensor([[1.0], [-1.0]]))).all()


def test_covariance_is_that_of_draws() -> None:
    q = mixture()
    w = q.draw(torch.randn(200_000, 9, generator=torch.Generator().manual_seed(2)).double()).detach()
    found = torch.cov(w.T)
    # Five standard errors of a covariance at 2·10^5 draws of a law whose fourth moments are at most nine times the second's.
    scale = q.std_vector().detach()
    assert ((found - q.covariance()).abs() < 5 * 3 * torch.outer(scale, scale) / 200_000**0.5).all()
    torch.testing.assert_close(q.covariance().diagonal().sqrt(), scale)


@pytest.mark.parametrize("apart", [0.05, 0.5, 3.0])
def test_kl_equals_monte_carlo_with_far_more_draws(apart: float) -> None:
    q, p = mixture(apart), prior()
    w = as_torch(q)
    torch.manual_seed(0)
    drawn = w.sample((200_000,))
    ratio = w.log_prob(drawn) - TorchNormal(p.mean, p.std).log_prob(drawn).sum(-1)
    # 32 draws a component estimate a term of at most log 5 nats.
    assert float(q.kl(p).detach()) == pytest.approx(float(ratio.mean()), abs=0.15)
    low, high = (float(bound.detach()) for bound in q.kl_bounds(p))
    assert low - 1e-9 <= float(q.kl(p).detach()) <= high + 1e-9
    entropy = float(Categorical(probs=q.weights).entropy())
    assert high - low == pytest.approx(entropy)
    assert float(q.entropy_of_weights()) == pytest.approx(entropy)


def test_kl_is_exact_for_one_component_for_equal_ones_and_for_ones_that_do_not_overlap() -> None:
    p = prior()
    one = mixture(weights=torch.ones(1, dtype=torch.float64))
    assert torch.equal(one.kl(p), one.components[0].kl(p))
    assert torch.equal(one.std_vector(), one.components[0].std_vector())
    part = one.components[0]
    same = MixturePosterior(LAYOUT, [part, part, part], WEIGHTS)
    torch.testing.assert_close(same.kl(p), part.kl(p), rtol=1e-12, atol=1e-12)
    far = mixture(apart=100.0)
    torch.testing.assert_close(far.kl(p), far.kl_bounds(p)[0], rtol=1e-12, atol=1e-12)


def line(means: list[float], stds: list[float], weights: Tensor) -> MixturePosterior:
    parts = [
        MeanFieldPosterior(LINE, torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))
        for mean, std in zip(means, stds, strict=True)
    ]
    return MixturePosterior(LINE, parts, weights)


def energies(w: Tensor) -> Tensor:
    """A negative log-likelihood of 40 examples with two modes, the right one the better."""
    return -40 * torch.logaddexp(-((w + 2).square()), 0.02 - (w - 2).square())


def free_energy(means: list[float], stds: list[float], weights: Tensor, temperature: float = 1.0) -> float:
    """E_q[U] + T KL(q‖p) by quadrature."""
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    parts = TorchNormal(torch.tensor(means).double(), torch.tensor(stds).double())
    log_q = (parts.log_prob(grid.unsqueeze(1)) + weights.log()).logsumexp(dim=1)
    log_p = TorchNormal(0.0, 3.0).log_prob(grid)
    values = log_q.exp() * (energies(grid) + temperature * (log_q - log_p))
    return float(torch.trapezoid(torch.where(log_q > -700, values, 0.0), grid))


def test_the_weights_by_free_energy_minimise_the_mixtures() -> None:
    means, stds = [-2.0, 2.0], [0.11, 0.11]
    lone = torch.tensor(
        [free_energy([mean], [std], torch.ones(1).double()) for mean, std in zip(means, stds, strict=True)]
    )
    # F is per example: N = 40 of them.
    weights = free_energy_weights(lone / 40, num_examples=40, temperature=1.0)
    assert weights[1] == pytest.approx(1 / (1 + math.exp(float(lone[1] - lone[0]))), rel=1e-5)
    best = free_energy(means, stds, weights)
    assert best < float(lone.min())
    assert best == pytest.approx(-float((-lone).logsumexp(0)), abs=1e-5)
    for share in (0.02, 0.1, 0.3, 0.5, 0.6, 0.8, 0.95, 0.99):
        other = torch.tensor([share, 1 - share]).double()
        assert best <= free_energy(means, stds, other) + 1e-9
    # And KL as the library has it is that of the quadrature.
    p = GaussianPrior(torch.zeros(1).double(), torch.tensor(3.0).double())
    q = line(means, stds, weights)
    expected = best - sum(
        float(w) * (free_energy([m], [s], torch.ones(1).double()) - _kl(m, s))
        for w, m, s in zip(weights, means, stds, strict=True)
    )
    assert float(q.kl(p).detach()) == pytest.approx(expected, abs=1e-6)


def test_weights_by_free_energy_are_nearly_one_hot_and_never_overflow() -> None:
    weights = free_energy_weights(torch.tensor([0.30, 0.31, 0.5]), num_examples=60_000, temperature=0.1)
    assert float(weights[0]) > 1 - 1e-12
    assert float(weights.sum()) == pytest.approx(1)
    hot = free_energy_weights(torch.tensor([0.30, 0.31]), num_examples=100, temperature=1.0)
    assert float(hot[0] / hot[1]) == pytest.approx(math.e, rel=1e-4)


def _kl(mean: float, std: float) -> float:
    return math.log(3.0 / std) + (std**2 + mean**2) / (2 * 9) - 0.5


def test_the_recipe_starts_every_component_at_the_trained_weights() -> None:
    q = Mixture(components=3, family="mean-field").build(LAYOUT, torch.arange(8.0), prior())
    assert len(q) == 3
    torch.testing.assert_close(q.weights, torch.full((3,), 1 / 3))
    torch.testing.assert_close(q.mean_vector().detach(), torch.arange(8.0))
    assert len({id(part.loc) for part in q.components}) == 3
    assert isinstance(resolve_family("mixture"), Mixture)
    assert Mixture(family=MeanField(initial_std=0.3)).build(LAYOUT, torch.arange(8.0), prior()).components[1].std()[
        "bias"
    ].tolist() == pytest.approx([0.3, 0.3])


def test_config_and_tensors_rebuild_it() -> None:
    q = mixture()
    assert q.config() == {"components": 3, "family": "mean-field", "family_options": {}}
    twin = Mixture(**q.config()).build(LAYOUT, torch.zeros(8).double(), prior())
    twin.load_tensors(q.tensors())
    noise = torch.randn(20, 9).double()
    assert torch.equal(twin.draw(noise), q.draw(noise))
    assert set(q.tensors()) >= {"weights", "components.2.loc.weight", "components.0.log_std.bias"}
    for bad in ([0.5, 0.2, 0.2], [1.0, 0.0, 0.0], [0.6, 0.6, -0.2]):
        tensors = {**q.tensors(), "weights": torch.tensor(bad).double()}
        before = twin.weights.clone()
        with pytest.raises(ArtifactError, match="weights"):
            twin.load_tensors(tensors)
        assert torch.equal(twin.weights, before)


def test_an_ensemble_of_points_has_moments_and_no_density() -> None:
    points = [PointMassPosterior(LAYOUT, value * torch.ones(8)) for value in (0.0, 1.0)]
    q = MixturePosterior(LAYOUT, points, torch.tensor([0.25, 0.75]))
    assert q.is_ensemble
    assert not mixture().is_ensemble
    assert q.noise_size == 1
    torch.testing.assert_close(q.mean_vector().detach(), torch.full((8,), 0.75))
    torch.testing.assert_close(q.std_vector().detach(), torch.full((8,), math.sqrt(0.25 * 0.75)))
    torch.testing.assert_close(q.covariance(), torch.full((8, 8), 0.25 * 0.75))
    drawn = q.draw(torch.tensor([[-3.0], [3.0]]))
    assert torch.equal(drawn, torch.stack([torch.zeros(8), torch.ones(8)]))
    with pytest.raises(InputError, match="no KL"):
        q.kl(prior())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 0}, "components must be a positive integer"),
        ({"retrain_epochs": 0}, "retrain_epochs"),
        ({"inference_epochs": True}, "inference_epochs"),
        ({"perturbation": 0.0}, "perturbation"),
        ({"max_excess": float("nan")}, "max_excess"),
        ({"min_weight": 0.5}, "min_weight"),
        ({"min_weight": "none"}, "min_weight"),
        ({"family_options": [1]}, "family_options must be a mapping"),
        ({"start": "anywhere"}, "start must be one of"),
        ({"weighting": "stacking"}, "weighting must be one of"),
        ({"family": "mixture"}, "cannot be mixtures"),
        ({"family": Mixture()}, "cannot be mixtures"),
        ({"family": "horseshoe"}, "not a known family"),
        ({"family": MeanField(), "family_options": {"initial_std": 1.0}}, "given by name"),
        ({"family_options": {"width": 1.0}}, "do not fit"),
        ({"family": "point", "weighting": "free-energy"}, "density"),
        ({"family": PointMass(), "weighting": "free-energy"}, "density"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(**settings)  # type: ignore[arg-type]


def test_bad_mixtures_are_refused() -> None:
    part = MeanFieldPosterior(LAYOUT, torch.zeros(8), torch.ones(()))
    with pytest.raises(InputError, match="at least one"):
        MixturePosterior(LAYOUT, [])
    with pytest.raises(InputError, match="one family"):
        MixturePosterior(LAYOUT, [part, PointMassPosterior(LAYOUT, torch.zeros(8))])
    with pytest.raises(InputError, match="one family"):
        MixturePosterior(LAYOUT, [MixturePosterior(LAYOUT, [part])])
    for bad in ([0.5, 0.6], [1.0, 0.0], [1.0], [float("nan"), 0.5]):
        with pytest.raises(InputError, match="weights"):
            MixturePosterior(LAYOUT, [part, part], torch.tensor(bad))
