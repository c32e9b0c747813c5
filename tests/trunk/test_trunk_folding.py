"""Folding: the network computes what it computed, whatever the surroundings of its batch norms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from trunk_networks import ResNet, norms_of, saved_bytes, trained

from stfbnn.errors import InputError, LayerError
from stfbnn.trunk import (
    FoldedNorm,
    FoldingReport,
    FrozenAffine,
    FrozenConv2d,
    apply_first_layer_affine,
    fold,
    shared_copy,
)


def run(network: nn.Module, name: str, report: FoldingReport, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Call a folded network with the first layer's weights substituted, as stage two does."""
    if report.first_layer_affine is not None:
        weights = apply_first_layer_affine(network.get_submodule(name), weights, *report.first_layer_affine)
    return functional_call(network, {f"{name}.{key}": value for key, value in weights.items()}, (x,), tie_weights=False)


def check_equal(model: nn.Module, name: str, x: Tensor, report=None, network=None, tolerance: float = 1e-11):
    """Fold a float64 model and compare outputs and gradients, of inputs and first-layer weights, at other weights."""
    if network is None:
        network = shared_copy(model)
        report = fold(network, name, x)
    noise = torch.Generator().manual_seed(1)
    layer = model.get_submodule(name)
    draws = {
        key: (value.detach() + 0.3 * torch.randn(value.shape, generator=noise, dtype=value.dtype)).requires_grad_()
        for key, value in layer.named_parameters()
    }
    fresh = (x + torch.randn(x.shape, generator=noise, dtype=x.dtype)).requires_grad_()
    expected = functional_call(model, {f"{name}.{key}": value for key, value in draws.items()}, (fresh,))
    actual = run(network, name, report, fresh, draws)
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
    leaves = [fresh, *draws.values()]
    weights = torch.randn(expected.shape, generator=noise, dtype=x.dtype)
    for one, other in zip(
        torch.autograd.grad(actual, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))
    return report, network


IMAGES = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_resnet_folds_every_norm_and_computes_the_same():
    model = trained(ResNet().double())
    report, network = check_equal(model, "conv", IMAGES)
    assert set(report.folded) == norms_of(model)
    assert report.folded["bn"] == "conv"
    assert report.folded["blocks.1.shortcut.1"] == "blocks.1.shortcut.0"
    assert not report.local
    assert not report.left
    assert report.first_layer_affine is not None
    assert isinstance(network.bn, FoldedNorm)
    assert "conv" not in report.convolutions
    assert len(report.convolutions) == 8
    assert type(network.conv) is nn.Conv2d
    assert type(network.blocks[0].conv1) is FrozenConv2d
    assert "9 folded" in report.summary()


def test_first_layer_affine_against_the_closed_form():
    model = trained(ResNet().double())
    network = shared_copy(model)
    report = fold(network, "conv", IMAGES)
    norm = model.bn
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    torch.testing.assert_close(report.first_layer_affine.scale, scale.detach())
    torch.testing.assert_close(report.first_layer_affine.shift, (norm.bias - norm.running_mean * scale).detach())
    # The layer had no bias: the copy has a frozen one of zeros, the model still none.
    assert model.conv.bias is None
    assert torch.equal(network.conv.bias, torch.zeros(4, dtype=torch.float64))
    assert not network.conv.bias.requires_grad
    assert network.conv.weight.data_ptr() == model.conv.weight.data_ptr()


def test_the_users_model_is_bitwise_untouched():
    model = trained(ResNet())
    model.train()
    model.blocks[0].bn1.eval()
    model.head.weight.requires_grad_(False)
    seen = []
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    modes = {name: module.training for name, module in model.named_modules()}
    types = {name: type(module) for name, module in model.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    network = shared_copy(model)
    report = fold(network, "conv", IMAGES.float())
    assert report.folded
    x = IMAGES.float().requires_grad_()
    run(network, "conv", report, x, dict(network.conv.named_parameters())).sum().backward()
    network.double()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs
    assert {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()} == versions
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.blocks[1]._forward_hooks) == 1


