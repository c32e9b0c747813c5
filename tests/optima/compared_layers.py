"""A small comparison of layers, for tests of how it is run."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from core_models import classification, loader, trained
from stfbnn.optima.width_table import LayerComparison
from stfbnn.optima.widths import compare_layers


def small(**changes: Any) -> LayerComparison:
    """Three layers on few examples, in a second."""
    x, y = classification(90)
    # Not `or`: a loader without batches is false.
    net = changes.pop("net") if "net" in changes else three_layers()
    train = changes.pop("train") if "train" in changes else loader(x, y)
    val = changes.pop("val") if "val" in changes else loader(*classification(80, seed=1), shuffle=False)
    arguments: dict[str, Any] = {"epochs": 2, "samples": 4, "progress": False} | changes
    return compare_layers(net, train, val, **arguments)


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return trained(net, *classification(90), steps=60)


def timeless(found: LayerComparison) -> LayerComparison:
    return replace(found, layers=tuple(replace(one, seconds=0.0) for one in found.layers))
