"""Every kind of layer that may come first, each in a small network that classifies four examples into three classes.

A kind's network is a `Front`: the layer, a way to take one tensor of features out of what it returns, and a small trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

ROWS, CLASSES = 4, 3


def first(out: Any) -> Any:
    """What recurrent layers and attention return first."""
    return out[0]


def same(out: Any) -> Any:
    return out


class Front(nn.Module):
    """The layer, then a tanh and a dense layer on the flattened features."""

    def __init__(self, layer: nn.Module, take: Callable[[Any], Tensor], features: int) -> None:
        super().__init__()
        self.layer, self.take = layer, take
        self.head = nn.Linear(features, CLASSES)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.take(self.layer(*args, **kwargs)).flatten(1)))  # type: ignore[no-any-return]


class Bare(nn.Module):
    """A front without its trunk."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self.layer, self.take = front.layer, front.take
        self.eval()

    def forward(self, *args: Tensor) -> Tensor:
        return self.take(self.layer(*args))


class Packed(nn.Module):
    """A recurrent layer on sequences of different lengths, in no order."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed)
        assert isinstance(out, PackedSequence)
        return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


class PerSample(nn.Module):
    """A bag whose tokens count by weights of their own."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        return self.bag(tokens, per_sample_weights=weights)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, by the fast path where no gradient is needed."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        out = self.attention(x, x, x, need_weights=False)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)  # type: ignore[no-any-return]


class Own(nn.Module):
    """A layer of the user's own: a list and a dict of parameters of different shapes, a scalar and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ParameterList([nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 2, 3))])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(3))})
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.power = nn.Parameter(torch.tensor([1.5]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(x @ self.stack[0]) ** self.power
        return self.gain * torch.einsum("bi,ijk->bjk", hidden, self.stack[1]) + self.named["shift"]


class TiedInside(nn.Module):
    """Two dense layers over ONE weight, called as a block."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Kind:
    """One kind of first layer.

    Attributes:
        name: For the test's name.
        make: Makes the layer.
        inputs: What the network takes, of four rows: a tensor, or a tuple of them.
        take: From what the layer returns to a tensor of features (4, …).
        linear: Whether the layer's output is linear (with a constant) in its parameters.
        per_example: Whether the network runs under vmap, with weights of their own for each example.
        flipout: Whether flipout is right for it.
        local: Whether local reparameterisation is.
        units: The blocks of the filterwise family; None where it is refused.
        layer: The name under which the layer is found, or is to be named.
        named: Whether it has to be named, for it is a block.
        batched: Whether the inputs' first dimension is that of the examples, as training and prediction need it.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    take: Callable[[Any], Tensor] = same
    linear: bool = True
    per_example: bool = True
    flipout: bool = False
    local: bool = False
    units: int | None = None
    layer: str = "layer"
    named: bool = False
    batched: bool = True

    def network(self, dtype: torch.dtype = torch.float32) -> Front:
        """The network in evaluation mode, with fixed weights."""
        torch.manual_seed(len(self.name))
        layer = self.make()
        with torch.no_grad():
            features = self.take(layer(*self.arguments())).flatten(1).shape[1]
        return Front(layer, self.take, features).to(dtype).eval()

    def bare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer by itself, as ``layer``, without a trunk."""
        return Bare(self.network(dtype))

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """The inputs as a tuple, floats in ``dtype``."""
        parts = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        return tuple(part.to(dtype) if part.is_floating_point() else part for part in parts)

    @property
    def asked(self) -> str | None:
        """What ``layer=`` has to say."""
        return self.layer if self.named else None

    def given(self, dtype: torch.dtype = torch.float32) -> Any:
        """The inputs as `bayesianize` takes them."""
        parts = self.arguments(dtype)
        return parts if len(parts) > 1 else parts[0]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(*shape: int, low: int = 0, high: int = 7) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


PADDED = torch.tensor([[3, 5, 0, 0], [1, 1, 2, 0], [6, 2, 5, 4], [4, 0, 0, 0]])
LENGTHS = torch.tensor([3, 5, 1, 4])

