"""Random small networks: what comes before the first layer, the layer, what follows it, and how all are wired.

A `Graph` follows from a `Plan` of plain words and a seed, so that a failing example can be read off hypothesis' report.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

ROWS, CLASSES, WIDTH, TOKENS = 6, 3, 6, 9
SHAPES = {"vector": (5,), "sequence": (4, 5), "image": (4, 5, 4), "tokens": (4,)}

LAYERS = {
    "vector": ("linear", "linear without bias", "weight norm", "bilinear", "gru cell", "own"),
    "sequence": ("linear", "rows", "lstm", "gru", "attention", "conv1d", "encoder"),
    "image": (
        "conv",
        "conv circular",
        "conv same",
        "grouped conv",
        "transposed",
        "grouped transposed",
        "weight norm conv",
    ),
    "tokens": ("embedding", "padded embedding", "bag", "padded bag", "weight norm embedding"),
}
BEFORE = ("layer norm", "batch norm", "prelu", "dropout", "scaled", "shifted in place", "batch statistics")
AFTER = ("batch norm", "batch norm", "layer", "relu in place", "tanh", "group norm", "dropout", "silu")
BLOCKS = (
    "dense",
    "dense batch norm",
    "residual",
    "bypass",
    "shared",
    "two names",
    "dropout",
    "prelu",
    "attention",
    "lookup",
)


@dataclass(frozen=True)
class Plan:
    """What a graph is made of.

    Attributes:
        form: Of the data.
        layer: The first layer.
        before: What runs before it.
        after: What runs on its output, in its own shape.
        blocks: What runs on the flattened features.
        passing: How inputs are given: "tensor", "tuple" or "mapping" (the last two with a second input).
        output: What the network returns.
        again: Whether the first layer is called a second time, on the reversed inputs.
        tie: "" or how the layer's weight is used elsewhere: as another module's Parameter, or read by the forward method.
        hook: "" or "output", "input", "forward": what is hung on the layer.
        keyword: Whether the layer is called with its argument's name.
        double: Whether all is in float64.
        training: Whether the model is in training mode when it is converted.
        frozen: Whether the model's parameters need no gradients.
        backwards: Whether the layer is registered last.
        seed: Of the weights and the data.
    """

    form: str
    layer: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    passing: str = "tensor"
    output: str = "tensor"
    again: bool = False
    tie: str = ""
    hook: str = ""
    keyword: bool = False
    double: bool = False
    training: bool = False
    frozen: bool = False
    backwards: bool = False
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    @property
    def unusable(self) -> tuple[str, ...]:
        """Why `bayesianize` or `fit` has to refuse the network: words of which its message has one; none where it must not."""
        reasons = []
        if "shifted in place" in self.before:
            reasons.append("in place")
        if "batch statistics" in self.before:
            reasons.append("other examples of its batch")
        if self.layer == "weight norm embedding":
            reasons.append("row for padding")
        return tuple(reasons)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of all kinds; the odd ones are rare, so that most networks run."""
    form = draw(st.sampled_from(sorted(SHAPES)))
    layer = draw(st.sampled_from(LAYERS[form]))
    if layer == "weight norm embedding" and draw(st.integers(0, 3)):
        layer = "padded embedding"
    rare = st.sampled_from([False, False, False, True])
    usual = [one for one in BEFORE if one not in ("shifted in place", "batch statistics")]
    before = draw(st.lists(st.sampled_from(usual), max_size=2)) if form != "tokens" else []
    if form != "tokens" and draw(st.integers(0, 11)) == 11:
        # Alone: a normalisation of another kind after it may undo it.
        before = [draw(st.sampled_from(["shifted in place", "batch statistics"]))]
    dense = layer in ("linear", "linear without bias") and form == "vector"
    ties = (
        [""] * 3
        + (["read"] if dense else [])
        + (["parameter", "read"] if "embedding" in layer and "norm" not in layer else [])
    )
    hookable = layer not in ("lstm", "gru", "attention", "encoder", "bilinear", "gru cell")
    return Plan(
        form=form,
        layer=layer,
        before=tuple(before),
        after=tuple(draw(st.lists(st.sampled_from(AFTER), max_size=2))),
        blocks=tuple(draw(st.lists(st.sampled_from(BLOCKS), max_size=3))),
        passing=draw(st.sampled_from(["tensor", "tuple", "mapping"])),
        output=draw(st.sampled_from(["tensor", "mapping", "object", "tuple"])),
        again=draw(rare),
        tie=draw(st.sampled_from(ties)),
        hook=draw(st.sampled_from(["", "", "", "output", "input", "forward"])) if hookable else "",
        keyword=draw(rare) and hookable and layer not in ("own",),
        double=draw(rare),
        training=draw(rare),
        frozen=draw(rare),
        backwards=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Own(nn.Module):
    """A layer of the user's own, with a scalar and a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))])
        self.gain = nn.Parameter(torch.tensor(0.8))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.gain * torch.sin(input @ self.parts[0]) + self.parts[1]


def make_layer(plan: Plan) -> nn.Module:
    name = plan.layer
    makers: dict[str, Any] = {
        "linear": lambda: nn.Linear(5, 5),
        "rows": lambda: nn.Linear(5, 3),
        "linear without bias": lambda: nn.Linear(5, 4, bias=False),
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 4)),
        "bilinear": lambda: nn.Bilinear(5, 5, 4),
        "gru cell": lambda: nn.GRUCell(5, 4),
        "own": Own,
        "lstm": lambda: nn.LSTM(5, 3, batch_first=True, bidirectional=True),
        "gru": lambda: nn.GRU(5, 3, num_layers=2, batch_first=True, dropout=0.3),
        "attention": lambda: nn.MultiheadAttention(5, 1, batch_first=True, dropout=0.3),
        "encoder": lambda: nn.TransformerEncoderLayer(5, 1, 7, batch_first=True),
        "conv1d": lambda: nn.Conv1d(5, 3, 2, stride=2, padding=1, padding_mode="replicate"),
        "conv": lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), dilation=(1, 1), bias=False),
        "conv circular": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
        "conv same": lambda: nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="reflect"),
        "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
        "transposed": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2, output_padding=1),
        "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
        "weight norm conv": lambda: parametrizations.weight_norm(nn.Conv2d(4, 3, 2)),
        "embedding": lambda: nn.Embedding(TOKENS, 5),
        "padded embedding": lambda: nn.Embedding(TOKENS, 5, padding_idx=1),
        "bag": lambda: nn.EmbeddingBag(TOKENS, 5, mode="max"),
        "padded bag": lambda: nn.EmbeddingBag(TOKENS, 5, mode="sum", padding_idx=1),
        "weight norm embedding": lambda: parametrizations.weight_norm(nn.Embedding(TOKENS, 5, padding_idx=1)),
    }
    layer: nn.Module = makers[name]()
    if plan.hook == "output":
        layer.register_forward_hook(lambda _module, _inputs, output: 1.5 * output)
    elif plan.hook == "input" and plan.form != "tokens" and not plan.keyword:
        layer.register_forward_pre_hook(lambda _module, inputs: tuple(0.5 * one for one in inputs))
    elif plan.hook == "forward":
        layer.forward = types.MethodType(_doubled, layer)  # type: ignore[method-assign]
    return layer


def _doubled(self: nn.Module, input: Tensor) -> Tensor:  # noqa: A002
    return 2.0 * type(self).forward(self, input)  # type: ignore[no-any-return]


class Lookup(nn.Module):
    """Adds a row of a second embedding, chosen by the sign of the first feature: control flow on data, within a row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0] > 0).long())  # type: ignore[no-any-return]


