"""The first layer is first in execution order, and looking for it leaves the model as it was."""

from __future__ import annotations

import random
import socket
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stfbnn.errors import InputError, LayerError
from stfbnn.locate import FirstLayer, locate_first_layer, parametric_leaves
from stfbnn.wrappers import unwrap

IMAGES = torch.zeros(2, 3, 8, 8)


def conv_net() -> nn.Sequential:
    body = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.5)))
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d(1), body=body, flat=nn.Flatten(), head=nn.Linear(256, 2)))


class Backwards(nn.Module):
    """Registers its layers in the opposite of the order in which it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(9, 9)
        self.first = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = self.step(x)
        return x


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        on_right = self.right(right)
        return self.left(left) + on_right


class Text(nn.Module):
    def __init__(self, tie: str | None = None) -> None:
        super().__init__()
        self.decoder = nn.Linear(6, 11, bias=False)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.embed = nn.Embedding(11, 6)
        if tie == "parameter":
            self.decoder.weight = self.embed.weight
        elif tie == "memory":
            self.decoder.weight = nn.Parameter(self.embed.weight.data)
        elif tie == "module":
            self.shared = self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embed(input_ids))[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x, x, x)[0])


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
        )
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1))[:, 0])


def test_nested_sequential() -> None:
    assert locate_first_layer(conv_net(), IMAGES) == FirstLayer("body.conv", ("weight", "bias"), 1, (), ())
    assert parametric_leaves(conv_net(), IMAGES) == ["body.conv", "body.norm", "head"]


def test_execution_order_not_registration_order() -> None:
    assert locate_first_layer(Backwards(), torch.zeros(2, 3)) == FirstLayer("first", ("weight",), 1, (), ())
    assert parametric_leaves(Backwards(), torch.zeros(2, 3)) == ["first", "last"]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_counts_the_calls(times: int) -> None:
    assert locate_first_layer(Reused(), (torch.zeros(1, 4), times)).calls == times
    assert parametric_leaves(Reused(), (torch.zeros(1, 4), times)) == ["step"]


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.zeros(2, 3), torch.zeros(2, 5)),
        [torch.zeros(2, 3), torch.zeros(2, 5)],
        {"right": torch.zeros(2, 5), "left": torch.zeros(2, 3)},
    ],
    ids=["tuple", "list", "mapping"],
)
def test_several_inputs(inputs: object) -> None:
    assert locate_first_layer(TwoInputs(), inputs).name == "right"


def test_embedding_then_lstm() -> None:
    ids = torch.zeros(2, 7, dtype=torch.long)
    assert locate_first_layer(Text(), {"input_ids": ids}) == FirstLayer("embed", ("weight",), 1, (), ())
    assert parametric_leaves(Text(), ids) == ["embed", "rnn", "decoder"]
    assert locate_first_layer(Text(), ids, layer="rnn").parameters[0] == "weight_ih_l0"


@pytest.mark.parametrize(
    ("tie", "places"),
    [("parameter", ("decoder.weight",)), ("memory", ("decoder.weight",)), ("module", ("shared.weight",))],
)
def test_ties_are_reported(tie: str, places: tuple[str, ...]) -> None:
    assert locate_first_layer(Text(tie), torch.zeros(2, 7, dtype=torch.long)).tied == places


def test_multihead_attention_is_one_layer() -> None:
    found = locate_first_layer(Attention(), torch.zeros(2, 5, 8))
    assert found.name == "mix"
    assert set(found.parameters) == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    with pytest.raises(LayerError, match="'mix' reads its parameters without calling it"):
        locate_first_layer(Attention(), torch.zeros(2, 5, 8), layer="mix.out_proj")


def test_container_with_a_token_of_its_own_is_no_layer() -> None:
    assert locate_first_layer(VisionTransformer(), IMAGES).name == "patches"
    # The fused path of a transformer encoder in eval mode calls none of its parts; while watched it must not be taken.
    assert "encoder.layers.0.linear1" in parametric_leaves(VisionTransformer(), IMAGES)


class TinyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ConvBatchNorm(nn.Module):
    """A block whose name ends like a normalisation's, but whose weight is a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize(
    "passed",
    [nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3), nn.PReLU(), TinyRMSNorm()],
    ids=lambda module: type(module).__name__,
)
def test_normalisations_and_activations_are_passed_over(passed: nn.Module) -> None:
    model = nn.Sequential(nn.Sequential(passed), nn.ReLU(), nn.Linear(3, 2))
    found = locate_first_layer(model, torch.zeros(2, 3))
    assert (found.name, found.skipped) == ("2", ("0.0",))
    assert parametric_leaves(model, torch.zeros(2, 3)) == ["0.0", "2"]
    named = locate_first_layer(model, torch.zeros(2, 3), layer="0.0")
    assert (named.name, named.skipped) == ("0.0", ())