DENSE = [
    Kind("linear", lambda: nn.Linear(5, 4), randn(4, 5), flipout=True, local=True, units=4),
    Kind("linear without bias", lambda: nn.Linear(5, 4, bias=False), randn(4, 5), flipout=True, local=True, units=4),
    Kind("linear on tokens", lambda: nn.Linear(5, 4), randn(4, 3, 5), flipout=True, units=4),
    Kind("bilinear", lambda: nn.Bilinear(3, 2, 4), (randn(4, 3), randn(4, 2)), units=4),
]
CONVOLUTIONS = [
    Kind("conv1d", lambda: nn.Conv1d(2, 4, 3), randn(4, 2, 7), flipout=True, units=4),
    Kind(
        "conv1d reflect, dilated",
        lambda: nn.Conv1d(2, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
        randn(4, 2, 7),
        flipout=True,
        units=4,
    ),
    Kind(
        "conv1d replicate, same",
        lambda: nn.Conv1d(2, 4, 4, padding="same", padding_mode="replicate"),
        randn(4, 2, 7),
        flipout=True,
        units=4,
    ),
    Kind("conv2d valid", lambda: nn.Conv2d(2, 4, (1, 3), padding="valid"), randn(4, 2, 5, 6), flipout=True, units=4),
    Kind(
        "conv2d same",
        lambda: nn.Conv2d(2, 4, (3, 2), padding="same", dilation=(1, 2), bias=False),
        randn(4, 2, 5, 6),
        flipout=True,
        units=4,
    ),
    Kind(
        "conv2d strided groups",
        lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2),
        randn(4, 4, 5, 6),
        flipout=True,
        units=6,
    ),
    Kind("conv2d depthwise", lambda: nn.Conv2d(3, 6, 3, groups=3), randn(4, 3, 5, 6), flipout=True, units=6),
    Kind(
        "conv2d circular",
        lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"),
        randn(4, 2, 5, 6),
        flipout=True,
        units=3,
    ),
    Kind("conv3d", lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), randn(4, 2, 3, 4, 3), flipout=True, units=3),
    Kind(
        "conv3d replicate",
        lambda: nn.Conv3d(1, 3, 2, padding=1, padding_mode="replicate", stride=(1, 2, 1)),
        randn(4, 1, 3, 4, 3),
        flipout=True,
        units=3,
    ),
]
TRANSPOSED = [
    Kind(
        "transposed 1d",
        lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1, padding=1),
        randn(4, 3, 4),
        units=2,
    ),
    Kind(
        "transposed 2d groups",
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, dilation=(1, 2), bias=False),
        randn(4, 4, 3, 2),
        units=6,
    ),
    Kind("transposed 2d square", lambda: nn.ConvTranspose2d(3, 3, 2, stride=2), randn(4, 3, 2, 3), units=3),
    Kind(
        "transposed 3d",
        lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1), output_padding=(0, 1, 0)),
        randn(4, 2, 2, 3, 2),
        units=3,
    ),
]
EMBEDDINGS = [
    Kind("embedding", lambda: nn.Embedding(7, 3), tokens(4, 5), units=7),
    Kind("embedding with padding", lambda: nn.Embedding(7, 3, padding_idx=0), PADDED, units=7),
    Kind("sparse embedding", lambda: nn.Embedding(7, 3, sparse=True, scale_grad_by_freq=True), PADDED, units=7),
    Kind("bag mean", lambda: nn.EmbeddingBag(7, 3), tokens(4, 5), units=7),
    Kind(
        "bag max with padding", lambda: nn.EmbeddingBag(7, 3, mode="max", padding_idx=0), PADDED, linear=False, units=7
    ),
    Kind(
        "bag sum with padding", lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=-7, sparse=True), PADDED, units=7
    ),
    Kind(
        "bag with offsets",
        lambda: nn.EmbeddingBag(7, 3, mode="mean", padding_idx=2),
        (tokens(11), torch.tensor([0, 3, 3, 6])),
        units=7,
        batched=False,
    ),
    Kind(
        "bag with last offset",
        lambda: nn.EmbeddingBag(7, 3, mode="sum", include_last_offset=True),
        (tokens(9), torch.tensor([0, 2, 5, 6, 9])),
        units=7,
        batched=False,
    ),
    Kind(
        "weighted bag",
        lambda: PerSample(nn.EmbeddingBag(7, 3, mode="sum", padding_idx=0)),
        (PADDED, randn(4, 4)),
        units=7,
        layer="layer.bag",
    ),
]


RECURRENT = [
    Kind("lstm", lambda: nn.LSTM(3, 2, batch_first=True), randn(4, 5, 3), first, False, False, units=8),
    Kind(
        "lstm, two layers both ways",
        lambda: nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5),
        randn(4, 5, 3),
        first,
        False,
        False,
        units=8,
    ),
    Kind("lstm, projected", lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True), randn(4, 5, 3), first, False, False),
    Kind(
        "lstm, packed",
        lambda: Packed(nn.LSTM(3, 2, batch_first=True)),
        (randn(4, 5, 3), LENGTHS),
        linear=False,
        per_example=False,
        units=8,
        layer="layer.rnn",
    ),
    Kind(
        "gru without bias",
        lambda: nn.GRU(3, 2, bias=False, bidirectional=True, batch_first=True),
        randn(4, 5, 3),
        first,
        False,
        False,
        units=6,
    ),
    Kind(
        "rnn with relu",
        lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
        randn(4, 5, 3),
        first,
        False,
        False,
        units=4,
    ),
    Kind("gru cell", lambda: nn.GRUCell(3, 2), randn(4, 3), linear=False, units=6),
]
ATTENTION = [
    Kind(
        "attention",
        lambda: SelfAttention(nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.5)),
        randn(4, 5, 4),
        linear=False,
        layer="layer.attention",
    ),
    Kind(
        "attention, sequence first",
        lambda: SelfAttention(nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True)),
        randn(4, 5, 4),
        linear=False,
        layer="layer.attention",
    ),
    Kind(
        "cross attention",
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True, bias=False),
        (randn(4, 5, 4), randn(4, 6, 3), randn(4, 6, 5)),
        first,
        False,
        units=4,
    ),
    Kind(
        "transformer layer's attention",
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True),
        randn(4, 5, 4),
        linear=False,
        layer="layer.self_attn",
    ),
]
OWN = [
    Kind("own module", Own, randn(4, 5), linear=False),
    Kind("weight norm", lambda: parametrizations.weight_norm(nn.Linear(5, 4)), randn(4, 5), linear=False, units=4),
    Kind(
        "spectral norm",
        lambda: parametrizations.spectral_norm(nn.Conv1d(2, 4, 3)),
        randn(4, 2, 7),
        linear=False,
        units=4,
    ),
    Kind("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(4, 4)), randn(4, 4), linear=False, units=4),
    Kind("tied inside", TiedInside, randn(4, 5), linear=False, units=5, named=True),
    Kind(
        "block of embeddings",
        lambda: nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 2)),
        PADDED,
        linear=False,
        named=True,
    ),
]
KINDS = [*DENSE, *CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS, *RECURRENT, *ATTENTION, *OWN]