class Functional(nn.Module):
    """A conv and a norm whose surroundings are given as a function."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, torch.relu(self.first(x))).mean((-2, -1))


def branching(m, x):
    y = m.conv(x)
    return m.bn(y) if float(y.detach().sum()) > 0 else 2 * m.bn(y)


def keeping(m, x):
    m.features = m.conv(x)
    return m.bn(m.features)


def in_container(m, x):
    m.features = {"all": [m.conv(x)]}
    return m.bn(m.features["all"][0])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: (y := m.conv(x)) + m.bn(y), "used elsewhere"),
        (lambda m, x: m.bn(m.conv(x)) + m.conv(2 * x), "called 2 times"),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(x), "it is called 2 times"),
        (lambda m, x: m.bn(m.conv(x)) * m.bn.weight.sum(), "tensors of 'bn'"),
        (lambda m, x: m.bn(m.conv(x)) * m.bn.running_var.max(), "tensors of 'bn'"),
        (lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1), "tensors of 'conv'"),
        (lambda m, x: m.bn(torch.tanh(m.conv(x))), "not the output of a layer"),
        (branching, "cannot be traced"),
        (keeping, "used elsewhere"),
        (in_container, "used elsewhere"),
    ],
)
def test_what_must_not_fold_is_computed_in_place(forward, reason):
    torch.manual_seed(0)
    model = trained(Functional(forward).double())
    report, network = check_equal(model, "first", IMAGES)
    assert reason in report.local["bn"]
    assert not report.folded
    assert isinstance(network.bn, FrozenAffine)
    assert reason in report.summary()


def test_a_weight_tied_to_one_that_is_read_is_not_folded():
    model = Functional(lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1))
    # fx names a tensor by the first module that has it.
    early = nn.Conv2d(4, 4, 3, padding=1)
    model._modules = {"early": early, **model._modules}
    early.weight = model.conv.weight
    report, _ = check_equal(trained(model.double()), "first", IMAGES)
    assert "used elsewhere" in report.local["bn"]


def test_an_opaque_part_does_not_hinder_folding_elsewhere():
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while float(x.detach().abs().max()) > 1:
                x = x / 2
            return x

    model = trained(Functional(lambda m, x: m.loop(m.bn(m.conv(x))), loop=Loop()).double())
    report, _ = check_equal(model, "first", IMAGES)
    assert dict(report.folded) == {"bn": "conv"}


def test_tied_weights_fold_in_one_place_only():
    model = Functional(lambda m, x: m.bn(m.conv(x)) + m.twin(x), twin=nn.Conv2d(4, 4, 3, padding=1))
    model.twin.weight = model.conv.weight
    report, network = check_equal(trained(model.double()), "first", IMAGES)
    assert dict(report.folded) == {"bn": "conv"}
    assert network.twin.weight.data_ptr() == model.twin.weight.data_ptr()


@pytest.mark.parametrize("where", ["conv", "bn", "inner"])
def test_hooks_stay_and_prevent_folding(where):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Functional(lambda m, x: m.bn(m.inner(x)), inner=Inner())
    target = {"conv": model.inner.conv, "bn": model.bn, "inner": model.inner}[where]
    seen = []

    def double(module, inputs, output):
        assert isinstance(output, Tensor), "a stand-in reached the user's hook"
        seen.append(output)
        return 2 * output

    target.register_forward_hook(double)
    report, _ = check_equal(trained(model.double()), "first", IMAGES)
    assert "hook" in report.local["bn"]
    assert len(seen) == 2  # both networks, and no run for a check, as there was nothing to check


def test_norm_before_the_first_layer_and_without_neighbours():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten())
    report, network = check_equal(trained(model.double()), "1", IMAGES)
    assert set(report.local) == {"0", "3"}
    assert isinstance(network[0], FrozenAffine)


def test_mlp_with_batch_norm():
    x = torch.randn(5, 6, dtype=torch.float64)
    model = nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5, affine=False)
    )
    report, network = check_equal(trained(model.double()), "0", x)
    assert dict(report.folded) == {"1": "0", "4": "3"}
    assert network[0].bias is not None
    with pytest.raises(InputError, match="folded for inputs of 2 dimensions"):
        network(x[None])


def test_batch_norm_over_positions_is_not_folded_into_a_linear_layer():
    # (N, L, F) with L == F: BatchNorm1d normalises L, the linear layer's output channels are F.
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Flatten())
    report, _ = check_equal(trained(model.double()), "0", x)
    assert "does not run" in report.local["3"]
    assert not report.folded


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding_mode="circular", padding=1), nn.BatchNorm1d(4, momentum=None), (2, 3, 9)),
        (nn.Conv2d(3, 4, (3, 2), stride=2, groups=1), nn.SyncBatchNorm(4), (2, 3, 9, 8)),
        (nn.Conv3d(3, 4, 2, bias=False), nn.BatchNorm3d(4), (2, 3, 4, 5, 4)),
        (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (2, 3, 5)),
        (nn.ConvTranspose2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 5, 4)),
        (nn.ConvTranspose3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 3, 4, 3)),
        (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), (2, 3, 5, 5)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_every_kind_of_layer(layer, norm, shape, first):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer, norm = copy.deepcopy(layer), copy.deepcopy(norm)
    if first:
        model = nn.Sequential(layer, norm, nn.Tanh(), nn.Flatten())
        expected = {"1": "0"}
    else:
        entry = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](3, 3, 1)
        model = nn.Sequential(entry, layer, norm, nn.Tanh(), nn.Flatten())
        expected = {"2": "1"}
    report, _ = check_equal(trained(model.double()), "0", x)
    assert dict(report.folded) == expected
    assert (report.first_layer_affine is not None) == first


def test_grouped_transposed_convolution_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten())
    report, _ = check_equal(trained(model.double()), "0", IMAGES)
    assert "groups" in report.local["2"]


def test_norm_by_batch_statistics_and_subclasses_are_left():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3), Own(4), nn.Flatten()
    )
    report, network = check_equal(trained(model.double()), "0", IMAGES)
    assert "statistics" in report.left["1"]
    assert "Own" in report.left["3"]
    assert type(network[1]) is nn.BatchNorm2d
    assert "statistics" in report.summary()


def test_a_fold_that_loses_precision_is_undone():
    # Rounding a weight to half precision after the fold costs more than is allowed where terms cancel.
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
        model[2].running_mean.fill_(1e4)
        model[2].running_var.fill_(1e-8)
        model[2].eps = 0.0
        model[1].bias.fill_(1e4)
        model[3].weight.fill_(1.0)
    network = shared_copy(model)
    report = fold(network, "0", torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert "rounding" in report.local["2"]
    assert network[1].weight.data_ptr() == model[1].weight.data_ptr()
    assert isinstance(network[2], FrozenAffine)


def test_keyword_arguments_and_structured_outputs():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, pixels: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> dict[str, Tensor]:
            y = self.net(pixels)
            if mask is not None:
                y = y * mask
            return {"logits": scale * y.mean((-2, -1))}

    model = trained(Model().double())
    network = shared_copy(model)
    report = fold(network, "net.0", {"pixels": IMAGES})
    assert dict(report.folded) == {"net.1": "net.0", "net.3": "net.2"}
    weights = apply_first_layer_affine(
        network.net[0], dict(network.net[0].named_parameters()), *report.first_layer_affine
    )
    named = {f"net.0.{key}": value for key, value in weights.items()}
    actual = functional_call(network, named, (), {"pixels": IMAGES}, tie_weights=False)["logits"]
    torch.testing.assert_close(actual, model(IMAGES)["logits"])


def test_a_network_without_tensors_to_compare_is_not_folded():
    class Label(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    model = trained(Label(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    report = fold(shared_copy(model), "0", IMAGES.float())
    assert "no floating-point tensors" in report.local["2"]


def test_switched_off():
    network = shared_copy(trained(ResNet()))
    assert fold(network, "conv", IMAGES.float(), enabled=False) == FoldingReport()
    assert type(network.bn) is nn.BatchNorm2d


def test_the_model_itself_as_first_layer():
    layer = nn.Linear(3, 2)
    report = fold(shared_copy(layer), "", torch.randn(2, 3))
    assert report == FoldingReport()


def test_errors():
    model = trained(ResNet())
    with pytest.raises(InputError, match="shared_copy"):
        fold(model, "conv", IMAGES.float())
    with pytest.raises(LayerError, match="named_modules"):
        fold(shared_copy(model), "missing", IMAGES.float())
    with pytest.raises(InputError, match="does not run"):
        fold(shared_copy(model), "conv", torch.randn(2, 5, 8, 8))
    network = shared_copy(model)
    network.bn.train()
    with pytest.raises(InputError, match="training mode"):
        fold(network, "conv", IMAGES.float())
    with pytest.raises(LayerError, match="LayerNorm"):
        apply_first_layer_affine(nn.LayerNorm(3), {}, torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [
        (lambda net: net.to(memory_format=torch.channels_last), 1e-5),
        (lambda net: net.double(), 1e-5),
        (lambda net: net.bfloat16(), 6e-2),
    ],
)
def test_conversions_after_folding(convert, tolerance):
    model = trained(ResNet())
    network = shared_copy(model)
    report = fold(network, "conv", IMAGES.float())
    before = [parameter.clone() for parameter in model.parameters()]
    convert(network)
    convert(reference := copy.deepcopy(model))
    x = IMAGES.to(next(network.parameters()).dtype)
    if tolerance == 1e-5:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = dict(reference.conv.named_parameters())
    x.requires_grad_()
    actual, expected = run(network, "conv", report, x, weights), reference(x)
    assert actual.dtype == expected.dtype == x.dtype
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
    (gradient,) = torch.autograd.grad(actual.square().sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    assert error < 10 * tolerance
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_folding_a_bfloat16_network():
    model = trained(ResNet().bfloat16())
    network = shared_copy(model)
    report = fold(network, "conv", IMAGES.bfloat16())
    assert set(report.folded) | set(report.local) == norms_of(model)
    with torch.no_grad():
        actual = run(network, "conv", report, IMAGES.bfloat16(), dict(model.conv.named_parameters()))
        exact = copy.deepcopy(model).double()(IMAGES)
        own_error = float((model(IMAGES.bfloat16()).double() - exact).norm())
    assert actual.dtype == torch.bfloat16
    assert float((actual.double() - exact).norm()) < 3 * own_error


def test_folded_network_keeps_half_of_what_training_keeps():
    x = torch.randn(8, 3, 32, 32)
    model = trained(ResNet(blocks=2, width=8)).train()
    full = saved_bytes(lambda: model(x), model.parameters())
    network = shared_copy(model)
    report = fold(network, "conv", x)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.conv.named_parameters()}
    lean = saved_bytes(lambda: run(network, "conv", report, x, weights), [*network.parameters(), *network.buffers()])
    assert lean <= 0.55 * full


@st.composite
def networks(draw) -> nn.Module:
    """A random chain of convolutions, norms and activations with residual branches."""
    channels = draw(st.integers(1, 3))
    first = nn.Conv2d(2, channels, 3, padding=1, bias=draw(st.booleans()))

    def chain(depth: int) -> nn.Sequential:
        parts: list[nn.Module] = []
        for _ in range(draw(st.integers(1, 4))):
            kind = draw(st.sampled_from(["conv", "bn", "relu", "gelu", "pool"] + ["residual"] * (depth > 0)))
            parts.append(
                {
                    "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=draw(st.booleans())),
                    "bn": lambda: nn.BatchNorm2d(channels, affine=draw(st.booleans())),
                    "relu": lambda: nn.ReLU(inplace=draw(st.booleans())),
                    "gelu": nn.GELU,
                    "pool": lambda: nn.AvgPool2d(3, 1, 1),
                    "residual": lambda: Residual(chain(depth - 1)),
                }[kind]()
            )
        return nn.Sequential(*parts)

    return nn.Sequential(first, *chain(2), nn.Flatten())


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.clone())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 2**20))
def test_any_network_computes_the_same(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    report, _ = check_equal(trained(model.double(), seed), "0", x, tolerance=1e-10)
    assert set(report.folded) | set(report.local) == norms_of(model)
