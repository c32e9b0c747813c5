"""An offloaded trunk computes the same numbers, from a file or from copies of one block at a time, in less memory."""

import copy
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from trunk_networks import trained

import large_trunk_script
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import ArtifactError, InputError, ModelChangedError, StfbnnError
from stfbnn.inference.fit import fit
from stfbnn.prediction import predict
from stfbnn.trunk.blocks import trunk_blocks
from stfbnn.trunk.mapped_weights import map_weights
from stfbnn.trunk.offloading import offload, offloaded_trunk
from stfbnn.trunk.tensor_file import TensorFile, write_tensors
from stfbnn.weights_file import save_weights

SCRIPT = Path(large_trunk_script.__file__)


class Words(nn.Module):
    """An encoder behind an embedding, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.positions = nn.Parameter(torch.randn(5, 32))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens) + self.positions)[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.first(x))[0][:, -1])


class Tied(nn.Module):
    """One parameter in two layers, one module called twice, and nothing of the first layer in either."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.inner = nn.Linear(12, 12)
        self.other = nn.Linear(12, 12)
        self.other.weight = self.inner.weight
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.inner(torch.relu(self.first(x)))
        return self.head(self.inner(torch.relu(self.other(torch.relu(x)))))


def dense():
    body = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *body, nn.Linear(16, 3)), torch.randn(24, 6)


def convolutions():
    body = [(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU()) for _ in range(3)]
    layers = [layer for three in body for layer in three]
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), *layers, nn.Flatten(), nn.Linear(8 * 36, 3))
    return trained(network), torch.randn(24, 3, 6, 6)


def channels_last():
    network, x = convolutions()
    return network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def words():
    return Words(), torch.randint(0, 30, (24, 5))


def recurrent():
    return Recurrent(), torch.randn(24, 5, 4)


def tied():
    return Tied(), torch.randn(24, 6)


EVERY = pytest.mark.parametrize("build", [dense, convolutions, channels_last, words, recurrent, tied])


def made(build, seed=0):
    torch.manual_seed(seed)
    network, x = build()
    return network.eval(), x, torch.arange(24) % 3


def results(bnn, x, y):
    """Everything that stage two and prediction give, from a fresh start."""
    fit(bnn, [(x[:16], y[:16]), (x[16:], y[16:])], epochs=1, temperature=1.0, progress=False)
    return bnn.posterior.mean_vector().clone(), bnn.posterior.std_vector().clone(), predict(bnn, x, samples=4).probs


def equal(one, other):
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


class Copies:
    """A stand-in for an accelerator: copies on the CPU, counted, with the most bytes of them that lived at once."""

    def __init__(self):
        self.count = self.live = self.most = 0

    def __call__(self, mapped):
        made = mapped.clone()
        self.count += 1
        self.live += made.nbytes
        self.most = max(self.most, self.live)
        weakref.finalize(made.untyped_storage(), self._gone, made.nbytes)
        return made

    def _gone(self, size):
        self.live -= size


# --- the same numbers


@EVERY
def test_a_mapped_trunk_gives_the_very_same_numbers(build, tmp_path):
    network, x, y = made(build)
    bnn = bayesianize(network, x[:2])
    before = results(bnn, x, y)
    file = offload(bnn, tmp_path)
    held = {name for name, value in bnn.network.named_parameters() if _lies_in(value, bnn)}
    trunk = {name for name, _ in bnn.network.named_parameters() if not name.startswith(f"{bnn.layer_name}.")}
    assert held == trunk
    assert file.parent == tmp_path
    assert equal(results(bnn, x, y), before)


def _lies_in(parameter, bnn):
    pointers = {slot.mapped.data_ptr() for slot in offloaded_trunk(bnn.network)._slots}
    return parameter.data_ptr() in pointers


