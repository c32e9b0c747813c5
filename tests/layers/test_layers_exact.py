"""Every kind of first layer: the mean is the model, and a draw is the model with that draw's weights written into it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_kinds import CONVOLUTIONS, DENSE, EMBEDDINGS, KINDS, TRANSPOSED, Kind, TiedInside, randn, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stfbnn.batches import call_model
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError, LayerError
from stfbnn.inference.estimators import outputs_of_each
from stfbnn.network import BayesianNetwork

pytestmark = [
    # Which of PyTorch's kernels runs is not what is tested.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),
]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def at_mean(bnn: BayesianNetwork, x: Any) -> Tensor:
    return call_model(lambda *args, **kwargs: bnn(*args, weights="mean", **kwargs), x)  # type: ignore[no-any-return]


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for a few roundings: where weights lie in memory decides in which order a kernel adds."""
    few = 20 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=few, atol=few)


def draw(bnn: BayesianNetwork, seed: int = 3) -> Tensor:
    return bnn.posterior.draw(bnn.draw_noise(torch.Generator().manual_seed(seed))).detach()


def with_weights(model: nn.Module, bnn: BayesianNetwork, vector: Tensor) -> nn.Module:
    """A copy of the plain model into whose layer a weight vector was written, but for the rows of padding."""
    other = copy.deepcopy(model)
    layer = other.get_submodule(bnn.layer_name)
    padding = [
        (part.weight, part.padding_idx, part.weight[part.padding_idx].detach().clone())
        for part in layer.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None
    ]
    with torch.no_grad():
        for name, value in bnn.layout.unflatten(vector).items():
            dict(layer.named_parameters())[name].copy_(value)
        for weight, row, kept in padding:
            weight[row] = kept
    return other


@each_kind
def test_the_mean_is_the_model(kind: Kind) -> None:
    model, x = kind.network(), kind.given()
    bnn = bayesianize(model, x, layer=kind.asked)
    assert bnn.layer_name == kind.layer
    assert torch.equal(at_mean(bnn, x), call_model(model, x))
    # Without gradients PyTorch takes other kernels for attention and recurrent layers, and stfbnn has to take the same.
    with torch.no_grad():
        assert torch.equal(at_mean(bnn, x), call_model(model, x))


@each_kind
def test_a_draw_is_the_model_with_those_weights(kind: Kind) -> None:
    model, x = kind.network(), kind.given()
    bnn = bayesianize(model, x, layer=kind.asked, prior=3.0)
    vector = draw(bnn)
    other = with_weights(model, bnn, vector)
    with torch.no_grad():
        found, expected, trained = bnn.outputs(vector, x), call_model(other, x), call_model(model, x)
    close(found, expected)
    assert float((expected - trained).abs().max()) > 1e-3
    # A draw leaves nothing behind: neither in the network nor in the user's model.
    assert torch.equal(at_mean(bnn, x), call_model(model, x))
    assert torch.equal(copy.deepcopy(bnn).outputs(vector, x), bnn.outputs(vector, x))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.batched and kind.per_example], ids=lambda kind: kind.name
)
def test_weights_of_their_own_for_each_example(kind: Kind) -> None:
    model, x = kind.network(), kind.given()
    bnn = bayesianize(model, x, layer=kind.asked, prior=3.0)
    vectors = torch.stack([draw(bnn, seed) for seed in range(4)])
    found = outputs_of_each(bnn, vectors, x)
    expected = torch.stack([bnn.outputs(vector, x)[row] for row, vector in enumerate(vectors)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*DENSE[:2], *CONVOLUTIONS, *TRANSPOSED], ids=lambda kind: kind.name)
