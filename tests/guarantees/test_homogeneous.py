"""The limit of a network far away is what the network's outputs divided by the distance approach."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import core_models
import stfbnn
from stfbnn.errors import InputError
from stfbnn.guarantees.homogeneous import HomogeneousLimit
from stfbnn.guarantees.homogeneous_rules import NoLimitError
from stfbnn.network import BayesianNetwork

FAR = 1e7


class Parts(nn.Module):
    """A first layer, and side by side what is to be tested on its outputs."""

    def __init__(self, first: nn.Module, parts: dict[str, Callable[[Tensor], Tensor] | nn.Module]) -> None:
        super().__init__()
        self.first = first
        self.parts = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        self.functions = {name: part for name, part in parts.items() if not isinstance(part, nn.Module)}

    def pieces(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        found = {name: part(h) for name, part in self.parts.items()}
        return {**found, **{name: function(h) for name, function in self.functions.items()}}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([piece.flatten(1) for piece in self.pieces(x).values()], dim=1)


def network(model: nn.Module, x: Tensor, **options: object) -> BayesianNetwork:
    return stfbnn.bayesianize(model.eval(), x, **options)


def limit_of(bnn: BayesianNetwork, x: Tensor, vector: Tensor | None = None) -> Tensor:
    limit = HomogeneousLimit(bnn, x)
    found, _ = limit.outputs(limit.parameters(bnn.trained_vector() if vector is None else vector), limit.prepared(x))
    return found


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settle(norm: nn.Module, channels: int) -> nn.Module:
    """Statistics, scales and shifts that are not those of a new norm."""
    with torch.no_grad():
        norm.running_mean.copy_(noise(channels, seed=1) * 3)
        norm.running_var.copy_(noise(channels, seed=2).square() + 0.1)
        if norm.weight is not None:
            norm.weight.copy_(noise(channels, seed=3))
            norm.bias.copy_(noise(channels, seed=4) * 5)
    return norm


def assert_parts_match(model: Parts, x: Tensor) -> None:
    found = limit_of(network(model, x), x)
    start = 0
    with torch.no_grad():
        pieces = copy.deepcopy(model).double().pieces(FAR * x.double())
    for name, piece in pieces.items():
        expected = piece.flatten(1) / FAR
        got = found[:, start : start + expected.shape[1]]
        start += expected.shape[1]
        assert float(expected.abs().max()) > 1e-3, name
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4), name
    assert start == found.shape[1]


def test_every_activation_has_the_limit_that_it_approaches() -> None:
    torch.manual_seed(0)
    scaled = {
        "relu": nn.ReLU(), "inplace": nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)),
        "leaky": nn.LeakyReLU(0.2), "prelu": nn.PReLU(8), "elu": nn.ELU(2.0),
        "selu": nn.SELU(), "celu": nn.CELU(2.0), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(),
        "mish": nn.Mish(), "softplus": nn.Softplus(2.0), "hardswish": nn.Hardswish(), "logsigmoid": nn.LogSigmoid(),
        "threshold": nn.Threshold(2.0, 7.0), "identity": nn.Identity(), "dropout": nn.Dropout(0.5),
        "logsoftmax": nn.LogSoftmax(1), "relu_f": F.relu,
        "logsumexp": lambda h: torch.logsumexp(h, 1, keepdim=True), "clamp": lambda h: h.clamp(min=-2.0),
        "clamp_max": lambda h: h.clamp(max=5.0), "abs": torch.abs, "max": lambda h: torch.max(h, h.flip(1)),
        "minimum": lambda h: torch.minimum(h, torch.ones(8)),
    }  # fmt: skip
    assert_parts_match(Parts(nn.Linear(5, 8), scaled), noise(6, 5))


def test_every_layer_of_vectors_has_the_limit_that_it_approaches() -> None:
    torch.manual_seed(0)
    shift = noise(8, seed=9)

    def write(h: Tensor) -> Tensor:
        changed = h.clone()
        changed[:, 0] += 3
        changed[:, 1] = 5
        return changed

    parts = {
        "linear": nn.Linear(8, 3), "norm": settle(nn.BatchNorm1d(8), 8),
        "alone": nn.Sequential(nn.ReLU(), settle(nn.BatchNorm1d(8), 8)),
        "no_scale": nn.Sequential(nn.ReLU(), settle(nn.BatchNorm1d(8, affine=False), 8)),
        "residual": lambda h: h + F.relu(h), "shift": lambda h: 2 * h - shift, "scale": lambda h: shift * h / 3,
        "cat": lambda h: torch.cat([h, shift.expand(h.shape[0], 8)], 1), "stack": lambda h: torch.stack([h, -h], 1),
        "slice": lambda h: h[:, 1::2], "permute": lambda h: h.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
        "split": lambda h: h.chunk(2, dim=1)[1], "mean": lambda h: h.mean(1, keepdim=True), "written": write,
        "best": lambda h: h.max(dim=1, keepdim=True).values, "matmul": lambda h: h @ torch.ones(8, 2),
        "where": lambda h: torch.where(shift > 0, h, 1.0), "einsum": lambda h: torch.einsum("bi,i->b", h, shift)[:, None],
        "taken": lambda h: h[:, [3, 1]], "zeros": lambda h: h + torch.zeros_like(h), "cast": lambda h: h.to(h.dtype),
    }  # fmt: skip
    doubled = {name: part.double() if isinstance(part, nn.Module) else part for name, part in parts.items()}
    shift = shift.double()
    model = Parts(nn.Linear(5, 8), doubled).double()
    model.functions["matmul"] = lambda h: h @ torch.ones(8, 2, dtype=h.dtype)
    assert_parts_match(model, noise(6, 5).double())


def test_every_layer_of_images_has_the_limit_that_it_approaches() -> None:
    torch.manual_seed(0)
    parts = {
        "conv": nn.Conv2d(4, 3, 3, padding=1), "strided": nn.Conv2d(4, 4, 3, stride=2, groups=2),
        "reflect": nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        "replicate": nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate"),
        "circular": nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
        "transposed": nn.ConvTranspose2d(4, 3, 2, stride=2), "norm": settle(nn.BatchNorm2d(4), 4),
        "max": nn.MaxPool2d(2), "average": nn.AvgPool2d(3, padding=1), "adaptive": nn.AdaptiveAvgPool2d(2),
        "adaptive_max": nn.AdaptiveMaxPool2d(1), "padded_max": nn.MaxPool2d(3, padding=1), "dropout": nn.Dropout2d(),
        "zero_pad": nn.ZeroPad2d(1), "shuffle": nn.PixelShuffle(2), "nearest": nn.Upsample(scale_factor=2),
        "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"), "flat": nn.Flatten(),
        "lines": lambda h: F.max_pool1d(h.flatten(2), 2), "mean": lambda h: h.mean((2, 3)),
    }  # fmt: skip
    assert_parts_match(Parts(nn.Conv2d(2, 4, 3, padding=1), parts), noise(3, 2, 6, 6))


class Multiplied(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * h.flip(1)


class Gate(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)


class Unit(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h / h.norm(dim=1, keepdim=True)


class Decides(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.where(h > 1, h, 2 * h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.heads(h[:, None], h[:, None], h[:, None])[0][:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.LSTM(8, 8, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.steps(h[:, None])[0][:, 0]


class Lerp(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.lerp(h, torch.ones_like(h), 0.5)


class Within(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.clamp(min=torch.zeros_like(h))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "LayerNorm": (nn.LayerNorm(8), "divides by a size"),
    "GroupNorm": (nn.GroupNorm(2, 8), "divides by a size"),
    "RMSNorm": (nn.RMSNorm(8), "divides by"),
    "Softmax": (nn.Softmax(1), "softmax"),
    "ReLU6": (nn.ReLU6(), "bounded"),
    "Hardtanh": (nn.Hardtanh(), "bounded"),
    "Sigmoid": (nn.Sigmoid(), "bounded"),
    "Tanh": (nn.Tanh(), "bounded"),
    "Hardsigmoid": (nn.Hardsigmoid(), "bounded"),
    "GLU": (nn.Sequential(nn.GLU(), nn.Linear(4, 8))[0], "gate"),
    "Multiplied": (Multiplied(), "multiplies two activations"),
    "Gate": (Gate(), "bounded"),
    "Unit": (Unit(), "no limit"),
    "Decides": (Decides(), "no limit"),
    "Lerp": (Lerp(), "interpolation"),
    "ConstantPad1d": (nn.ConstantPad1d(1, 2.0), "pads with the constant 2"),
    "MultiheadAttention": (Attention(), ""),
    "LSTM": (Recurrent(), ""),
    "Within": (Within(), "bounds are tensors"),
    "BatchNorm1d": (nn.BatchNorm1d(8, track_running_stats=False), "statistics of the batch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_limit_is_refused_by_name(kind: str) -> None:
    part, reason = REFUSED[kind]
    model = nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.ReLU(), part))
    x = noise(4, 5)
    with pytest.raises(NoLimitError, match=rf"module '1\.1.*' \({kind}\).*{reason}"):
        limit_of(network(model, x), x)


def test_an_instance_norm_is_refused_by_name() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2)), noise(2, 1, 5, 5)
    with pytest.raises(NoLimitError, match=r"module '1' \(InstanceNorm2d\)"):
        limit_of(network(model, x), x)


def test_a_control_flow_that_depends_on_values_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return h if float(h.sum()) > 0 else -h

    with pytest.raises(NoLimitError, match="decide by the values"):
        limit_of(network(Branch(), noise(4, 5)), noise(4, 5))


def test_a_limit_that_the_network_does_not_approach_is_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * torch.rand(())

    x = noise(4, 5)
    bnn = network(nn.Sequential(nn.Linear(5, 3), Noisy()), x)
    limit = HomogeneousLimit(bnn, x)
    with pytest.raises(NoLimitError, match="do not approach the limit"):
        limit.check([bnn.trained_vector()], limit.prepared(x))


def test_the_check_passes_smooth_networks_and_gives_the_error() -> None:
    x = noise(4, 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12), nn.SELU(), nn.Linear(12, 3))
    bnn = network(model, x)
    limit = HomogeneousLimit(bnn, x)
    assert 0 < limit.check([bnn.trained_vector()], limit.prepared(x)) < 1e-4


def test_inputs_that_are_no_floats_are_refused() -> None:
    tokens = torch.randint(0, 9, (4, 3))
    bnn = network(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)), tokens)
    with pytest.raises(InputError, match="must be floats"):
        HomogeneousLimit(bnn, tokens)


def test_biases_drop_out_of_a_perceptron() -> None:
    model, x = core_models.mlp(), noise(5, 6)
    expected = torch.relu(x.double() @ model[0].weight.double().T) @ model[2].weight.double().T
    assert torch.allclose(limit_of(network(model, x), x), expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold", [True, False])
def test_other_weights_of_a_folded_network_are_followed(fold: bool) -> None:
    model, x = core_models.conv_net(), noise(4, 1, 8, 8)
    bnn = network(model, x, fold_batch_norm=fold)
    vector = bnn.trained_vector() + 0.1 * noise(bnn.layout.size, seed=5)
    with torch.no_grad():
        measured = bnn.outputs(vector, 1e6 * x) / 1e6
    assert torch.allclose(limit_of(bnn, x, vector).float(), measured, rtol=1e-3, atol=1e-4)


def test_a_tied_weight_elsewhere_stays_at_its_trained_values() -> None:
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    x = noise(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnn = network(model, x)
    vector = noise(25, seed=3)
    expected = torch.relu(x.double() @ vector.double().view(5, 5).T) @ model[0].weight.detach().double().T
    assert torch.allclose(limit_of(bnn, x, vector), expected)


def test_what_bypasses_the_first_layer_and_several_inputs_are_followed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(6, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.last(torch.cat([self.first(a + 1).relu(), b], 1))}

    torch.manual_seed(0)
    model, a, b = Two(), noise(4, 3), noise(4, 2, seed=1)
    bnn = network(model, (a, b))
    limit = HomogeneousLimit(bnn, (a, b))
    found, _ = limit.outputs(limit.parameters(bnn.trained_vector()), limit.prepared((a, b)))
    with torch.no_grad():
        hidden = torch.cat([(a @ model.first.weight.T).relu(), b], 1)
        assert torch.allclose(found.float(), hidden @ model.last.weight.T, atol=1e-6)


_MODEL, _ROWS = core_models.conv_net(), noise(4, 1, 8, 8)
_LIMIT: list[tuple[HomogeneousLimit, dict[str, Tensor]]] = []


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_the_limit_is_positively_homogeneous(scale: float, seed: int) -> None:
    if not _LIMIT:
        bnn = network(_MODEL, _ROWS)
        limit = HomogeneousLimit(bnn, _ROWS)
        _LIMIT.append((limit, limit.parameters(bnn.trained_vector())))
    limit, parameters = _LIMIT[0]
    x = limit.prepared(noise(4, 1, 8, 8, seed=seed))
    once, _ = limit.outputs(parameters, x)
    scaled, _ = limit.outputs(parameters, scale * x)
    assert torch.allclose(scaled, scale * once, rtol=1e-9, atol=1e-12 * scale)
