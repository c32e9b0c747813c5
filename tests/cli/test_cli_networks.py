"""Networks from the command line: factories by name, weights from every kind of file, clear refusals."""

import pickle
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from stfbnn import factories
from stfbnn.checkpoint import save_checkpoint
from stfbnn.cli import networks
from stfbnn.errors import CheckpointError, InputError
from stfbnn.provenance import attached, provenance_of
from stfbnn.weights_file import save_weights


class Small(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return Small()


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    """Write a module into a fresh current folder, and forget it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    ],
    ids=["plain", "nested", "under model", "DataParallel", "Lightning", "compiled"],
)
def test_state_dicts_load_in_all_their_wrappings(wrap, trained, tmp_path):
    torch.save(wrap(trained.state_dict()), tmp_path / "weights.pt")
    model = Small()
    networks.load_weights(model, tmp_path / "weights.pt")
    assert same(model, trained.state_dict())


def test_a_prefix_that_is_the_models_own_stays(tmp_path):
    own = nn.DataParallel(Small())
    torch.save(own.state_dict(), tmp_path / "weights.pt")
    model = nn.DataParallel(Small())
    networks.load_weights(model, tmp_path / "weights.pt")
    assert same(model, own.state_dict())


def test_safetensors_round_trip_also_of_tied_weights(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_weights(tied, tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    networks.load_weights(model, tmp_path)
    assert same(model, tied.state_dict())


def test_a_training_checkpoint_gives_the_last_epoch_or_the_best(trained, tmp_path):
    torch.manual_seed(2)
    best = Small().state_dict()
    for name, state, expected in (
        ("last", {"model": trained.state_dict(), "best": None}, trained.state_dict()),
        ("best", {"model": trained.state_dict(), "best": {"model": best, "epoch": 1}}, best),
    ):
        save_checkpoint(tmp_path / name, state, {"stage": "train"})
        model = Small()
        networks.load_weights(model, tmp_path / name)
        assert same(model, expected)
    save_checkpoint(tmp_path / "fit", {"engine": {}}, {})
    with pytest.raises(InputError, match="stage two, which holds no network"):
        networks.load_weights(Small(), tmp_path / "fit")
    damaged = bytearray((tmp_path / "last").read_bytes())
    damaged[-20] ^= 1
    (tmp_path / "last").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        networks.load_weights(Small(), tmp_path / "last")


def test_misfits_are_named_key_by_key(trained, tmp_path):
    state = trained.state_dict()
    state["extra.weight"] = state.pop("last.bias")
    state["first.weight"] = torch.zeros(4, 2)
    torch.save(state, tmp_path / "weights.pt")
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with pytest.raises(InputError) as caught:
        networks.load_weights(trained, tmp_path / "weights.pt")
    assert "missing in the file (1): last.bias" in str(caught.value)
    assert "unknown to the model (1): extra.weight" in str(caught.value)
    assert "first.weight is (4, 2) in the file and (3, 2) in the model" in str(caught.value)
    assert same(trained, before)


class Malice:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_files_that_are_no_weights_are_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malice()}, "malice.pt")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Malice(), protocol=2))
    torch.save({"epoch": 3, "x": torch.ones(1)}, "mixed.pt")
    torch.save([1, 2], "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(9)})[:-5])
    for name, message in {
        "malice.pt": "never loaded",
        "bare.pkl": "bare.pkl",
        "mixed.pt": "epoch are no tensors",
        "list.pt": "holds a list",
        "text.pt": "text.pt",
        "cut.safetensors": "damaged",
        "absent.pt": "there is no file absent.pt",
    }.items():
        with pytest.raises(InputError, match=message):
            networks.load_weights(Small(), Path(name))
    assert not (tmp_path / "executed").exists()


def test_a_factory_gets_what_it_asks_for_and_the_users_word_wins(module_file):
    name = module_file(
        "my_nets",
        "from torch import nn\n"
        "class Outer:\n"
        "    @staticmethod\n"
        "    def net(num_classes, hidden=4):\n"
        "        return nn.Sequential(nn.Linear(2, hidden), nn.Linear(hidden, num_classes))\n",
    )
    offered = {"input_shape": [2], "num_classes": 3}
    model, given = factories.build(f"{name}:Outer.net", {"hidden": 7}, offered)
    assert given == {"hidden": 7, "num_classes": 3}
    assert (model[0].out_features, model[1].out_features) == (7, 3)
    assert factories.build(f"{name}:Outer.net", {"num_classes": 5}, offered)[0][1].out_features == 5


def test_bad_factories_are_refused_with_the_reason(module_file):
    module_file("broken_nets", "import nothing_of_this_name\n")
    module_file("failing_nets", "1 / 0\n")
    module_file(
        "odd_nets",
        "from torch import nn\nmodel = nn.Linear(1, 1)\nnumber = 3\n"
        "def text():\n    return 'x'\ndef fails(a):\n    raise KeyError(a)\n",
    )
    for factory, message in {
        "nocolon": "package.module:factory",
        "not_there:net": "there is no module 'not_there'",
        "broken_nets:net": "needs 'nothing_of_this_name', which is not installed",
        "failing_nets:net": "failed with ZeroDivisionError",
        "odd_nets:txt": "did you mean text",
        "odd_nets:model": "a function or a class",
        "odd_nets:number": "a function or a class",
        "odd_nets:text": "returned a str",
        "odd_nets:fails": "failed with TypeError",
    }.items():
        with pytest.raises(InputError, match=message):
            factories.build(factory, {}, {})
    with pytest.raises(InputError, match="failed with KeyError: 5"):
        factories.build("odd_nets:fails", {"a": 5}, {})


def test_what_a_network_saw_travels_beside_it(trained, tmp_path):
    seen = provenance_of([(torch.arange(6.0).reshape(3, 2), torch.zeros(3))])
    networks.save_seen(seen, tmp_path / "seen.safetensors")
    networks.attach_seen(trained, tmp_path / "seen.safetensors")
    assert attached(trained).digest() == seen.digest()
    networks.attach_seen(Small(), tmp_path / "absent.safetensors")
    (tmp_path / "seen.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        networks.attach_seen(trained, tmp_path / "seen.safetensors")
