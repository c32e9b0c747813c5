"""The filterwise and the full-covariance family against torch.distributions, and block by block against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from stfbnn.errors import ArtifactError, InputError
from stfbnn.posterior import BlockGaussianPosterior, Filterwise, Full, MeanField, ParameterLayout, resolve_family
from stfbnn.posterior.filterwise import unit_index
from stfbnn.prior import GaussianPrior

CONV = ParameterLayout(("weight", "bias"), ((3, 2, 2, 2), (3,)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(size: int, seed: int = 1, widths: bool = False) -> GaussianPrior:
    std = 0.5 + random(size, seed=seed + 1).abs() if widths else torch.tensor(0.7, dtype=torch.float64)
    return GaussianPrior(random(size, seed=seed), std)


def posterior(layout: ParameterLayout, family: str = "filterwise", seed: int = 0) -> BlockGaussianPosterior:
    q = resolve_family(family).build(layout, random(layout.size, seed=seed), prior(layout.size))
    assert isinstance(q, BlockGaussianPosterior)
    units, size = q.index.shape
    scale = random(units, size, size, seed=seed + 7).tril() / math.sqrt(size)
    scale.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    q.set_scale_tril(scale)
    return q


layouts = st.builds(
    lambda units, inner, bias: ParameterLayout(
        ("weight", "bias") if bias else ("weight",), ((units, *inner), (units,)) if bias else ((units, *inner),)
    ),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), max_size=3).map(tuple),
    st.booleans(),
)


@given(layout=layouts, family=st.sampled_from(["filterwise", "full"]), seed=st.integers(0, 1000), widths=st.booleans())
@settings(max_examples=40, deadline=None)
def test_divergence_and_density_equal_torch_distributions(
    layout: ParameterLayout, family: str, seed: int, widths: bool
) -> None:
    q, p = posterior(layout, family, seed), prior(layout.size, seed + 3, widths)
    dense = MultivariateNormal(q.loc, covariance_matrix=q.covariance())
    other = MultivariateNormal(p.mean, covariance_matrix=torch.diag(p.std.square().expand(layout.size)))
    torch.testing.assert_close(q.kl(p), kl_divergence(dense, other), rtol=1e-9, atol=1e-9)
    weights = random(2, 3, layout.size, seed=seed)
    torch.testing.assert_close(q.log_prob(weights), dense.log_prob(weights), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.std_vector(), q.covariance().diagonal().sqrt())


def test_a_block_is_a_unit_with_its_bias() -> None:
    q = posterior(CONV)
    names = CONV.unflatten(torch.arange(CONV.size))
    assert tuple(q.index.shape) == (3, 9)
    for unit in range(3):
        expected = torch.cat([names["weight"][unit].flatten(), names["bias"][unit : unit + 1]])
        assert torch.equal(q.index[unit], expected)


def test_a_draw_is_the_blocks_own_draw() -> None:
    q = posterior(CONV)
    noise = random(CONV.size, seed=5)
    drawn = CONV.unflatten(q.draw(noise).detach())
    mean = CONV.unflatten(q.loc.detach())
    for unit in range(3):
        block = q.scale_tril[unit].detach() @ noise.reshape(3, 9)[unit]
        torch.testing.assert_close(drawn["weight"][unit].flatten() - mean["weight"][unit].flatten(), block[:-1])
        torch.testing.assert_close(drawn["bias"][unit] - mean["bias"][unit], block[-1])


def test_weights_of_different_units_are_independent() -> None:
    covariance = posterior(CONV).covariance()
    unit = CONV.flatten({"weight": torch.arange(3).reshape(3, 1, 1, 1).expand(3, 2, 2, 2), "bias": torch.arange(3)})
    same = unit.unsqueeze(0) == unit.unsqueeze(1)
    assert bool((covariance[~same] == 0).all())
    assert bool((covariance[same] != 0).all())


@pytest.mark.parametrize("family", ["filterwise", "full"])
def test_a_diagonal_scale_is_mean_field(family: str) -> None:
    mean, p = random(CONV.size), prior(CONV.size, widths=True)
    std = 0.1 + random(CONV.size, seed=3).abs()
    q, plain = resolve_family(family).build(CONV, mean, p), MeanField().build(CONV, mean, p)
    assert isinstance(q, BlockGaussianPosterior)
    for one in (q, plain):
        one.set_std(std)
    torch.testing.assert_close(q.std_vector(), std)
    torch.testing.assert_close(q.kl(p), plain.kl(p))
    torch.testing.assert_close(q.covariance(), plain.covariance())
    weights, noise = random(4, CONV.size, seed=4), random(4, CONV.size, seed=5)
    torch.testing.assert_close(q.log_prob(weights), plain.log_prob(weights))
    torch.testing.assert_close(q.draw(noise[:, q.index.flatten()]), plain.draw(noise))


def test_units_of_one_weight() -> None:
    layout = ParameterLayout(("weight",), ((5,),))
    q, p = posterior(layout), prior(5)
    assert tuple(q.scale_tril.shape) == (5, 1, 1)
    plain = MeanField().build(layout, q.loc.detach(), p)
    plain.set_std(q.std_vector().detach())
    torch.testing.assert_close(q.kl(p), plain.kl(p))


def test_with_one_unit_filterwise_is_full() -> None:
    layout = ParameterLayout(("weight", "bias"), ((1, 4), (1,)))
    one, other, p = posterior(layout, "filterwise"), posterior(layout, "full"), prior(5)
    assert torch.equal(one.index, other.index)
    assert torch.equal(one.kl(p), other.kl(p))


def test_the_scale_is_triangular_and_comes_back() -> None:
    q = posterior(CONV)
    scale = q.scale_tril.detach().clone()
    assert torch.equal(scale, scale.tril())
    assert bool((scale.diagonal(dim1=-2, dim2=-1) > 0).all())
    # What is above the diagonal is not read.
    q.set_scale_tril(scale + random(3, 9, 9).triu(1))
    torch.testing.assert_close(q.scale_tril.detach(), scale)
    assert torch.equal(q.raw_tril.detach(), q.raw_tril.detach().tril())


def test_optimisation_leaves_the_upper_triangle_alone() -> None:
    q, p = posterior(CONV), prior(CONV.size)
    adam = torch.optim.Adam(q.parameters(), lr=0.01)
    for step in range(5):
        adam.zero_grad()
        (q.kl(p) + q.draw(random(4, CONV.size, seed=step)).square().sum() + q.log_prob(random(CONV.size))).backward()
        adam.step()
    assert torch.equal(q.raw_tril.detach(), q.raw_tril.detach().tril())


def test_gradients_equal_those_through_a_dense_covariance() -> None:
    q, p = posterior(CONV), prior(CONV.size, widths=True)
    scale = q.scale_tril.detach().clone().requires_grad_()
    dense = torch.zeros(CONV.size, CONV.size, dtype=torch.float64)
    rows, columns = q.index.unsqueeze(2), q.index.unsqueeze(1)
    dense = dense.index_put((rows.expand_as(scale), columns.expand_as(scale)), scale @ scale.mT)
    other = MultivariateNormal(p.mean, covariance_matrix=torch.diag(p.std.square()))
    (expected,) = torch.autograd.grad(kl_divergence(MultivariateNormal(q.loc.detach(), dense), other), scale)
    (found,) = torch.autograd.grad(q.kl(p), q.raw_tril)
    expected = expected.tril()
    # By log L_jj instead of L_jj.
    expected.diagonal(dim1=-2, dim2=-1).mul_(scale.detach().diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(found, expected)


def test_a_file_keeps_the_lower_triangle_only() -> None:
    q = posterior(CONV)
    tensors = q.tensors()
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "loc.weight": (3, 2, 2, 2),
        "loc.bias": (3,),
        "raw_tril": (3, 45),
    }
    rows, columns = torch.tril_indices(9, 9)
    assert torch.equal(tensors["raw_tril"], q.raw_tril.detach()[:, rows, columns])
    other = posterior(CONV, seed=9)
    other.load_tensors(tensors)
    assert torch.equal(other.raw_tril, q.raw_tril)
    with pytest.raises(ArtifactError, match="raw_tril"):
        q.load_tensors({**tensors, "raw_tril": q.raw_tril.detach()})


def test_within_a_mixture_too() -> None:
    mixture = resolve_family("mixture")
    q = type(mixture)(components=2, family="filterwise").build(CONV, random(CONV.size), prior(CONV.size))
    assert tuple(q.tensors()["components.1.raw_tril"].shape) == (3, 45)


@pytest.mark.parametrize(
    "bad",
    [torch.ones(2, 9, 9), torch.eye(9).repeat(3, 1, 1) * torch.tensor(-1.0), torch.full((3, 9, 9), torch.nan)],
    ids=["shape", "sign", "nan"],
)
def test_a_wrong_scale_is_refused(bad: Tensor) -> None:
    q = posterior(CONV)
    before = q.raw_tril.detach().clone()
    with pytest.raises(InputError, match="positive diagonal"):
        q.set_scale_tril(bad)
    assert torch.equal(q.raw_tril, before)


def test_an_index_that_is_no_permutation_is_refused() -> None:
    layout = ParameterLayout(("weight",), ((4,),))
    with pytest.raises(InputError, match="once"):
        BlockGaussianPosterior(layout, torch.zeros(4), torch.ones(()), torch.tensor([[0, 1], [2, 2]]), "filterwise", {})


@pytest.mark.parametrize(
    "shapes", [((4, 6, 3), (6,)), ((2, 3), ()), ((0, 2),)], ids=["transposed convolution", "scalar", "empty"]
)
def test_layers_without_common_units_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    layout = ParameterLayout(("weight", "bias")[: len(shapes)], shapes)
    with pytest.raises(InputError, match=r"weight \(.*low-rank.*mean-field"):
        unit_index(layout)


def test_what_does_not_fit_in_memory_is_refused_before_it_is_made() -> None:
    wide = ParameterLayout(("weight", "bias"), ((256, 100_000), (256,)))
    mean = torch.zeros(1).expand(wide.size)
    p = GaussianPrior(torch.zeros(1), torch.ones(()))
    with pytest.raises(InputError, match=r"256 covariances of 100001 weights.*GiB.*low-rank"):
        Filterwise().build(wide, mean, p)
    with pytest.raises(InputError, match=r"the covariance of 25600256 weights.*filterwise"):
        Full().build(wide, mean, p)


def test_the_limit_is_the_memory_that_inference_takes() -> None:
    mean, p = torch.zeros(CONV.size), GaussianPrior(torch.zeros(CONV.size), torch.ones(()))
    needed = 10 * 4 * 3 * 81
    assert Filterwise(max_bytes=needed).build(CONV, mean, p).config() == {"max_bytes": needed}
    with pytest.raises(InputError, match="max_bytes"):
        Filterwise(max_bytes=needed - 1).build(CONV, mean, p)
    # A dense layer of 784 inputs and 256 units is within the default.
    assert Filterwise().max_bytes >= 10 * 4 * 256 * 785**2


def test_a_large_covariance_matrix_is_refused() -> None:
    layout = ParameterLayout(("weight",), ((5000, 2),))
    q = Filterwise().build(layout, torch.zeros(10_000), GaussianPrior(torch.zeros(10_000), torch.ones(())))
    with pytest.raises(InputError, match="scale_tril"):
        q.covariance()


@pytest.mark.parametrize("recipe", [Filterwise, Full])
def test_settings_out_of_range_are_refused(recipe: type[Filterwise] | type[Full]) -> None:
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="initial_std"):
            recipe(initial_std=bad)
    for wrong in (0, -1, True, 1e9):
        with pytest.raises(InputError, match="max_bytes"):
            recipe(max_bytes=wrong)  # type: ignore[arg-type]
    q = recipe(initial_std=0.2).build(CONV, torch.zeros(CONV.size), GaussianPrior(torch.zeros(27), torch.ones(())))
    torch.testing.assert_close(q.std_vector().detach(), torch.full((27,), 0.2))
