"""A small network whose layers are retrained, and how two retrainings are compared."""

from typing import Any

import pytest
import torch

from core_models import classification, loader, mlp, trained
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.optima.retraining import Retraining, RetrainingOptions, retrain


def problem(layer: str | None = None) -> tuple[LayerFunction, Any, Examples, Examples]:
    x, y = classification()
    net = trained(mlp(), x, y, steps=60)
    train = loader(x[:150], y[:150])
    function = LayerFunction(net, train, layer)
    held_out = Examples(loader(x[150:], y[150:], shuffle=False))
    return function, train, Examples([(x[:150], y[:150])]), held_out


def run(setting: tuple[LayerFunction, Any, Examples, Examples], seed: int = 0, **options: Any) -> Retraining:
    settings = {"runs": 3, "epochs": 4, "execution": "loop", **options}
    return retrain(*setting, RetrainingOptions(**settings), seed, progress=False)


def require_same(found: Retraining, expected: Retraining, tolerance: float = 0.0) -> None:
    for one, other in zip(found.optima, expected.optima, strict=True):
        torch.testing.assert_close(one.weights, other.weights, rtol=tolerance, atol=tolerance)
        assert one.history == pytest.approx(other.history, rel=tolerance, abs=tolerance)
        assert (one.number, one.start, one.epochs, one.converged) == (
            other.number,
            other.start,
            other.epochs,
            other.converged,
        )