def test_normalisation_without_parameters_is_not_listed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.LocalResponseNorm(2), nn.Conv2d(3, 2, 3))
    assert locate_first_layer(model, IMAGES) == FirstLayer("2", ("weight", "bias"), 1, (), ())


def test_block_named_like_a_normalisation_is_a_layer() -> None:
    assert locate_first_layer(nn.Sequential(ConvBatchNorm(), nn.Conv2d(4, 2, 1)), IMAGES).name == "0"


def test_parametrised_weight_belongs_to_its_layer() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    found = locate_first_layer(model, torch.zeros(2, 3))
    assert found.name == "0"
    assert set(found.parameters) == {
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }
    assert parametric_leaves(model, torch.zeros(2, 3)) == ["0", "1"]


def test_the_model_itself() -> None:
    assert locate_first_layer(nn.Linear(3, 2), torch.zeros(1, 3)) == FirstLayer("", ("weight", "bias"), 1, (), ())
    assert locate_first_layer(nn.Linear(3, 2), torch.zeros(1, 3), layer="").name == ""


def test_a_block_can_be_named() -> None:
    found = locate_first_layer(conv_net(), IMAGES, layer="body")
    assert found.parameters == ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
    assert found.calls == 1


def test_inputs_partly_on_another_device_are_the_models_business() -> None:
    found = locate_first_layer(TwoInputs(), {"left": torch.zeros(2, 3), "right": torch.zeros(2, 5)})
    assert found.name == "right"
    with pytest.raises(InputError, match=r"are on meta and the model is on cpu; move them.*\.to\('cpu'\)"):
        locate_first_layer(conv_net(), IMAGES.to("meta"))


# --- wrappers


def test_unwraps_nested_wrappers() -> None:
    plain = conv_net()
    assert unwrap(plain) is plain
    wrapped = torch.compile(nn.DataParallel(torch.compile(plain, backend="eager")), backend="eager")
    assert unwrap(wrapped) is plain
    assert locate_first_layer(wrapped, IMAGES).name == "body.conv"


def test_unwraps_fabric_and_distributed() -> None:
    from lightning_fabric import Fabric

    plain = conv_net()
    fabric = Fabric(accelerator="cpu", devices=1)
    assert unwrap(fabric.setup(plain)) is plain
    assert unwrap(fabric.setup(torch.compile(plain, backend="eager"))) is plain
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert unwrap(torch.compile(nn.parallel.DistributedDataParallel(plain), backend="eager")) is plain
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_parts_are_seen_through() -> None:
    model = conv_net()
    model.body = torch.compile(model.body, backend="eager")
    model(IMAGES)  # compiled before anyone watches
    assert locate_first_layer(model, IMAGES).name == "body._orig_mod.conv"
    inplace = conv_net()
    inplace.compile(backend="eager")
    inplace(IMAGES)
    assert locate_first_layer(inplace, IMAGES).name == "body.conv"


# --- the user's model stays as it was


