"""Frozen layers: their values and derivatives against PyTorch's own, and what they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from trunk_networks import ResNet, saved_bytes, trained

from stfbnn.trunk import FrozenAffine, FrozenConv1d, FrozenConv2d, FrozenConv3d, fold, shared_copy
from stfbnn.trunk.frozen_ops import freeze_convolution, freeze_norm

# PyTorch's own: the first forward-mode derivative loads its table of decompositions, and uneven "same" padding is noted.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]

CONVOLUTIONS = [
    (nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 2, 8), FrozenConv1d),
    (nn.Conv1d(2, 3, 4, padding="same", dilation=2, bias=False), (2, 2, 9), FrozenConv1d),
    (nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 7), FrozenConv1d),
    (nn.Conv2d(4, 4, (3, 2), stride=(3, 2), padding=(1, 0), groups=2), (2, 4, 6, 5), FrozenConv2d),
    (nn.Conv2d(2, 3, 3, padding="valid", dilation=(1, 2)), (1, 2, 4, 6), FrozenConv2d),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 5), FrozenConv2d),
    (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular", stride=1), (1, 2, 4, 5), FrozenConv2d),
    (nn.Conv3d(2, 2, 2, stride=2, padding=(1, 0, 0)), (1, 2, 3, 4, 5), FrozenConv3d),
]


def frozen(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A float64 layer and its frozen form."""
    plain = shared_copy(layer).double()
    lean = shared_copy(plain)
    freeze_convolution(lean) if isinstance(layer, nn.modules.conv._ConvNd) else freeze_norm(lean)
    return plain, lean


def example(shape: tuple[int, ...], **options: object) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("layer", "shape", "kind"), CONVOLUTIONS)
def test_convolution(layer, shape, kind):
    plain, lean = frozen(layer)
    assert type(lean) is kind
    x = example(shape)
    expected, actual = plain(x), lean(x)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, weights)[0], torch.autograd.grad(expected, x, weights)[0])
    assert torch.autograd.gradcheck(lean, x)
    assert torch.autograd.gradgradcheck(lean, x)


@pytest.mark.parametrize(("layer", "shape", "kind"), CONVOLUTIONS)
def test_convolution_under_vmap_and_forward_mode(layer, shape, kind):
    plain, lean = frozen(layer)
    many = torch.stack([example(shape).detach() * factor for factor in (1.0, -0.5, 2.0)])
    tangents = torch.randn_like(many)

    def gradient(module: nn.Module):
        return grad(lambda x: module(x).pow(3).sum())

    torch.testing.assert_close(vmap(lean)(many), vmap(plain)(many))
    torch.testing.assert_close(vmap(gradient(lean))(many), vmap(gradient(plain))(many))
    by_hand = torch.stack([gradient(plain)(x) for x in many])
    torch.testing.assert_close(grad(lambda x: vmap(lean)(x).pow(3).sum())(many), by_hand)
    torch.testing.assert_close(jvp(lean, (many[0],), (tangents[0],))[1], jvp(plain, (many[0],), (tangents[0],))[1])
    torch.testing.assert_close(
        jvp(gradient(lean), (many[0],), (tangents[0],))[1], jvp(gradient(plain), (many[0],), (tangents[0],))[1]
    )


def test_hessian_through_a_frozen_convolution():
    plain, lean = frozen(nn.Conv2d(1, 2, 2))
    x = example((1, 1, 3, 3)).detach()
    of = [hessian(lambda value, module=module: module(value).tanh().sum())(x) for module in (plain, lean)]
    torch.testing.assert_close(of[0], of[1])


def test_convolution_keeps_the_weight_alone():
    plain, lean = frozen(nn.Conv2d(4, 4, 3, padding=1))
    x = example((2, 4, 8, 8))
    assert saved_bytes(lambda: plain(x), plain.parameters()) == x.untyped_storage().nbytes()
    assert saved_bytes(lambda: lean(x), lean.parameters()) == 0


@pytest.mark.parametrize("activation", [torch.relu, torch.sigmoid, torch.tanh])
def test_convolution_of_what_is_kept_anyway(activation):
    plain, lean = frozen(nn.Conv2d(4, 4, 3, padding=1))
    x = example((2, 4, 8, 8))
    y = lean(activation(x))
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
    assert saved_bytes(lambda: lean(activation(x)), lean.parameters()) == x.untyped_storage().nbytes()
    torch.testing.assert_close(y, plain(activation(x)))


