"""Fingerprints depend on names and values, and on nothing else."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from torch import nn
from trunk_networks import ResNet, trained

from stfbnn.errors import InputError
from stfbnn.trunk import fingerprint, fold, shared_copy, structure_fingerprint


def test_against_the_definition():
    model = nn.BatchNorm1d(2)
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state):
        digest.update(json.dumps([name, str(state[name].dtype), list(state[name].shape)]).encode())
        digest.update(state[name].numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()


def test_one_changed_value_name_or_dtype_shows():
    model = trained(ResNet())
    before, structure = fingerprint(model), structure_fingerprint(model)
    assert len(before) == 64
    with torch.no_grad():
        model.blocks[0].bn1.running_var[2] += 1e-6
    after = fingerprint(model)
    assert after != before
    assert structure_fingerprint(model) == structure
    assert structure_fingerprint(copy.deepcopy(model).double()) != structure
    assert fingerprint(copy.deepcopy(model).double()) != after
    assert structure_fingerprint(ResNet(width=5)) != structure
    renamed = nn.ModuleDict({"x": nn.Linear(2, 2)})
    assert structure_fingerprint(renamed) != structure_fingerprint(nn.ModuleDict({"y": renamed["x"]}))


def test_layout_mode_gradients_and_copies_do_not_count():
    model = trained(ResNet())
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == before
    assert fingerprint(copy.deepcopy(model).train().requires_grad_(False)) == before
    assert fingerprint(shared_copy(model)) == before
    flipped = copy.deepcopy(model)
    flipped.head.weight.data = model.head.weight.detach().T.contiguous().T
    assert fingerprint(flipped) == before


def test_a_trunk_with_frozen_norms_has_the_fingerprint_of_its_model():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    network = shared_copy(trained(model))
    assert fold(network, "1", torch.randn(2, 3, 4, 4)).local
    assert fingerprint(network) == fingerprint(model)


def test_exclusion_is_exact():
    model = trained(ResNet())
    without = fingerprint(model, exclude={"conv.weight"})
    nn.init.ones_(model.conv.weight)
    assert fingerprint(model, exclude={"conv.weight"}) == without
    nn.init.ones_(model.blocks[0].conv1.weight)
    assert fingerprint(model, exclude={"conv.weight"}) != without
    with pytest.raises(InputError, match=r"conv\.wait"):
        fingerprint(model, exclude={"conv.wait"})


def test_tied_tensors_count_under_every_name_and_temporary_buffers_not_at_all():
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight, tied[1].bias = tied[0].weight, tied[0].bias
    assert fingerprint(tied) == fingerprint(copy.deepcopy(tied))
    apart = nn.Sequential(copy.deepcopy(tied[0]), copy.deepcopy(tied[0]))
    assert fingerprint(apart) == fingerprint(tied)
    before = fingerprint(tied)
    tied.register_buffer("cache", torch.ones(2), persistent=False)
    assert fingerprint(tied) == before
    tied.register_buffer("kept", torch.ones(2))
    assert fingerprint(tied) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_every_dtype(dtype):
    model = nn.Module()
    model.register_buffer("scalar", torch.ones((), dtype=dtype))
    model.register_buffer("empty", torch.ones((0, 3), dtype=dtype))
    before = fingerprint(model)
    model.scalar.zero_()
    assert fingerprint(model) != before


def test_meta_tensors_have_no_values():
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(InputError, match="meta"):
        fingerprint(model)
    assert structure_fingerprint(model) == structure_fingerprint(nn.Linear(2, 2))