class Counting(nn.Module):
    """Changes its buffers and draws random numbers even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.embed = nn.Embedding(5, 4, max_norm=0.1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        random.random()
        noise = torch.rand(()) + float(np.random.rand())
        return self.head(nn.functional.dropout(self.embed(x), 0.5)) + noise


def test_leaves_model_and_random_states_untouched() -> None:
    model = Counting()
    model.train()
    model.head.eval()
    model.head.bias.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    modes = {name: module.training for name, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    assert parametric_leaves(model, torch.arange(5)) == ["embed", "head"]
    with pytest.raises(InputError):
        locate_first_layer(model, torch.zeros(2, 3))  # also where the run fails half-way

    assert {name: module.training for name, module in model.named_modules()} == modes
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor and torch.equal(tensor, values[name]) for name, tensor in tensors.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == 1
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_batch_norm_statistics_are_untouched() -> None:
    model = conv_net().train()
    locate_first_layer(model, IMAGES + 5)
    assert model.body.norm.num_batches_tracked == 0
    assert torch.equal(model.body.norm.running_mean, torch.zeros(4))


# --- what is refused, and how


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet", InputError, "must be a torch.nn.Module, but it is a str"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), LayerError, "has no parameters"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.PReLU()), LayerError, r"'0', '1'.*name it with layer="),
        (nn.Conv2d(4, 2, 3), InputError, r"float32 of shape \(2, 3, 8, 8\)\): RuntimeError.*what the model takes"),
        (nn.Sequential(nn.LazyConv2d(2, 3)), LayerError, "'0.weight' belongs to a lazy module"),
        (nn.LazyBatchNorm2d(affine=False), LayerError, "'running_mean' belongs to a lazy module"),
        (nn.Conv2d(3, 2, 3, device="meta"), LayerError, "'weight' is on the meta device"),
        (nn.Conv2d(3, 2, 3, dtype=torch.complex64), InputError, "could not be run"),
    ],
)
def test_refused_models(model: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        locate_first_layer(model, IMAGES)


def test_the_cause_is_chained() -> None:
    with pytest.raises(InputError) as caught:
        locate_first_layer(nn.Linear(4, 2), torch.zeros(1, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("body.cnv", r"no module 'body.cnv'; did you mean 'body.conv'.*'body.conv', 'body.norm', 'head'"),
        ("zzz", "no module 'zzz'; Layers with"),
        ("pad", r"'pad' \(ZeroPad2d\) has no parameters"),
    ],
)
def test_refused_names(layer: str, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        locate_first_layer(conv_net(), IMAGES, layer=layer)


def test_uncalled_layer_is_refused() -> None:
    with pytest.raises(LayerError, match=r"'unused' is never called.*Called, in order: 'first', 'last'"):
        locate_first_layer(Backwards(), torch.zeros(2, 3), layer="unused")


class Odd(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.real.float()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, dtype=torch.complex64), "complex"),
        (torch.ones(3, dtype=torch.int8), "torch.int8, a quantised or integer type"),
        (torch.ones(3, dtype=torch.float8_e4m3fn), "quantised"),
        (torch.tensor([1.0, float("nan"), 1.0]), "NaN or infinite"),
    ],
)
@pytest.mark.parametrize("layer", [None, "0"])
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_weights_without_a_posterior_are_refused(weight: Tensor, message: str, layer: str | None) -> None:
    with pytest.raises(LayerError, match=message):
        locate_first_layer(nn.Sequential(Odd(weight), nn.Linear(3, 2)), torch.zeros(1, 3), layer=layer)


def test_self_normalising_embedding_is_refused() -> None:
    with pytest.raises(LayerError, match=r"max_norm=0\.1"):
        locate_first_layer(Counting(), torch.arange(5))


def test_exported_graph_is_refused() -> None:
    exported = torch.export.export(Backwards().eval(), (torch.zeros(2, 3),)).module()
    with pytest.raises(LayerError, match="exported graph"):
        locate_first_layer(exported, torch.zeros(2, 3))
