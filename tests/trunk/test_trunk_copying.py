"""The shared copy: same storage, frozen, nothing of the user's changed; and clear refusals."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from trunk_networks import ResNet, trained

from stfbnn.errors import LayerError
from stfbnn.trunk import shared_copy
from stfbnn.wrappers import unwrap


def test_shares_storage_and_leaves_the_model_alone():
    model = ResNet().train()
    copy = shared_copy(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in copy.modules())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    mine, theirs = copy.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor is not theirs[name]
        assert tensor.data_ptr() == theirs[name].data_ptr()
        assert isinstance(tensor, nn.Parameter) == isinstance(theirs[name], nn.Parameter)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(copy(x), model.eval()(x))


def test_moving_the_copy_leaves_the_model():
    model = ResNet()
    shared_copy(model).double()
    assert all(tensor.dtype != torch.float64 for tensor in model.state_dict().values())


def test_tied_tensors_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    copy = shared_copy(model)
    assert copy[0].weight is copy[1].weight
    model.again = model[0]
    assert shared_copy(model).again is not model.again


def test_unregistered_tensors_are_shared_and_frozen():
    model = nn.Linear(2, 2)
    model.mask = torch.ones(2)
    model.gain = torch.ones(2, requires_grad=True)
    copy = shared_copy(model)
    assert copy.mask.data_ptr() == model.mask.data_ptr()
    assert not copy.gain.requires_grad
    assert model.gain.requires_grad


class Collector:
    def __init__(self) -> None:
        self.seen = 0

    def hook(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        self.seen += 1
        return output + 1


def test_hooks_are_kept():
    model = nn.Linear(2, 2)
    collector = Collector()
    model.register_forward_hook(collector.hook)
    x = torch.randn(1, 2)
    plain = nn.functional.linear(x, model.weight, model.bias)
    torch.testing.assert_close(shared_copy(model)(x), plain + 1)
    assert collector.seen == 0  # a bound method is bound to a copy of its object


def test_parametrized_modules_are_copied():
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    copy = shared_copy(model)
    torch.testing.assert_close(copy(x), model(x))
    assert not copy(x).requires_grad


@pytest.mark.parametrize("old", ["weight_norm", "spectral_norm"])
def test_old_style_reparametrisation_is_refused(old):
    if old == "weight_norm":
        with pytest.warns(FutureWarning):
            layer = nn.utils.weight_norm(nn.Linear(3, 2))
    else:
        layer = nn.utils.spectral_norm(nn.Linear(3, 2))
        layer(torch.randn(1, 3))
    with pytest.raises(LayerError, match=r"'0.weight'.*parametrizations"):
        shared_copy(nn.Sequential(layer))


def test_obstacles_are_named():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(LayerError, match=r"'0.weight'.*run the model once"):
        shared_copy(model)
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].last = model[0](torch.randn(1, 2))
    with pytest.raises(LayerError, match=r"'0.last'.*detach"):
        shared_copy(model)
    model[0].last = {"deep": [model[0](torch.randn(1, 2))]}
    with pytest.raises(LayerError, match=r"attribute '0.last'"):
        shared_copy(model)
    model[0].last = threading.Lock()
    with pytest.raises(LayerError, match=r"attribute '0.last' \(lock\)"):
        shared_copy(model)
    with pytest.raises(LayerError, match="complex"):
        shared_copy(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(LayerError, match="meta device"):
        shared_copy(nn.Linear(2, 2, device="meta"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_modules_are_refused():
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(LayerError, match="TorchScript"):
        shared_copy(nn.Sequential(scripted))


def test_a_deepcopy_of_the_modules_own_is_refused():
    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict) -> Own:
            return Own(2, 2)

    with pytest.raises(LayerError, match="__deepcopy__"):
        shared_copy(nn.Sequential(Own(2, 2)))


def test_a_train_method_of_the_modules_own_is_not_run_on_shared_tensors():
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            self.weight.data.add_(1.0 if mode else -1.0)
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    before = model[0].weight.detach().clone()
    with pytest.raises(LayerError, match=r"model.eval\(\)"):
        shared_copy(model)
    assert torch.equal(model[0].weight, before)
    model.eval()
    shared_copy(model)
    assert torch.equal(model[0].weight, before - 1)


def test_a_forward_that_still_calls_the_original_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    with pytest.raises(LayerError, match=r"'0'.*undo"):
        shared_copy(model)

    @functools.wraps(original)
    def wrapped(x: Tensor) -> Tensor:
        return x

    model[0].forward = wrapped
    with pytest.raises(LayerError, match="original"):
        shared_copy(model)
    # What deepcopy can follow is fine.
    model[0].forward = functools.partial(original)
    model[0].forward = original
    copy = shared_copy(model)
    assert copy[0].forward.__self__ is copy[0]


def test_unwrap_every_wrapper_in_any_order():
    model = ResNet()
    fabric = Fabric(accelerator="cpu", devices=1)
    compiled = torch.compile(model, backend="eager")
    assert unwrap(model) is model
    assert unwrap(compiled) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(fabric.setup(model)) is model
    assert unwrap(nn.DataParallel(torch.compile(fabric.setup(compiled), backend="eager"))) is model
    assert type(shared_copy(compiled)) is ResNet


def test_unwrap_distributed(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        assert unwrap(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        torch.distributed.destroy_process_group()


def test_the_copy_runs_while_the_model_trains_its_mode():
    model = trained(ResNet())
    copy = shared_copy(model)
    x = torch.randn(2, 3, 8, 8)
    before = copy(x)
    model.train()
    assert torch.equal(copy(x), before)
