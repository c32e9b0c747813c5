"""Gradients through every kind of first layer: those of the plain model at the drawn weights, and none in the trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_kinds import KINDS, Kind
from test_layers_exact import draw, each_kind, with_weights
from torch import Tensor, nn

from stfbnn.batches import call_model
from stfbnn.conversion import bayesianize

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def plain_gradient(model: nn.Module, layer: str, x: Any, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The derivative of a fixed combination of the plain model's outputs by its layer's parameters."""
    module = model.get_submodule(layer)
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            # Rescaled gradients are no derivatives.
            part.scale_grad_by_freq = part.sparse = False
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
    loss = (call_model(model, x) * weights).sum()
    return loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@each_kind
@pytest.mark.parametrize("family", ["mean-field", "low-rank"])
def test_gradients_are_those_of_the_plain_model_at_the_drawn_weights(kind: Kind, family: str) -> None:
    model, x = kind.network(torch.float64), kind.given(torch.float64)
    bnn = bayesianize(model, x, layer=kind.asked, posterior=family, prior=3.0)
    noise = bnn.draw_noise(torch.Generator().manual_seed(3))
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, parts = plain_gradient(with_weights(model, bnn, draw(bnn)), bnn.layer_name, x, weights)
    expected = bnn.layout.flatten(parts)
    for row in bnn._padding.items():
        # What the plain embedding never learns.
        entries = bnn.layout.unflatten(torch.arange(bnn.layout.size))[row[0]][row[1]]
        assert not expected[entries].any()

    vector = bnn.posterior.draw(noise)
    found = (bnn.outputs(vector, x) * weights).sum()
    torch.testing.assert_close(found, loss.detach())
    found.backward()
    loc = bnn.posterior.loc.grad
    torch.testing.assert_close(loc, expected, rtol=1e-9, atol=1e-12)
    for name, parameter in bnn.posterior.named_parameters():
        assert parameter.grad is not None, name
    # What varies one weight alone has a gradient just where that weight has one.
    own = bnn.posterior.log_std.grad if family == "mean-field" else bnn.posterior.log_diagonal.grad
    assert torch.equal(own != 0, expected != 0)
    assert bool((expected != 0).any())
    for name, parameter in (*bnn.network.named_parameters(), *model.named_parameters()):
        assert parameter.grad is None, name


# Some entries have no influence: rows of tokens that do not occur, what a softmax or a normalisation does not see, the weights
# of a cell's empty state, those behind a ReLU.
PARTIAL = ("embedding", "bag", "attention", "weight norm", "orthogonal", "rnn with relu", "gru cell", "tied inside")


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not any(part in kind.name for part in PARTIAL)], ids=lambda kind: kind.name
)
def test_every_weight_has_a_gradient(kind: Kind) -> None:
    bnn = bayesianize(kind.network(torch.float64), kind.given(torch.float64), layer=kind.asked)
    call_model(bnn, kind.given(torch.float64)).square().sum().backward()
    for name, parameter in bnn.posterior.named_parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).all()), name


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "embedding" in kind.name or "bag" in kind.name], ids=lambda k: k.name
)
def test_only_rows_of_tokens_that_occur_have_gradients(kind: Kind) -> None:
    bnn = bayesianize(kind.network(torch.float64), kind.given(torch.float64), layer=kind.asked)
    call_model(bnn, kind.given(torch.float64)).square().sum().backward()
    name = "0.weight" if kind.named else "weight"
    if kind.layer.endswith("layer") and name not in bnn.layout.names:
        name = "bag.weight"
    gradient = bnn.layout.unflatten(bnn.posterior.loc.grad)[name]
    padding = set(bnn._padding.get(name, []))
    occur = set(kind.arguments()[0].flatten().tolist()) - padding
    found = {row for row in range(7) if gradient[row].any()}
    # A maximum may be that of other tokens in every component.
    assert found <= occur if "max" in kind.name else found == occur


def test_gradients_reach_inputs_past_and_through_the_layer() -> None:
    kind = KINDS[0]
    bnn = bayesianize(kind.network(), kind.given())
    x = kind.given().clone().requires_grad_()
    bnn(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())
