"""Networks with batch norm in every place that matters, and statistics that are not the initial ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics, a scale and a shift that a training run could have left, and switch to eval mode."""
    noise = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=noise))
                module.running_var.copy_(torch.rand(module.num_features, generator=noise) * 2 + 0.3)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.num_features, generator=noise) + 0.5)
                    module.bias.copy_(torch.randn(module.num_features, generator=noise))
    return model.eval()


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet with 6·blocks + 2 layers."""

    def __init__(self, blocks: int = 1, width: int = 4, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = activation()
        layers = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(channels, width * 2**stage, stride, activation))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def norms_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


def saved_bytes(call, parameters=()) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of ``call``, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or the allocator gives the address away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(kept.values())
