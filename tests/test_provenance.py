"""Provenance: equal inputs and only equal inputs are recognised, quickly, whatever the batching."""

import copy
import hashlib
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stfbnn import provenance as module
from stfbnn.errors import InputError
from stfbnn.provenance import Provenance, ProvenanceRecorder, attach, attached, example_hashes, overlap, provenance_of


def of(inputs):
    recorder = ProvenanceRecorder()
    recorder.add(inputs)
    return recorder.finish()


def test_a_hash_is_blake2b_of_the_description_and_the_bytes():
    inputs = torch.arange(6.0).reshape(3, 2)
    for row, found in zip(inputs, example_hashes(inputs), strict=True):
        content = b"torch.float32(2,)" + row.numpy().tobytes()
        expected = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        assert int(found) == expected


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 6, dtype=torch.float64),
        torch.zeros(4, 2, 3),
        torch.zeros(4, 6, dtype=torch.int32),
        torch.zeros(4, 6, dtype=torch.bfloat16),
        torch.zeros(4, 7),
        (torch.zeros(4, 6), torch.zeros(4, 1)),
    ],
)
def test_dtype_shape_and_structure_tell_apart(other):
    assert overlap(of(torch.zeros(4, 6)), of(other)) == 0


def test_strides_and_containers_do_not_matter():
    inputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    transposed = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    expected = of(inputs).digest()
    assert of(transposed).digest() == expected
    assert of((inputs,)).digest() == expected
    assert of({"x": inputs, "note": "not a tensor"}).digest() == expected
    assert of({"a": inputs, "b": inputs + 1}).digest() == of({"b": inputs + 1, "a": inputs}).digest()
    assert of({"a": inputs, "b": inputs + 1}).digest() != of({"b": inputs, "a": inputs + 1}).digest()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.complex64, torch.int64]
)
def test_every_dtype(dtype):
    inputs = torch.tensor([0, 1, 1], dtype=dtype)
    first, second, third = example_hashes(inputs)
    assert first != second == third
    assert example_hashes(inputs.conj() if dtype.is_complex else inputs).size == 3


def test_rows_without_content():
    assert np.unique(example_hashes(torch.zeros(3, 0))).size == 1


@settings(deadline=None, max_examples=40)
@given(
    first=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    second=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    size=st.integers(1, 7),
)
def test_it_behaves_as_a_set_whatever_the_batching(first, second, size):
    def loader(values):
        return DataLoader(TensorDataset(torch.tensor(values).float()[:, None], torch.zeros(len(values))), size)

    a, b = provenance_of(loader(first)), provenance_of(loader(second))
    assert a.count == len(set(first))
    assert overlap(a, b) == overlap(b, a) == len(set(first) & set(second))
    assert a.union(b).count == len(set(first) | set(second))
    assert (a.digest() == b.digest()) == (set(first) == set(second))
    assert Provenance.from_tensor(a.to_tensor()).digest() == a.digest()
    assert overlap(provenance_of(loader(first[::-1])), a) == a.count


def test_the_target_is_no_part_of_it():
    inputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    labelled = [{"x": inputs, "labels": torch.arange(6)}]
    relabelled = [{"x": inputs, "labels": torch.arange(6) + 1}]
    assert overlap(provenance_of(labelled), provenance_of(relabelled)) == 6
    assert overlap(provenance_of(labelled), provenance_of([inputs], has_targets=False)) == 6


def test_recording_goes_on_from_a_start_and_merges_on_the_way(monkeypatch):
    monkeypatch.setattr(module, "_MERGE_AT", 5)
    inputs = torch.arange(20.0)[:, None]
    recorder = ProvenanceRecorder(of(inputs[:8]))
    for start in range(6, 20, 3):
        recorder.add(inputs[start : start + 3])
    assert recorder.finish().digest() == of(inputs).digest()
    recorder.add(torch.tensor([[99.0]]))
    assert recorder.finish().count == 21


def test_it_is_read_only_and_checked():
    provenance = of(torch.arange(4.0))
    with pytest.raises(ValueError, match="read-only"):
        provenance.hashes[0] = 1
    for wrong in (np.array([2, 1], np.uint64), np.array([1, 1], np.uint64), np.array([1]), np.zeros((1, 1), np.uint64)):
        with pytest.raises(InputError, match="sorted, unique uint64"):
            Provenance(wrong)
    with pytest.raises(InputError, match="int64"):
        Provenance.from_tensor(torch.zeros(3))


def test_attach_and_attached():
    model = nn.Linear(2, 2)
    assert attached(model) is None
    attach(model, of(torch.arange(4.0)))
    attach(model, of(torch.arange(2.0, 6.0)))
    assert attached(model).count == 6
    assert attached(copy.deepcopy(model)).count == 6
    assert set(model.state_dict()) == {"weight", "bias"}


def test_it_is_fast_enough_for_every_epoch():
    inputs = torch.randn(60_000, 784, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    assert np.unique(example_hashes(inputs)).size == 60_000
    assert time.process_time() - start < 2.0  # about 0.4 s on an idle core