def test_linear_with_frozen_weight_keeps_no_input():
    layer = shared_copy(nn.Linear(4, 3))
    x = torch.randn(5, 4, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 0


def test_a_weight_that_trains_gets_its_gradient():
    plain, lean = frozen(nn.Conv2d(2, 3, 3))
    x = example((1, 2, 4, 4))
    weight = plain.weight.clone().requires_grad_()
    got = [
        torch.autograd.grad(functional_call(module, {"weight": weight}, (x,)).square().sum(), weight)[0]
        for module in (plain, lean)
    ]
    torch.testing.assert_close(got[0], got[1])


def test_unbatched_input_and_no_gradient():
    plain, lean = frozen(nn.Conv2d(2, 3, 3))
    x = example((2, 4, 4))
    torch.testing.assert_close(lean(x), plain(x))
    with torch.no_grad():
        assert lean(x).grad_fn is None


def test_convolution_keeps_channels_last():
    _, lean = frozen(nn.Conv2d(4, 4, 3, padding=1))
    lean.to(memory_format=torch.channels_last)
    x = example((2, 4, 6, 5)).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = lean(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_convolution_under_autocast():
    layer = shared_copy(nn.Conv2d(3, 4, 3))
    lean = shared_copy(layer)
    freeze_convolution(lean)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = []
    for module in (layer, lean):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        results.append((y, gradient))
    assert results[1][0].dtype == torch.bfloat16
    assert results[1][1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm1d(3, affine=False), (4, 3, 2)),
        (nn.BatchNorm2d(3, momentum=None), (2, 3, 2, 4)),
        (nn.BatchNorm3d(3, eps=0.1), (2, 3, 2, 1, 2)),
        (nn.SyncBatchNorm(3), (2, 3, 2, 2)),
    ],
)
def test_norm(norm, shape):
    plain, lean = frozen(trained(norm))
    x = example(shape)
    torch.testing.assert_close(lean(x), plain(x))
    assert torch.autograd.gradcheck(lean, x)
    assert torch.autograd.gradgradcheck(lean, x)
    assert saved_bytes(lambda: lean(x), [*lean.parameters(), *lean.buffers()]) == 0
    torch.testing.assert_close(vmap(lean)(x[None]), plain(x)[None])
    lean.train()
    torch.testing.assert_close(lean(x), plain(x))


def test_norm_keeps_what_user_code_may_read():
    plain, lean = frozen(trained(nn.BatchNorm2d(3)))
    assert isinstance(lean, FrozenAffine)
    assert (lean.num_features, lean.eps, lean.momentum, lean.affine) == (3, 1e-5, 0.1, True)
    assert lean.state_dict().keys() == plain.state_dict().keys()
    assert lean.running_mean.data_ptr() == plain.running_mean.data_ptr()
    with pytest.raises(ValueError, match="dimensions"):
        lean(torch.zeros(3, 2, 2))


def test_norm_in_mixed_precision_keeps_the_inputs_dtype():
    plain = shared_copy(trained(nn.BatchNorm2d(3)))
    lean = shared_copy(plain)
    freeze_norm(lean)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    assert lean(x).dtype == torch.bfloat16
    assert lean(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(lean(x).float(), plain(x.float()), rtol=1e-2, atol=1e-2)


def test_frozen_convolutions_pay_where_the_activation_keeps_its_input():
    x = torch.randn(2, 3, 16, 16)
    kept = {}
    for activation in (nn.ReLU, nn.GELU):
        model = trained(ResNet(activation=activation))
        for lean in (True, False):
            network = shared_copy(model)
            fold(network, "conv", x)
            if not lean:
                for module in network.modules():
                    if isinstance(module, FrozenConv2d):
                        module.__class__ = nn.Conv2d
            own = [*network.parameters(), *network.buffers()]
            leaf = x.clone().requires_grad_()
            kept[activation, lean] = saved_bytes(lambda net=network, leaf=leaf: net(leaf), own)
    assert kept[nn.GELU, True] < 0.7 * kept[nn.GELU, False]
    assert kept[nn.ReLU, True] <= kept[nn.ReLU, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_folded_network_compiles_without_breaks_and_exports():
    model = trained(ResNet(activation=nn.GELU))
    network = shared_copy(model)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fold(network, "conv", x.detach())
    expected = network(x)
    actual = torch.compile(network, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), x), torch.autograd.grad(expected.sum(), x))
    exported = torch.export.export(network, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), expected.detach(), rtol=1e-5, atol=1e-5)


def test_double_backward_of_a_functional_reference():
    # Against the formula, not against the layer: d/dx sum((w * x)^2) differentiated once more along v.
    _, lean = frozen(nn.Conv1d(1, 1, 2, bias=False))
    x = example((1, 1, 4))
    weight = lean.weight.flatten()
    matrix = torch.zeros(3, 4, dtype=torch.float64)
    for row in range(3):
        matrix[row, row : row + 2] = weight
    (first,) = torch.autograd.grad(lean(x).square().sum(), x, create_graph=True)
    v = torch.arange(4.0, dtype=torch.float64)
    (second,) = torch.autograd.grad((first.flatten() * v).sum(), x)
    torch.testing.assert_close(second.flatten(), 2 * matrix.T @ matrix @ v)
    torch.testing.assert_close(F.linear(x.detach(), matrix), lean(x).detach())
