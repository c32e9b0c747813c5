"""A trunk that is shared out among ranks gives the results of a whole one, and each rank keeps its part alone."""

import pytest
import torch
from torch import nn

import sharded_trunk_script
from sharded_trunk_script import DEPTH, WIDTH
from stfbnn.bulk import predict_shards
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.inference.fit import fit
from stfbnn.trunk.sharding import _ATTRIBUTE, is_sharded, shard
from two_ranks import results_of_two


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    # Freed memory goes back to the system at once, so that what is used is what is counted.
    own = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return results_of_two(sharded_trunk_script.__file__, tmp_path_factory.mktemp("sharded"), **own)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def test_the_results_are_those_of_ranks_with_whole_trunks_bit_for_bit(ranks):
    for found in ranks:
        assert same(found["sharded"]["dense"], found["whole"]["dense"])
        assert same(found["named"], found["whole"]["dense"])
        assert same(found["per example, sharded"], found["per example"])
        assert same(found["mixture, sharded"], found["mixture"])
        assert not torch.equal(found["per example"]["mean"], found["whole"]["dense"]["mean"])


def test_an_encoders_results_are_those_of_a_whole_one_but_for_the_rounding_of_its_fused_layers(ranks):
    sharded, whole = (ranks[0][kind]["encoder"] for kind in ("sharded", "whole"))
    for name in ("mean", "std", "probs"):
        torch.testing.assert_close(sharded[name], whole[name], rtol=1e-4, atol=1e-6)


def test_all_ranks_end_with_the_same(ranks):
    first, second = ranks
    for build in ("dense", "encoder"):
        assert same(first["sharded"][build], second["sharded"][build])
    assert first["sharded"]["dense"]["bytes_per_step"] == 4 * (2 * 5 * 33 + 2)


def test_each_rank_keeps_its_part_alone(ranks):
    trunk = 4 * (DEPTH * (WIDTH + 1) * WIDTH + 3 * (WIDTH + 1)) / 2**20
    parts = sum(found["memory"]["local"] for found in ranks)
    # Parts of uneven rows are filled up by a row.
    assert trunk <= parts < 1.01 * trunk
    for found in ranks:
        memory = found["memory"]
        assert memory["whole"] > 0.95 * trunk
        assert memory["parts"] < 0.65 * trunk
        assert memory["after"] < 0.8 * trunk


def test_a_trunk_in_a_file_is_shared_out_from_there(ranks):
    for found in ranks:
        assert same(found["from file"], found["whole"]["dense"])
        assert same(found["from offloaded"], found["whole"]["dense"])


def test_what_is_saved_is_loaded_onto_a_whole_model(ranks):
    for found in ranks:
        assert torch.equal(found["saved"]["here"], found["saved"]["there"])


def test_what_would_leave_ranks_waiting_for_each_other_is_refused(ranks):
    for found in ranks:
        assert "different numbers of rows, [7, 8]" in found["uneven rows"]
        assert "different numbers of batches, [7, 8]" in found["uneven batches"]
        assert "sharded already" in found["twice"]


def test_a_single_process_keeps_its_trunk():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    bnn = bayesianize(network, x[:2])
    shard(bnn)
    assert not is_sharded(bnn.network)
    assert type(bnn.network[2]) is nn.Linear
    fit(bnn, [(x, y)], epochs=1, temperature=1.0)
    setattr(bnn.network, _ATTRIBUTE, True)
    with pytest.raises(InputError, match="sharded among several processes"):
        fit(bnn, [(x, y)], temperature=1.0)


def test_what_cannot_be_shared_out_is_refused_in_any_number_of_processes():
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="no parameters behind"):
        shard(bayesianize(nn.Linear(4, 2), x))
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    bnn, other = bayesianize(network, x), bayesianize(network, x)
    with pytest.raises(InputError, match="first layer"):
        shard(bnn, blocks=["0"])
    other.share_trunk(bnn)
    with pytest.raises(InputError, match="the trunk of another one"):
        shard(bnn)


def test_rows_that_each_process_predicts_alone_need_a_whole_trunk(tmp_path):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    bnn = bayesianize(network, x[:2])
    fit(bnn, [(x, y)], epochs=1, temperature=1.0)
    setattr(bnn.network, _ATTRIBUTE, True)
    with pytest.raises(InputError, match="the trunk is sharded"):
        predict_shards(bnn, x, tmp_path / "shards")
    assert not list(tmp_path.iterdir())