class Graph(nn.Module):
    """The network of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        torch.manual_seed(plan.seed)
        if not plan.backwards:
            self.layer = make_layer(plan)
        channels = SHAPES[plan.form][0] if plan.form in ("vector", "image") else SHAPES[plan.form][-1]
        self.before = nn.ModuleList([self._before(name, channels) for name in plan.before])
        self.side = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList()
        if plan.backwards:
            self.layer = make_layer(plan)
        with torch.no_grad():
            raw = torch.zeros(2, *SHAPES[plan.form], dtype=torch.long if plan.form == "tokens" else torch.float32)
            out = self._first(raw)
        self.after = nn.ModuleList([self._after(name, out) for name in plan.after])
        self.project = nn.Linear(out[0].numel(), WIDTH)
        flat = raw[0].numel()
        for name in plan.blocks:
            self.blocks.append(self._block(name, flat))
        if "two names" in plan.blocks:
            self.alias = self.blocks[plan.blocks.index("two names")]
        if plan.tie == "parameter":
            self.tied = nn.Linear(5, TOKENS, bias=False)
            self.tied.weight = self.layer.weight  # type: ignore[assignment]
        self.tied_in = nn.Linear(WIDTH, 5)
        self.tied_out = nn.Linear({"linear": 5, "linear without bias": 4}.get(plan.layer, TOKENS), WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self._randomise()

    def _before(self, name: str, channels: int) -> nn.Module:
        batch_norms = {"vector": nn.BatchNorm1d, "sequence": nn.BatchNorm1d, "image": nn.BatchNorm2d}
        norm = batch_norms.get(self.plan.form, nn.BatchNorm1d)
        over = 4 if self.plan.form == "sequence" else channels
        makers: dict[str, Any] = {
            "layer norm": lambda: nn.LayerNorm(SHAPES[self.plan.form][-1:]),
            "batch norm": lambda: norm(over),
            "batch statistics": lambda: norm(over, track_running_stats=False),
            "prelu": nn.PReLU,
            "dropout": lambda: nn.Dropout(0.4, inplace=True),
        }
        return makers.get(name, nn.Identity)()  # type: ignore[no-any-return]

    def _after(self, name: str, out: Tensor) -> nn.Module:
        width = out.shape[1]
        layers = {2: lambda: nn.Linear(width, width), 3: lambda: nn.Conv1d(width, width, 1)}
        norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
        makers: dict[str, Any] = {
            "batch norm": lambda: norms[out.ndim](width),
            "layer": layers.get(out.ndim, lambda: nn.Conv2d(width, width, 3, padding=1, bias=False)),
            "relu in place": lambda: nn.ReLU(inplace=True),
            "tanh": nn.Tanh,
            "group norm": lambda: nn.GroupNorm(1, width),
            "dropout": lambda: nn.Dropout(0.4),
            "silu": nn.SiLU,
        }
        return makers[name]()  # type: ignore[no-any-return]

    def _block(self, name: str, flat: int) -> nn.Module:
        makers: dict[str, Any] = {
            "dense": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()),
            "dense batch norm": lambda: nn.Sequential(
                nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()
            ),
            "residual": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()),
            "bypass": lambda: nn.Linear(WIDTH + flat, WIDTH),
            "shared": lambda: nn.Linear(WIDTH, WIDTH),
            "two names": lambda: nn.Linear(WIDTH, WIDTH),
            "dropout": lambda: nn.Dropout(0.4),
            "prelu": nn.PReLU,
            "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True),
            "lookup": Lookup,
        }
        return makers[name]()  # type: ignore[no-any-return]

    def _randomise(self) -> None:
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    if module.running_mean is not None and module.running_var is not None:
                        module.running_mean.normal_()
                        module.running_var.uniform_(0.3, 2)
                    module.weight.normal_(1, 0.5)
                    module.bias.normal_()
        self.to(self.plan.dtype)
        self.train(self.plan.training)
        self.requires_grad_(not self.plan.frozen)

    def _call(self, x: Tensor) -> Tensor:
        """The first layer on inputs of its form, whatever else it takes or returns."""
        name, layer = self.plan.layer, self.layer
        if name == "bilinear":
            return layer(x, torch.tanh(x))  # type: ignore[no-any-return]
        if name in ("lstm", "gru"):
            return layer(x)[0]  # type: ignore[no-any-return]
        if name == "attention":
            return layer(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        if name == "conv1d":
            x = x.transpose(1, 2)
        if name == "rows":
            out = layer(input=x.reshape(-1, 5)) if self.plan.keyword else layer(x.reshape(-1, 5))
            return out.view(len(x), -1)  # type: ignore[no-any-return]
        return layer(input=x) if self.plan.keyword else layer(x)  # type: ignore[no-any-return]

    def _first(self, x: Tensor) -> Tensor:
        out = self._call(x)
        return out + self._call(x.flip(-1)) if self.plan.again else out

    def forward(self, x: Tensor, side: Tensor | None = None, scale: float = 1.0) -> Any:
        raw = x
        for name, module in zip(self.plan.before, self.before, strict=True):
            if name == "shifted in place":
                x += 0.25
            x = 0.5 * x if name == "scaled" else module(x)
        h = self._first(x)
        for module in self.after:
            h = module(h)
        h = self.project(h.flatten(1))
        if side is not None:
            h = h + torch.sigmoid(self.side(side))
        for name, module in zip(self.plan.blocks, self.blocks, strict=True):
            h = self._run(name, module, h, raw)
        if self.plan.tie == "parameter":
            h = h + self.tied_out(torch.tanh(self.tied(self.tied_in(h))))
        elif self.plan.tie == "read":
            h = h + self.tied_out(torch.tanh(F.linear(self.tied_in(h), self.layer.weight)))  # type: ignore[arg-type]
        logits = scale * self.head(h)
        returned = {
            "mapping": {"loss": None, "logits": logits},
            "object": SimpleNamespace(logits=logits),
            "tuple": (logits, h),
        }
        return returned.get(self.plan.output, logits)

    def _run(self, name: str, module: nn.Module, h: Tensor, raw: Tensor) -> Tensor:
        out: Tensor
        if name == "residual":
            out = h + module(h)
        elif name == "bypass":
            out = torch.relu(module(torch.cat([h, raw.flatten(1).to(h.dtype)], dim=1)))
        elif name == "shared":
            out = module(torch.tanh(module(h)))
        elif name == "two names":
            out = self.alias(torch.tanh(module(h)))
        elif name == "attention":
            out = module(h.unsqueeze(1)).squeeze(1)
        else:
            out = module(h)
        return out


def inputs_of(plan: Plan) -> Any:
    """Six rows of a plan's inputs, in the way in which they are passed."""
    generator = torch.Generator().manual_seed(plan.seed + 1)
    if plan.form == "tokens":
        x = torch.randint(0, TOKENS, (ROWS, *SHAPES["tokens"]), generator=generator)
    else:
        x = torch.randn(ROWS, *SHAPES[plan.form], generator=generator).to(plan.dtype)
    side = torch.randn(ROWS, 2, generator=generator).to(plan.dtype)
    if plan.passing == "tuple":
        return x, side
    return {"x": x, "side": side, "scale": 0.7} if plan.passing == "mapping" else x


def output_of(plan: Plan) -> Any:
    """What ``output=`` has to be."""
    return (lambda raw: raw[0]) if plan.output == "tuple" else None
