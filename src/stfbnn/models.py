"""Small networks to start with, for those who bring data and no model: ``--model stfbnn.models:lenet`` and the like.

Each is a function of the shape of one example and of the number of outputs, and returns an untrained network with random
weights from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stfbnn.errors import InputError


class TargetScale(nn.Module):
    """Turn a network's outputs of about unit size into the targets' unit: output · std + mean.

    Args:
        mean: The targets' mean, one number per output or one for all.
        std: Their standard deviation, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, outputs: Tensor) -> Tensor:
        """Scale ``outputs``, (N, D)."""
        return outputs * self.std + self.mean


def mlp(
    input_shape: Sequence[int],
    num_classes: int,
    hidden: int = 256,
    depth: int = 2,
    target_mean: Sequence[float] | None = None,
    target_std: Sequence[float] | None = None,
) -> nn.Module:
    """A multilayer perceptron with ReLU, for tables and for small images (which it flattens).

    Args:
        input_shape: Shape of one example.
        num_classes: Outputs: classes, or numbers to regress.
        hidden: Units of each hidden layer.
        depth: Hidden layers.
        target_mean: For a regression: what the outputs are shifted by, after scaling.
        target_std: For a regression: what they are scaled by; given together with ``target_mean``.

    Raises:
        InputError: A size is not positive, or only one of the two scales is given.
    """
    _require_sizes(input_shape, num_classes, hidden=hidden, depth=depth)
    if (target_mean is None) != (target_std is None):
        raise InputError("give both target_mean and target_std, or neither")
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    layers.append(nn.Linear(width, num_classes))
    if target_mean is not None and target_std is not None:
        layers.append(TargetScale(target_mean, target_std))
    return nn.Sequential(*layers)


def lenet(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) as it is used today: ReLU, max pooling, no sparse connections.

    Both convolutions keep the size of the image, so that images from 4x4 pixels work (the original leaves out the
    second one's border).

    Args:
        input_shape: (C, H, W).
        num_classes: Classes.

    Raises:
        InputError: The inputs are no images, or smaller than 4x4.
    """
    channels, height, width = _image_shape(input_shape, num_classes, smallest=4)
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (height // 4) * (width // 4), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al., 2016, option A).

    Where the block halves the image, the shortcut takes every second pixel; where it adds channels, they are zero.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        shortcut = x
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.added:
            before = self.added // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.added - before))
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        out: Tensor = self.relu2(x + shortcut)
        return out


def resnet20(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """ResNet-20 for small images (He et al., 2016, section 4.2): 3 stages of 3 blocks with 16, 32 and 64 channels.

    Shortcuts are of option A, without parameters; weights are initialised as by He et al. (2015). For 3 channels and
    10 classes it has 269,722 parameters.

    Args:
        input_shape: (C, H, W).
        num_classes: Classes.

    Raises:
        InputError: The inputs are no images, or smaller than 4x4.
    """
    channels, _, _ = _image_shape(input_shape, num_classes, smallest=4)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    width = 16
    for stage, stage_width in enumerate((16, 32, 64)):
        for block in range(3):
            layers.append(BasicBlock(width, stage_width, stride=2 if stage > 0 and block == 0 else 1))
            width = stage_width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def _image_shape(input_shape: Sequence[int], num_classes: int, smallest: int) -> tuple[int, int, int]:
    _require_sizes(input_shape, num_classes)
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise InputError(
            f"this network takes images (C, H, W) of at least {smallest}x{smallest} pixels, but an example has the "
            f"shape {tuple(input_shape)}; for tables take stfbnn.models:mlp"
        )
    channels, height, width = input_shape
    return channels, height, width


def _require_sizes(input_shape: Sequence[int], num_classes: int, **sizes: int) -> None:
    for name, value in {**{"input_shape": min(input_shape, default=0)}, "num_classes": num_classes, **sizes}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be positive and whole, but it is {value!r}")
