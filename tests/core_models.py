"""Small problems that several test files share."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def mlp(inputs: int = 6, hidden: int = 12, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    net(torch.randn(64, 1, 8, 8))  # running statistics that are not the identity
    return net.eval()


def classification(count: int = 200, inputs: int = 6, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes of a noisy linear rule: no network can be sure everywhere."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    rule = torch.randn(inputs, classes, generator=torch.Generator().manual_seed(99))
    y = (x @ rule + torch.randn(count, classes, generator=generator)).argmax(1)
    return x, y


def loader(x: Tensor, y: Tensor, batch_size: int = 32, shuffle: bool = True) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def trained(net: nn.Module, x: Tensor, y: Tensor, steps: int = 200) -> nn.Module:
    """Stage one by plain full-batch Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    loss = nn.functional.mse_loss if y.is_floating_point() else nn.functional.cross_entropy
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    return net.eval()
