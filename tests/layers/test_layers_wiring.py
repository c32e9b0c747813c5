"""How the first layer is wired into its network: what estimators that stand in for its forward rest on."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stfbnn
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.estimators import Flipout, LocalReparameterization, Sampler, SharedSample, resolve_estimator
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.trunk import require_apart

VECTORS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(1))
TARGET = torch.arange(8) % 3


class Wired(nn.Module):
    """A dense first layer in a network whose forward is given."""

    def __init__(self, run: Callable[..., Tensor], features: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.layer, self.head = run, nn.Linear(5, 4), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.layer, x))  # type: ignore[no-any-return]


def plain() -> Wired:
    return Wired(lambda layer, x: torch.tanh(layer(x)))


def by_keyword() -> Wired:
    return Wired(lambda layer, x: torch.tanh(layer(input=x)))


def hooked_output() -> Wired:
    model = plain()
    model.layer.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return model


def hooked_input() -> Wired:
    model = plain()
    model.layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    return model


def rows_of_tokens() -> Wired:
    return Wired(lambda layer, x: torch.tanh(layer(x.reshape(-1, 5))).view(len(x), -1), 12)


def time_first() -> Wired:
    return Wired(lambda layer, x: torch.tanh(layer(x.transpose(0, 1))).mean(0))


def read_elsewhere() -> Wired:
    return Wired(lambda layer, x: F.linear(torch.tanh(layer(x)), layer.weight.T), 5)


def replaced() -> Wired:
    model = plain()
    model.layer.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x).square(), model.layer)  # type: ignore[method-assign]
    return model


def near_zero_width(bnn: BayesianNetwork) -> tuple[Sampler, Tensor]:
    loc = bnn.trained_vector().requires_grad_()
    std = torch.full_like(loc, 1e-7).requires_grad_()
    return Sampler((loc, std), lambda noise: loc + std * noise, lambda: (loc, std), len(loc)), loc.detach()


@pytest.mark.parametrize(
    ("make", "x", "auto", "flipout"),
    [
        (plain, VECTORS, LocalReparameterization, True),
        (by_keyword, VECTORS, LocalReparameterization, True),
        (hooked_output, VECTORS, LocalReparameterization, True),
        (hooked_input, VECTORS, LocalReparameterization, True),
        (rows_of_tokens, SEQUENCES, SharedSample, False),
        (time_first, SEQUENCES, SharedSample, False),
        (time_first, SEQUENCES[:, :2], SharedSample, False),
        (read_elsewhere, VECTORS, SharedSample, False),
        (replaced, VECTORS, SharedSample, False),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_estimator_without_width_is_the_plain_network(
    make: Callable[[], Wired], x: Tensor, auto: type, flipout: bool
) -> None:
    """The loss and its gradient by the mean, against the plain network's own backward pass."""
    model = make()
    loss = F.cross_entropy(model(x), TARGET)
    expected = torch.autograd.grad(loss, list(model.layer.parameters()))
    bnn = bayesianize(model, x[:2])
    chosen = resolve_estimator("auto", None, bnn, x[:2])
    assert type(chosen) is auto
    candidates = [chosen, SharedSample()]
    if flipout:
        candidates.append(resolve_estimator("flipout", None, bnn, x[:2]))
    else:
        for name in ("flipout", "local-reparameterization"):
            with pytest.raises(InputError, match="use estimator="):
                resolve_estimator(name, None, bnn, x[:2])
    sampler, _ = near_zero_width(bnn)
    for one in candidates:
        found = one.estimate(MinibatchLoss(bnn, Categorical(), x, TARGET), sampler, torch.Generator().manual_seed(0))
        assert found.nll == pytest.approx(float(loss.detach()), rel=1e-5)
        torch.testing.assert_close(
            found.gradients[0], bnn.layout.flatten(dict(zip(("weight", "bias"), expected, strict=True)))
        )


def test_the_fused_transformer_layer_does_not_bypass_a_stand_in() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(5, 1, 6, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(15, 3)).eval()
    expected = torch.autograd.grad(F.cross_entropy(model(SEQUENCES), TARGET), list(encoder.linear1.parameters()))
    bnn = bayesianize(model, SEQUENCES[:2], layer="0.linear1")
    estimator = resolve_estimator("flipout", None, bnn, SEQUENCES[:2])
    assert isinstance(estimator, Flipout)
    sampler, _ = near_zero_width(bnn)
    found = estimator.estimate(MinibatchLoss(bnn, Categorical(), SEQUENCES, TARGET), sampler, torch.Generator())
    flat = bnn.layout.flatten(dict(zip(("weight", "bias"), expected, strict=True)))
    torch.testing.assert_close(found.gradients[0], flat, rtol=1e-4, atol=1e-6)


class MixedUp(nn.Module):
    """Takes the batch for the sequence, as nn.LSTM does unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(5, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    [
        MixedUp(),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3)),
        nn.Sequential(nn.Linear(5, 4), nn.Softmax(dim=0), nn.Flatten(), nn.Linear(12, 3)),
    ],
    ids=["lstm over the batch", "batch norm without statistics", "softmax over the batch"],
)
def test_networks_that_mix_the_examples_of_a_batch_are_refused(model: nn.Module) -> None:
    bnn = bayesianize(model, SEQUENCES[:2])
    with pytest.raises(InputError, match="depends on the other examples of its batch"):
        stfbnn.fit(bnn, [(SEQUENCES, TARGET)], epochs=1, temperature=1.0, progress=False)


def test_what_cannot_be_examined_passes() -> None:
    def random(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    def of_one_size(x: Tensor) -> Tensor:
        return x.view(8, 5) - x.mean(0)

    def mixing(x: Tensor) -> Tensor:
        return x - x.mean(0)

    require_apart(random, VECTORS)
    require_apart(of_one_size, VECTORS)
    require_apart(mixing, VECTORS[:1])
    with pytest.raises(InputError, match="batch_first"):
        require_apart(mixing, VECTORS)
    state = torch.get_rng_state()
    require_apart(random, VECTORS)
    assert torch.equal(state, torch.get_rng_state())


class Dataish(nn.Module):
    """Writes into its inputs, but only where they are large: the example does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 10).any()):
            x.clamp_(max=10)
        return self.layer(x)  # type: ignore[no-any-return]


def test_writing_into_inputs_is_noticed_later_too() -> None:
    bnn = bayesianize(Dataish(), VECTORS)
    stfbnn.fit(bnn, [(VECTORS, TARGET)], epochs=1, temperature=1.0, progress=False)
    with pytest.raises(InputError, match="changes its inputs in place"):
        stfbnn.predict(bnn, 20 * VECTORS)