@EVERY
def test_copies_of_one_block_at_a_time_give_the_same_numbers_and_go(build, tmp_path):
    network, x, y = made(build)
    bnn = bayesianize(network, x[:2])
    # PyTorch's fused encoder layer, which runs where nothing is hooked, rounds otherwise.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = results(bnn, x, y)
        offload(bnn, tmp_path)
        trunk, copies = offloaded_trunk(bnn.network), Copies()
        trunk.copy_blocks(copies)
        stay = copies.live
        assert equal(results(bnn, x, y), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    blocks = trunk_blocks(bnn.network, bnn.layer_name)
    largest = max(sum(value.nbytes for value in block.parameters()) for block in blocks.values())
    # The backward pass fetches one parameter after another.
    assert copies.most <= stay + largest
    assert copies.live == stay == (640 if build is words else 0)
    assert copies.count > 2 * sum(1 for _ in bnn.network.parameters())


def test_copies_are_kept_where_autograd_saves_something_else_of_them(tmp_path):
    # What the test above counts is what there is: a copy that somebody holds is seen as alive.
    copies = Copies()
    kept = copies(torch.zeros(8))[2:]
    assert copies.live == 32
    del kept
    assert copies.live == 0


def test_all_but_the_resident_parameters_stay_behind_when_the_network_moves(tmp_path):
    network, x, y = made(words)
    bnn = bayesianize(network, x[:2])
    offload(bnn, tmp_path)
    before = results(bnn, x, y)
    # The only other device that every machine has: it computes shapes.
    bnn.to("meta")
    assert {name for name, value in bnn.network.named_parameters() if value.is_meta} == {"embed.weight", "positions"}
    vector = bnn.posterior.mean_vector().detach().requires_grad_()
    outputs = bnn.outputs(vector, x.to("meta"))
    assert outputs.is_meta
    assert torch.autograd.grad(outputs.sum(), vector)[0].shape == vector.shape
    assert sum(value.is_meta for value in bnn.network.parameters()) == 2
    with pytest.raises(InputError, match="keeps its dtype"):
        bnn.double()
    other = bayesianize(network, x[:2])
    offload(other, tmp_path)
    assert equal(results(other.to("cpu"), x, y), before)


def test_blocks_that_are_named_are_copied_whole(tmp_path):
    network, x, y = made(dense)
    bnn = bayesianize(network, x[:2])
    before = results(bnn, x, y)
    offload(bnn, tmp_path, blocks=["2", "4"])
    copies = Copies()
    offloaded_trunk(bnn.network).copy_blocks(copies)
    # Four times 16 · 16 + 3 · 16 parameters, and 16 · 3 + 3: all but two of the four stay.
    assert copies.live == 4 * (2 * 304 + 51)
    assert equal(results(bnn, x, y), before)
    assert copies.most == 4 * (3 * 304 + 51)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["9"], "does not have"),
        (["1"], "no parameters"),
        (["0"], "first layer"),
        (["2", "2.0"], "overlap"),
    ],
)
def test_blocks_that_cannot_be_are_refused(names, message):
    network, _, _ = made(dense)
    with pytest.raises(InputError, match=message):
        trunk_blocks(network, "0", names)


def test_a_network_that_is_one_layer_has_no_trunk(tmp_path):
    bnn = bayesianize(nn.Linear(4, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match="no parameters behind"):
        offload(bnn, tmp_path)


def test_encoder_layers_are_blocks_and_parametrised_layers_are_not_taken_apart():
    network = Words()
    torch.nn.utils.parametrizations.weight_norm(network.head)
    names = ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "head"]
    assert list(trunk_blocks(network, "embed")) == names


# --- the file


def test_the_file_is_one_that_others_read_and_is_used_again(tmp_path):
    network, x, _ = made(tied)
    bnn = bayesianize(network, x[:2])
    file = offload(bnn, tmp_path)
    stored = {name: value for name, value in safetensors.torch.load_file(file).items() if not name.startswith("__")}
    state = network.state_dict()
    # Once for the two layers that share it.
    assert stored.keys() == state.keys() - {"first.weight", "first.bias", "other.weight"}
    assert all(torch.equal(value, state[name]) for name, value in stored.items())
    written = file.stat().st_mtime_ns
    assert offload(bayesianize(network, x[:2]), tmp_path) == file
    assert offload(bnn, tmp_path) == file
    assert file.stat().st_mtime_ns == written
    different, _, _ = made(tied, seed=1)
    assert offload(bayesianize(different, x[:2]), tmp_path) != file
    assert len(list(tmp_path.iterdir())) == 2


def test_a_truncated_file_is_named(tmp_path):
    network, x, _ = made(dense)
    file = offload(bayesianize(network, x[:2]), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=f"{file.name} cannot be used: it is missing, truncated"):
        offload(bayesianize(network, x[:2]), tmp_path)


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 64, b"\x02" + bytes(7) + b"{}" + b"rest"])
def test_what_is_no_tensor_file_is_named(content, tmp_path):
    file = tmp_path / "odd.safetensors"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"odd\.safetensors cannot be used"):
        TensorFile(file)


def test_a_file_with_other_values_is_named(tmp_path):
    network, x, _ = made(dense)
    file = offload(bayesianize(network, x[:2]), tmp_path)
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ArtifactError, match=rf"{file.name} does not hold the trunk .* the values of '6\.weight' differ"
    ):
        offload(bayesianize(network, x[:2]), tmp_path)


def test_a_file_that_is_written_while_it_is_in_use_ends_the_use(tmp_path):
    network, x, y = made(dense)
    bnn = bayesianize(network, x[:2])
    file = offload(bnn, tmp_path)
    results(bnn, x, y)
    # Replaced whole, as another process would do that writes the same: what is mapped is still there.
    safetensors.torch.save_file({"other": torch.zeros(2)}, tmp_path / "new")
    (tmp_path / "new").replace(file)
    results(bnn, x, y)
    file.unlink()
    file = offload(bnn, tmp_path)
    with file.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(ModelChangedError, match=f"{file.name}.* was written or truncated"):
        predict(bnn, x)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    network, x, _ = made(dense)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        offload(bayesianize(network, x[:2]), tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_every_tensor_lies_where_the_allocator_would_put_it(dtype, tmp_path):
    tensors = {"a": torch.arange(7).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype), "b": torch.ones(3, 5).to(dtype)}
    write_tensors(tmp_path / "some.safetensors", tensors)
    file = TensorFile(tmp_path / "some.safetensors")
    assert file.tensors.keys() == tensors.keys()
    for name, value in file.tensors.items():
        assert torch.equal(value, tensors[name])
        assert value.dtype == dtype
        assert value.data_ptr() % 64 == 0


