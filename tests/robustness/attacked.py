"""Victims that the tests of attacks share: a linear one whose best attack is known, and small ones on digits."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stfbnn
from stfbnn import Categorical
from stfbnn.baselines import MCDropout
from stfbnn.robustness.victim import DropoutVictim, Members, NetworksVictim, PosteriorVictim, Victim
from stfbnn.threat import InputSpace, Threat


class Counting(Victim):
    """A victim that notes which members it is asked to draw; its members differ by the seed."""

    random = True

    def __init__(self) -> None:
        super().__init__(Categorical(), InputSpace(), 1.0, torch.device("cpu"))
        self.seeds: list[int] = []
        self.weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def deployed(self) -> Members:
        return Members((lambda x: x @ self.weight,))

    def draw(self, count: int, seed: int) -> Members:
        self.seeds.append(seed)
        noise = torch.randn(count, 12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Members(tuple((lambda x, one=one: x @ (self.weight + one)) for one in noise))


def linear(features: int = 12, classes: int = 2, space: InputSpace | None = None, seed: int = 0) -> NetworksVictim:
    """A linear classifier in double precision, sure enough that no probability is 0 or 1."""
    torch.manual_seed(seed)
    layer = nn.Linear(features, classes).double()
    return NetworksVictim([layer], Categorical(), InputSpace() if space is None else space)


def middle(count: int = 6, features: int = 12, seed: int = 1) -> Tensor:
    """Inputs so far from the ends of the range that an ε of 0.2 does not reach them."""
    return 0.3 + 0.4 * torch.rand(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best_change(victim: NetworksVictim, targets: Tensor, threat: Threat) -> Tensor:
    """What raises a linear two-class margin most, in closed form: ε sign(w) or ε w / ‖w‖, w = w_other − w_y."""
    weight = layer_of(victim).weight.detach()
    slope = weight[1 - targets] - weight[targets]
    if threat.norm == "linf":
        return threat.epsilon * slope.sign()
    return threat.epsilon * slope / slope.norm(dim=1, keepdim=True)


def layer_of(victim: NetworksVictim) -> nn.Linear:
    layer = victim.deployed().functions[0].args[0]  # type: ignore[attr-defined]
    assert isinstance(layer, nn.Linear)
    return layer


def margins(victim: Victim, inputs: Tensor, targets: Tensor) -> Tensor:
    """max_{k≠y} p_k against p_y of the deployed average, by a loop over rows."""
    logs = victim.predict(inputs).log_probs
    return torch.stack(
        [max(row[k] for k in range(len(row)) if k != y) - row[y] for row, y in zip(logs, targets.tolist(), strict=True)]
    )


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits, (N, 1, 8, 8) in [0, 1], and their labels."""
    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(found.target).long()


@cache
def small_net(dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    x, y = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Dropout(dropout), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1000]), y[:1000]).backward()
        optimizer.step()
    return net.eval()


@cache
def bayesian(posterior: str = "mean-field") -> stfbnn.BayesianNetwork:
    """Wide enough that its draws differ."""
    x, y = digits()
    bnn = stfbnn.bayesianize(small_net(), x[:2], posterior=posterior)
    stfbnn.fit(bnn, [(x[:200], y[:200])], epochs=2, temperature=3.0, progress=False)
    return bnn


def posterior_victim(samples: int = 6, seed: int = 3) -> PosteriorVictim:
    return PosteriorVictim(bayesian(), InputSpace(), samples, seed)


def dropout_victim(samples: int = 4) -> DropoutVictim:
    return DropoutVictim(MCDropout(small_net(0.3), Categorical(), samples=samples, seed=5), InputSpace())


def network_victim(seed: int = 0) -> NetworksVictim:
    return NetworksVictim([small_net(seed=seed)], Categorical(), InputSpace())


def unseen(count: int = 20) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[1000 : 1000 + count], y[1000 : 1000 + count]
