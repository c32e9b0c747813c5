"""Changes of the user's network are noticed and named; what is no change passes."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref

import pytest
import torch
from torch import nn
from trunk_networks import ResNet, trained

from stfbnn.errors import ModelChangedError
from stfbnn.trunk import ChangeGuard, shared_copy


def step(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimiser.step()


def set_running_mean(model: nn.Module) -> None:
    model.blocks[0].bn1.running_mean = torch.randn(4)


CHANGES = [
    (step, "written in place"),
    (lambda m: m.load_state_dict(ResNet().state_dict()), "written in place"),
    (lambda m: m.load_state_dict(ResNet().state_dict(), assign=True), "replaced"),
    (lambda m: m.train()(torch.randn(2, 3, 8, 8)), "'bn.num_batches_tracked'.*written in place"),
    (lambda m: m.blocks[1].conv2.weight.detach().zero_(), "blocks.1.conv2.weight.*written in place"),
    (lambda m: setattr(m, "head", nn.Linear(16, 10)), "module 'head'.*replaced"),
    (lambda m: delattr(m, "head"), "module 'head'.*removed"),
    (lambda m: setattr(m.head, "weight", nn.Parameter(torch.randn(10, 16))), "head.weight.*replaced"),
    (lambda m: setattr(m.head, "bias", None), "head.bias.*removed"),
    (set_running_mean, "blocks.0.bn1.running_mean.*replaced"),
    (lambda m: m.double(), "conv.weight.*converted"),
    (lambda m: m.to("meta"), "conv.weight.*replaced"),
    (lambda m: setattr(m.head.weight, "data", torch.randn(10, 16)), "head.weight.*replaced"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_changes_are_named(change, message):
    model = trained(ResNet())
    guard = ChangeGuard(model)
    shared_copy(model)(torch.randn(1, 3, 8, 8))
    guard.check()
    change(model)
    for _ in range(2):
        with pytest.raises(ModelChangedError, match=message):
            guard.check()


def move(model: nn.Module) -> None:
    """What ``.to(device)`` does: parameters get new data, buffers become new tensors."""
    model._apply(lambda tensor: tensor.clone())


def put_nan(model: nn.Module) -> None:
    with torch.no_grad():
        model.head.bias[0] = float("nan")


@pytest.mark.parametrize(
    "harmless",
    [
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
        move,
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True),
        lambda m: setattr(m, "head", torch.compile(m.head, backend="eager")),
        lambda m: m(torch.randn(2, 3, 8, 8)).sum().backward(),
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: shared_copy(m).double(),
    ],
)
def test_what_is_no_change_passes(harmless):
    model = trained(ResNet())
    put_nan(model)
    guard = ChangeGuard(model)
    harmless(model)
    guard.check()
    guard.check()


def test_a_change_after_a_move_is_noticed():
    model = trained(ResNet())
    guard = ChangeGuard(model)
    move(model)
    guard.check()
    with torch.no_grad():
        model.bn.running_var.add_(1)
    with pytest.raises(ModelChangedError, match=r"bn.running_var.*written in place"):
        guard.check()


def test_a_deleted_model_cannot_change_and_is_let_go():
    model = ResNet()
    guard = ChangeGuard(model)
    tensor = weakref.ref(model.head.weight)
    owner = weakref.ref(model.head)
    del model
    gc.collect()
    assert owner() is None
    guard.check()
    gc.collect()
    assert tensor() is None


def test_copies_watch_the_same_model_and_pickles_none():
    model = ResNet()
    guard = ChangeGuard(model)
    twin, restored = copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))  # noqa: S301 - our own bytes
    twin.check()
    model.head.weight.data = torch.zeros(10, 16)
    with pytest.raises(ModelChangedError):
        twin.check()
    restored.check()


def test_inference_tensors_are_watched_by_identity():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    guard = ChangeGuard(model)
    guard.check()
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ModelChangedError, match="weight"):
        guard.check()


def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    guard = ChangeGuard(nn.DataParallel(model))
    nn.init.zeros_(model.weight)
    with pytest.raises(ModelChangedError, match="'weight'"):
        guard.check()


def test_the_check_is_cheap():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    guard = ChangeGuard(model)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        guard.check()
        times.append(time.perf_counter() - start)
    # About 30 µs on an idle machine; the bound leaves room for a slow and busy one.
    assert min(times) < 200e-6
