"""Networks of the kinds that people deploy, small, with inputs for them."""

from typing import Any

import torch
from torch import Tensor, nn

from core_models import conv_net, mlp
from stfbnn.conversion import bayesianize
from stfbnn.likelihood import Categorical, Likelihood
from stfbnn.network import BayesianNetwork


def ready(model: nn.Module, example: Any, likelihood: Likelihood | None = None, **options: Any) -> BayesianNetwork:
    """A network that predicts, with a posterior wide enough to see."""
    options = {"posterior": "mean-field", "prior": 3.0, **options}
    bnn = bayesianize(model, example, **options)
    bnn.likelihood, bnn.temperature = likelihood or Categorical(), 0.5
    return bnn


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(rows: int, length: int = 5) -> Tensor:
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(rows))


class Tagger(nn.Module):
    """Embedding with padding, then an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


class TimeFirst(nn.Module):
    """A GRU as first layer whose examples lie along dimension 1, and whose last state is used."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.transpose(0, 1))[1][-1])


class Siamese(nn.Module):
    """Two inputs through one first layer, and an option that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor, sign: int = 1) -> Tensor:
        return self.head(torch.tanh(self.shared(left) - sign * self.shared(right)))


class Attending(nn.Module):
    """Attention as first layer, which returns a tuple with None in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Positions(nn.Module):
    """Embedded positions, which have no rows of examples, and tokens whose embedding is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(5, 6)
        self.words = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        words = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(torch.relu(words).mean(1))


class ReadElsewhere(nn.Module):
    """The first layer's weight is used outside of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.first.weight


class Twice(nn.Module):
    """The first layer is called again on what came of its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class AgainstTheBatch(nn.Module):
    """Predictions for an example depend on the rest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(torch.relu(hidden - hidden.mean(0)))


def networks() -> dict[str, tuple[nn.Module, Any, dict[str, Any]]]:
    """Model, 17 rows of inputs, and options of `bayesianize`."""
    torch.manual_seed(0)
    pair = (normal(17, 6), normal(17, 6) * 2)
    return {
        "mlp": (mlp(), normal(17, 6), {}),
        "convolutional": (conv_net(), normal(17, 1, 8, 8), {}),
        "tagger": (Tagger(), tokens(17), {}),
        "time-first": (TimeFirst(), normal(17, 5, 4), {}),
        "tuple": (Siamese(), pair, {}),
        "mapping": (Siamese(), {"right": pair[1], "sign": -1, "left": pair[0]}, {}),
        "attention": (Attending(), normal(17, 5, 6), {}),
        "positions": (Positions(), tokens(17), {"layer": "positions"}),
        "tied": (Positions(), tokens(17), {"layer": "words"}),
        "twice": (Twice(), normal(17, 6), {}),
        "only-layer": (nn.Linear(6, 3), normal(17, 6), {}),
    }