def test_tensors_that_others_packed_tightly_are_read_too(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5)}
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    body = tensors["a"].numpy().tobytes() + tensors["b"].numpy().tobytes()
    (tmp_path / "tight").write_bytes(len(text).to_bytes(8, "little") + text + body)
    found = TensorFile(tmp_path / "tight").tensors
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


# --- with the rest of the library


def test_what_is_saved_is_what_a_network_in_memory_loads(tmp_path):
    network, x, y = made(convolutions)
    bnn = bayesianize(network, x[:2])
    offload(bnn, tmp_path / "trunk")
    expected = results(bnn, x, y)[2]
    save(bnn, tmp_path / "posterior")
    again = load(tmp_path / "posterior", network)
    assert torch.equal(predict(again, x, samples=4).probs, expected)
    offload(again, tmp_path / "trunk")
    assert torch.equal(predict(again, x, samples=4).probs, expected)
    assert again.trunk_fingerprint == bnn.trunk_fingerprint


def test_a_model_that_is_changed_is_still_noticed(tmp_path):
    network, x, y = made(dense)
    bnn = bayesianize(network, x[:2])
    offload(bnn, tmp_path)
    results(bnn, x, y)
    with torch.no_grad():
        network[2][0].weight.add_(1)
    with pytest.raises(ModelChangedError, match=r"2\.0\.weight"):
        predict(bnn, x)
    with pytest.raises(ModelChangedError, match=r"2\.0\.weight"):
        offload(bnn, tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copies_and_pickles_hold_the_parameters_themselves(device, tmp_path):
    network, x, y = made(words)
    bnn = bayesianize(network, x[:2])
    file = offload(bnn, tmp_path)
    results(bnn, x, y)
    expected = predict(bnn, x, samples=4).probs
    offloaded_trunk(bnn.network).compute_on(torch.device(device))
    twins = [copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))]  # noqa: S301 - our own
    file.unlink()
    for twin in twins:
        offloaded_trunk(twin.network).compute_on(torch.device("cpu"))
        assert torch.equal(predict(twin, x, samples=4).probs, expected)


def test_a_network_that_shares_the_trunk_computes_with_the_file_too_until_it_moves(tmp_path):
    network, x, y = made(dense)
    bnn, other = bayesianize(network, x[:2]), bayesianize(network, x[:2])
    results(other, x, y)
    expected = predict(other, x, samples=4).probs
    other.share_trunk(bnn)
    offload(bnn, tmp_path)
    assert torch.equal(predict(other, x, samples=4).probs, expected)
    other.to("cpu")
    assert other.network is not bnn.network
    assert torch.equal(predict(other, x, samples=4).probs, expected)
    assert offloaded_trunk(other.network) is not offloaded_trunk(bnn.network)


# --- weights that were never in memory


def without_values(build):
    with torch.device("meta"):
        return build()[0]


@pytest.mark.parametrize("build", [dense, words, tied])
def test_a_model_with_mapped_weights_is_as_the_one_they_came_from(build, tmp_path):
    network, x, y = made(build)
    expected = results(bayesianize(network, x[:2]), x, y)
    save_weights(network, tmp_path / "model.safetensors")
    model = map_weights(without_values(build), tmp_path / "model.safetensors")
    assert not any(value.requires_grad for value in model.parameters())
    assert len(list(model.parameters())) == len(list(network.parameters()))
    assert equal(results(bayesianize(model, x[:2]), x, y), expected)


def test_mapped_weights_must_be_those_of_the_model(tmp_path):
    network, _, _ = made(dense)
    file = tmp_path / "model.safetensors"
    save_weights(network, file)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not a state dict"):
        map_weights(Words(), file)
    with pytest.raises(ArtifactError, match=r"'0\.weight' is torch\.float32"):
        map_weights(without_values(dense).double(), file)
    network.register_buffer("extra", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(InputError, match="'extra' is not in state dicts"):
        map_weights(network, file)
    with pytest.raises(StfbnnError, match="cannot be used"):
        map_weights(network, tmp_path / "none.safetensors")


# --- under a limit


def test_a_trunk_that_memory_has_no_room_to_train_is_inferred_and_one_without_room_is_offloaded(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("limits on a process's writable memory are those of Linux")
    # Freed memory goes back to the system at once, so that what is used is what is counted.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    expected = found["stage two, no limit"]["numbers"]
    assert "can't allocate memory" in found["training, enough for stage two"]["error"]
    assert found["stage two, enough"]["numbers"] == expected
    assert "can't allocate memory" in found["stage two, scarce"]["error"]
    assert found["stage two mapped, scarce"]["numbers"] == expected
    assert found["stage two offloaded, scarce"]["numbers"] == expected
    assert found["stage two offloaded, scarce"]["freed"] > 0.95 * large_trunk_script.TRUNK_MIB