def test_with_a_batch_norm_folded_into_it(kind: Kind) -> None:
    plain = kind.network(torch.float64)
    layer: Any = plain.layer
    channels = layer(kind.given(torch.float64)).shape[1]
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = norms[layer(kind.given(torch.float64)).ndim](channels).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(channels))
        norm.running_var.copy_(torch.rand(channels) + 0.5)
    model = nn.Sequential(layer, norm, nn.Tanh()).eval()
    bnn = bayesianize(model, kind.given(torch.float64), prior=3.0)
    transposed_groups = kind in TRANSPOSED and layer.groups > 1
    assert (bnn.folding.first_layer_affine is None) == transposed_groups
    vector = draw(bnn)
    found, expected = (
        bnn.outputs(vector, kind.given(torch.float64)),
        with_weights(model, bnn, vector)(kind.given(torch.float64)),
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_kind
def test_other_precisions(kind: Kind, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and kind.name in ("orthogonal", "lstm, projected"):
        pytest.skip("PyTorch has no such layer in bfloat16")
    model, x = kind.network(dtype), kind.given(dtype)
    bnn = bayesianize(model, x, layer=kind.asked, prior=3.0)
    # Three digits are not enough for a posterior, so that of a bfloat16 layer is in float32.
    assert bnn.posterior.mean_vector().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        assert torch.equal(at_mean(bnn, x), call_model(model, x))
        vector = draw(bnn)
        found = bnn.outputs(vector, x)
        close(found, call_model(with_weights(model, bnn, vector), x))
    assert found.dtype == dtype


@each_kind
def test_under_autocast_the_mean_is_the_model(kind: Kind) -> None:
    if kind.name == "lstm, projected":
        pytest.skip("PyTorch has no such layer in bfloat16")
    model, x = kind.network(), kind.given()
    bnn = bayesianize(model, x, layer=kind.asked, prior=3.0)
    vector = draw(bnn)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(at_mean(bnn, x), call_model(model, x))
        close(bnn.outputs(vector, x), call_model(with_weights(model, bnn, vector), x))


@pytest.mark.parametrize("kind", [kind for kind in EMBEDDINGS if "padding" in kind.name], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["mean-field", "filterwise", "full", "low-rank"])
def test_the_row_of_padding_is_the_same_in_every_draw(kind: Kind, family: str) -> None:
    model, x = kind.network(), kind.given()
    layer: Any = model.layer
    bnn = bayesianize(model, x, posterior=family, prior=3.0)
    others = [row for row in range(7) if row != layer.padding_idx]
    for seed in range(3):
        weight = bnn.substitution(draw(bnn, seed))["layer.weight"]
        assert torch.equal(weight[layer.padding_idx], layer.weight[layer.padding_idx])
        assert not bool((weight[others] == layer.weight[others]).any())
    difference = bnn.substitution(draw(bnn), deviation=True)["layer.weight"]
    assert not bool(difference[layer.padding_idx].any())


def test_padding_that_was_trained_away_from_zero_keeps_its_value() -> None:
    model = EMBEDDINGS[1].network()
    layer: Any = model.layer
    with torch.no_grad():
        layer.weight[0] = 0.25
    bnn = bayesianize(model, EMBEDDINGS[1].given(), prior=3.0)
    assert torch.equal(bnn.substitution(draw(bnn))["layer.weight"][0], torch.full((3,), 0.25))


def test_a_block_with_embeddings_keeps_their_padding_and_stays_at_the_trained_rows() -> None:
    kind = next(kind for kind in KINDS if kind.name == "block of embeddings")
    model = kind.network()
    bnn = bayesianize(model, kind.given(), layer="layer")
    assert bnn.prior_recipe.center == "pretrained"
    assert torch.equal(bnn.substitution(draw(bnn))["layer.0.weight"][0], torch.zeros(3))


def test_parameters_that_are_one_in_the_layer_are_one_in_every_draw() -> None:
    model = nn.Sequential(TiedInside(), nn.Linear(5, 2))
    bnn = bayesianize(model, randn(4, 5), layer="0")
    weights = bnn.substitution(draw(bnn))
    assert set(weights) == {"0.one.weight", "0.one.bias", "0.two.weight", "0.two.bias"}
    assert weights["0.two.weight"] is weights["0.one.weight"]
    assert bnn.layout.size == 25 + 5 + 5


class Shared(nn.Module):
    """One module under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 5)
        self.right = self.left

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.relu(self.left(x)))  # type: ignore[no-any-return]


def test_a_module_with_two_names_is_drawn_in_both_places() -> None:
    model = Shared()
    # No warning: nothing stays at its trained values.
    bnn = bayesianize(model, randn(4, 5))
    vector = draw(bnn)
    assert torch.equal(bnn.outputs(vector, randn(4, 5)), with_weights(model, bnn, vector)(randn(4, 5)))


class WrittenInto(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x -= 1.0
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_model_that_changes_its_inputs_is_refused_before_it_changes_them() -> None:
    x = randn(4, 5)
    with pytest.raises(InputError, match="changes its inputs in place"):
        bayesianize(WrittenInto(), x)
    assert torch.equal(x, randn(4, 5))
    sequential = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 2))
    with pytest.raises(InputError, match="inplace=False"):
        bayesianize(sequential, x)
    # In evaluation mode dropout writes nothing, in place or not.
    bayesianize(nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(5, 2)), x)


def test_complex_layers_are_refused() -> None:
    x = torch.randn(4, 5, dtype=torch.complex64)
    with pytest.raises(LayerError, match="complex"):
        bayesianize(nn.Linear(5, 2, dtype=torch.complex64), x)
    trunk = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    trunk[1].weight = nn.Parameter(trunk[1].weight.detach().to(torch.complex64))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trunk

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.net[0](x), self.net[1].weight.real)

    with pytest.raises(LayerError, match="complex"):
        bayesianize(Mixed(), randn(4, 5))


def test_what_cannot_be_drawn_is_refused() -> None:
    parametrised = nn.Sequential(parametrizations.weight_norm(nn.Embedding(7, 3, padding_idx=0)), nn.Flatten())
    with pytest.raises(LayerError, match="row for padding cannot be kept"):
        bayesianize(parametrised, tokens(4, 5))
    halves = TiedInside()
    halves.two.weight = nn.Parameter(halves.one.weight.data)
    with pytest.raises(LayerError, match=r"lies in the memory of 'one\.weight'"):
        bayesianize(halves, randn(4, 5), layer="")
    trunk = nn.Sequential(nn.Embedding(7, 3), nn.Embedding(7, 3, max_norm=1.0))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trunk

        def forward(self, x: Tensor) -> Tensor:
            return self.net[0](x) + self.net[1](x)  # type: ignore[no-any-return]

    with pytest.raises(LayerError, match=r"max_norm=1\.0"):
        bayesianize(Two(), tokens(4, 5))


@pytest.mark.parametrize("kind", DENSE[:2], ids=lambda kind: kind.name)
def test_one_layer_is_a_network(kind: Kind) -> None:
    layer = kind.make()
    bnn = bayesianize(layer, kind.given())
    assert bnn.layer_name == ""
    assert torch.equal(at_mean(bnn, kind.given()), layer(kind.given()))
