"""Layers that are linear in their weights: the outputs' mean and variance over many draws against the closed form.

For an output o = c + J w the mean is that at the mean weights, and the variance is J Σ Jᵀ; J is the derivative of the PLAIN
layer's output by its parameters.
"""

from __future__ import annotations

import math

import pytest
import torch
from layer_kinds import KINDS, Kind
from torch import Tensor, nn

from stfbnn.batches import Inputs, call_model, rows
from stfbnn.conversion import bayesianize
from stfbnn.network import BayesianNetwork

DRAWS = 10_000
# Two-sided, about 6·10⁻⁷ for one number; with all kinds' 1,500 numbers a false alarm has the probability .001.
ERRORS = 5.0

pytestmark = pytest.mark.filterwarnings(
    # Bags and bilinear layers are run draw by draw.
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)

LINEAR = [kind for kind in KINDS if kind.linear]


def jacobian(model: nn.Module, bnn: BayesianNetwork, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The plain model's outputs (O,) and their derivatives by the layer's parameters (O, d), in double precision."""
    outputs = call_model(model, inputs).flatten()
    parameters = dict(model.get_submodule(bnn.layer_name).named_parameters())
    rows = []
    for output in outputs:
        gradients = torch.autograd.grad(output, list(parameters.values()), retain_graph=True)
        dense = [one.to_dense() if one.is_sparse else one for one in gradients]
        rows.append(bnn.layout.flatten(dict(zip(parameters, dense, strict=True))))
    return outputs.detach(), torch.stack(rows)


def check(kind: Kind, family: str) -> None:
    model = kind.bare(torch.float64)
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            # Rescaled gradients are no derivatives.
            part.scale_grad_by_freq = False
    # One example has as many outputs as are worth while.
    x = rows(kind.given(torch.float64), 0, 1) if kind.batched else kind.given(torch.float64)
    bnn = bayesianize(model, x, posterior=family, prior=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bnn.posterior.parameters():
            # A mean off the trained weights, and widths and correlations of all sizes.
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if parameter.ndim == 3:
                parameter.tril_()
    mean, covariance = bnn.posterior.mean_vector().detach(), bnn.posterior.covariance()
    at_trained, derivative = jacobian(model, bnn, x)
    expected = at_trained + derivative @ (mean - bnn.trained_vector())
    variance = torch.einsum("oi,ij,oj->o", derivative, covariance, derivative)

    noise = torch.randn(DRAWS, bnn.posterior.noise_size, generator=generator, dtype=torch.float64)
    vectors = bnn.posterior.draw(noise).detach()
    found = torch.vmap(lambda vector: bnn.outputs(vector, x))(vectors).flatten(1)
    varied = variance > 0
    assert varied.any()
    torch.testing.assert_close(found[:, ~varied], expected[~varied].expand(DRAWS, -1))
    off = (found.mean(0) - expected)[varied].abs() / (variance[varied] / DRAWS).sqrt()
    assert float(off.max()) < ERRORS
    # The relative standard error of a normal sample's variance.
    off = (found.var(0)[varied] / variance[varied] - 1).abs() / math.sqrt(2 / (DRAWS - 1))
    assert float(off.max()) < ERRORS


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.name)
def test_the_moments_of_a_mean_field_posterior(kind: Kind) -> None:
    check(kind, "mean-field")


@pytest.mark.parametrize(
    "kind", [kind for kind in LINEAR if kind.units and "bag" not in kind.name][::2], ids=lambda kind: kind.name
)
def test_the_moments_of_a_filterwise_posterior(kind: Kind) -> None:
    check(kind, "filterwise")


@pytest.mark.parametrize("family", ["low-rank", "full"])
@pytest.mark.parametrize("kind", [LINEAR[0], LINEAR[14], LINEAR[19]], ids=lambda kind: kind.name)
def test_the_moments_of_families_with_covariances(kind: Kind, family: str) -> None:
    check(kind, family)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in LINEAR if not kind.layer.endswith("bag") and kind.take is KINDS[0].take],
    ids=lambda kind: kind.name,
)
def test_a_filterwise_block_is_one_output_unit(kind: Kind) -> None:
    """Brute force: which weights move which channels, or, for an embedding, which tokens' rows."""
    model, x = kind.bare(torch.float64), kind.given(torch.float64)
    bnn = bayesianize(model, x, posterior="filterwise", prior=1.0)
    index = bnn.posterior.index
    assert isinstance(index, Tensor)
    assert len(index) == kind.units
    if isinstance(model.layer, nn.Embedding | nn.EmbeddingBag):
        assert torch.equal(index, torch.arange(21).reshape(7, 3))
        return
    dense = isinstance(model.layer, nn.Linear | nn.Bilinear)
    before = model(*kind.arguments(torch.float64))
    for unit, block in enumerate(index):
        vector = bnn.trained_vector()
        vector[block] += 1.0
        moved = (bnn.outputs(vector, x) - before).detach().movedim(-1 if dense else 1, 0).flatten(1).abs().amax(1)
        assert moved[unit] > 0.1
        assert not moved[torch.arange(len(moved)) != unit].any()
