"""Networks whose loss, as a function of one layer's weights, is known in closed form."""

import torch
from torch import Tensor, nn

from core_models import classification
from stfbnn.batches import Batch
from stfbnn.likelihood import Gaussian
from stfbnn.optima.layer_function import Examples, LayerFunction

NOISE = 0.5
INPUTS = torch.tensor([0.6, -1.1, 0.3, 1.4, -0.8, 1.0], dtype=torch.float64)[:, None]


class Squares(nn.Module):
    """f(x) = Σ_k (w_k x)² with K weights: what it computes depends on |w| alone."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first = nn.Linear(1, units, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).square().sum(dim=1, keepdim=True)


def squares(units: int) -> tuple[LayerFunction, Examples, list[tuple[Tensor, Tensor]]]:
    """Targets x², which every w of length 1 fits; the loss, the examples, and a loader with two batches."""
    loader = [(INPUTS[:4], INPUTS[:4].square()), (INPUTS[4:], INPUTS[4:].square())]
    function = LayerFunction(Squares(units), loader, likelihood=Gaussian(NOISE))
    return function, Examples(loader), loader


def squares_loss(lengths: Tensor) -> Tensor:
    """The mean loss of `squares` above that of an optimum, at weights of these lengths: E[x⁴] (1 − |w|²)² / (2 s²)."""
    return INPUTS.pow(4).mean() * (1 - lengths.square()).square() / (2 * NOISE**2)


def logistic(seed: int = 0, classes: int = 3) -> tuple[LayerFunction, Examples]:
    """Softmax regression: a convex loss."""
    x, y = classification(40, 4, classes, seed)
    batches = [(x[:25].double(), y[:25]), (x[25:].double(), y[25:])]
    return LayerFunction(nn.Linear(4, classes, dtype=torch.float64), batches), Examples(batches)


def loss_by_hand(function: LayerFunction, examples: Examples, vector: Tensor) -> float:
    """The mean loss of one weight vector, one batch at a time and without stacking."""
    batches: list[Batch] = examples.batches
    total = sum(float(function.losses(vector[None], one, stacked=False)) * len(one) for one in batches)
    return total / sum(len(one) for one in batches)
