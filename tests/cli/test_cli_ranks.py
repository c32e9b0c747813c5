"""`stfbnn train` and `stfbnn fit` as the ranks of one run; what other commands say to that; and an error that is told once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import rank_networks
from commands import run, run_json
from rank_networks import BATCH, EPOCHS, LIMIT, SEED
from stfbnn.artifact import load
from stfbnn.cli import networks
from stfbnn.cli.ranks import Ranks
from stfbnn.cli.stage_one import batch_size
from stfbnn.errors import DataError, InputError, LostRankError
from stfbnn.processes import Processes
from two_ranks import LAUNCHER

# Six attempts, of two processes each, which import all that a command needs.
pytestmark = pytest.mark.timeout(600)

HERE = Path(rank_networks.__file__)
COMMAND = f"exec {sys.executable} -c 'from stfbnn.cli import main; main()'"

TRAIN = f"--data digits --limit {LIMIT} --batch-size {BATCH} --epochs {EPOCHS} --seed {SEED} --device cpu"
TRAIN += " --model rank_networks:network"
FIT = f"--batch-size {BATCH} --epochs {EPOCHS} --seed {SEED} --device cpu --temperature 0.3 --samples 4"


class Attempts:
    """What two ranks wrote, attempt by attempt."""

    def __init__(self, folder):
        self.folder = folder

    def said(self, attempt, rank, where="err"):
        return (self.folder / f"{attempt}.{rank}.{where}").read_text()

    def errors(self, attempt):
        lines = (self.said(attempt, 0) + self.said(attempt, 1)).splitlines()
        return [line for line in lines if line.startswith("error:")]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    """One start of torchrun, for each costs seconds: it starts both ranks again after every attempt but the last."""
    folder = tmp_path_factory.mktemp("ranks")
    made = folder / "run"
    steps = [
        ("reference", f"exec {sys.executable} {HERE} {folder}"),
        ("train killed", f"export KILLED_AFTER={made}/train.checkpoint.previous; {COMMAND} train {TRAIN} -o {made}"),
        ("train", f"{COMMAND} train {TRAIN} -o {made} --devices 2 --num-nodes 1"),
        ("fit", f"{COMMAND} fit {made} {FIT} --json --strategy ddp"),
        ("predict", f"{COMMAND} predict {made} -o {folder}/p.csv"),
        ("one rank diverges", f"export NAN_AFTER=12; {COMMAND} train {TRAIN} -o {folder}/nan"),
    ]
    script = "exec >$0/$A.$RANK.out 2>$0/$A.$RANK.err; case $A in\n"
    # An attempt that ends well is made to fail, so that the next one comes.
    for number, (_, command) in enumerate(steps):
        script += f"{number}) ({command}); code=$?; echo $code >$0/$A.$RANK.code; exit $((code == 0 ? 1 : code));;\n"
    script = f"A=$TORCHELASTIC_RESTART_COUNT; {script}esac"
    options = [
        "--nproc-per-node",
        "2",
        "--max-restarts",
        str(len(steps) - 1),
        "--monitor-interval",
        "0.05",
        "--no-python",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE.parent)}
    command = [*LAUNCHER, *options, "bash", "-c", script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode != 0
    for number, (name, _) in enumerate(steps):
        for file in list(folder.glob(f"{number}.*")):
            file.rename(folder / f"{name}{file.name.removeprefix(str(number))}")
    assert (folder / "reference.pt").exists(), done.stderr[-2000:]
    return Attempts(folder)


@pytest.fixture(scope="module")
def reference(attempts):
    """What the Python calls make of the same, on as many ranks and undisturbed."""
    return torch.load(attempts.folder / "reference.pt", weights_only=True)


def test_a_killed_training_goes_on_to_the_result_of_the_python_call(attempts, reference):
    made = attempts.folder / "run"
    found = safetensors.torch.load_file(made / "model.safetensors")
    assert found.keys() == reference["model"].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, reference["model"][name], rtol=0, atol=0)
    seen = safetensors.torch.load_file(made / "seen.safetensors")["seen"]
    assert torch.equal(seen, reference["seen"])
    history = json.loads((made / "history.json").read_text())["epochs"]
    assert [one["loss"] for one in history] == reference["losses"]
    assert attempts.said("train killed", 1, "code").strip() == "137"
    assert json.loads((made / "run.json").read_text())["training"]["ranks"] == 2


def test_the_posterior_is_that_of_the_python_call(attempts, reference):
    made = attempts.folder / "run"
    model = rank_networks.network()
    networks.load_weights(model, made / "model.safetensors")
    bnn = load(made / "posterior", model)
    assert torch.equal(bnn.posterior.mean_vector(), reference["mean"])
    assert torch.equal(bnn.posterior.std_vector(), reference["std"])
    history = json.loads((made / "fit_history.json").read_text())
    assert history["held_out_nll"] == reference["held-out NLL"]
    assert (history["ranks"], history["bytes_per_step"]) == (2, reference["bytes per step"])
    assert not list(made.glob(".*"))


def test_rank_0_alone_speaks(attempts):
    found = json.loads(attempts.said("fit", 0, "out"))
    assert found["ranks"] == 2
    assert "30 held out" in attempts.said("fit", 0)
    assert "The network is in" in attempts.said("train", 0, "out")
    for attempt in ("train", "fit"):
        assert attempts.said(attempt, 1, "out") == ""
        assert attempts.said(attempt, 1) == ""


def test_an_error_ends_all_ranks_and_is_told_once(attempts):
    (refused,) = attempts.errors("predict")
    assert "`stfbnn predict` is run by one process, but 2 were started" in refused
    assert "predict-shards" in refused
    assert not (attempts.folder / "p.csv").exists()
    # Rank 1 alone comes upon it, in the middle of an epoch in which rank 0 waits for it.
    (diverged,) = attempts.errors("one rank diverges")
    assert "the loss is nan at epoch 3" in diverged
    for attempt in ("predict", "one rank diverges"):
        assert "Traceback" not in attempts.said(attempt, 0) + attempts.said(attempt, 1)
        # Those that torchrun has ended before they could say how they end have left nothing.
        codes = [file.read_text().strip() for file in attempts.folder.glob(f"{attempt}.*.code")]
        assert set(codes) == {"1"}


# --- without other processes


def as_rank(monkeypatch, rank, count, **others):
    environment = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "LOCAL_RANK": rank, **others}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    "command", ["evaluate", "abstain", "export", "merge", "landscape", "attack", "privacy", "certify"]
)
def test_commands_of_one_process_are_refused_on_several(monkeypatch, command):
    as_rank(monkeypatch, 1, 3)
    assert f"`stfbnn {command}` is run by one process, but 3 were started" in run(command, "run", code=1).stderr
    as_rank(monkeypatch, 0, 1)
    assert "were started" not in run(command, "nowhere", "--help").stdout


def test_several_devices_without_torchrun_are_refused_by_its_name(tmp_path, monkeypatch):
    train = ["train", "--data", "digits", "-o", tmp_path / "run", "--device", "cpu"]
    refused = run(*train, "--devices", 2, code=1).stderr
    assert "torchrun --nnodes 1 --nproc-per-node 2 --no-python stfbnn" in refused
    assert "--nnodes 3 " in run("fit", tmp_path, "--num-nodes", 3, code=1).stderr
    assert "--devices must be auto or a number" in run(*train, "--devices", "0,1", code=1).stderr
    assert "--num-nodes must be at least 1" in run(*train, "--num-nodes", 0, code=1).stderr
    as_rank(monkeypatch, 0, 2)
    assert "but not that torchrun started" in run(*train, code=1).stderr
    assert not (tmp_path / "run").exists()


def test_what_contradicts_torchrun_is_refused_before_the_ranks_are_connected(tmp_path, monkeypatch):
    as_rank(monkeypatch, 0, 2, TORCHELASTIC_RUN_ID="none")
    train = ["train", "--data", "digits", "-o", tmp_path / "run"]
    assert "--devices is 3, but torchrun started 2" in run(*train, "--devices", 3, "--device", "cpu", code=1).stderr
    assert "--num-nodes is 2, but torchrun started 1" in run(*train, "--num-nodes", 2, "--device", "cpu", code=1).stderr
    assert "one device for 2 processes" in run(*train, "--device", "cpu:0", code=1).stderr


def test_options_of_several_processes_change_nothing_in_one(tmp_path):
    train = ["train", "--data", "digits", "--limit", 200, "--epochs", 1, "--device", "cpu"]
    fit = ["--epochs", 1, "--temperature", 0.3, "--samples", 2, "--device", "cpu"]
    said = []
    for name, extra in (("plain", []), ("said", ["--devices", 1, "--num-nodes", 1, "--precision", "32-true"])):
        folder = tmp_path / name
        run(*train, "-o", folder, *extra)
        said.append(run_json("fit", folder, *fit, *extra))
    for file in ("model.safetensors", "posterior/posterior.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "said" / file).read_bytes()
    assert [one["history"][0]["nll"] for one in said] == [said[0]["history"][0]["nll"]] * 2
    assert "precision must be" in run("fit", tmp_path / "plain", "--precision", "half", *fit, code=1).stderr


class Told(Processes):
    """Rank 0 of two, the other of which gives what it is told to."""

    def __init__(self, other):
        super().__init__()
        self.count, self.other = 2, other

    def gather(self, value):
        return [value, self.other]


def two(other):
    return Ranks(Told(other), torch.device("cpu"), {}, launched=True)


def test_what_fails_on_one_rank_ends_all_of_them():
    assert two(None).by_each(lambda: 3) == 3
    with pytest.raises(DataError, match="only there"):
        two(DataError("only there")).by_each(lambda: 3)

    def fail():
        raise InputError("here")

    with pytest.raises(InputError, match="here"):
        two(DataError("there")).by_each(fail)


def test_ranks_with_other_data_are_refused():
    two(("a", None)).require_same("data", ("a", None))
    with pytest.raises(InputError, match="different data: a on rank 0, b on rank 1"):
        two("b").require_same("data", "a")


class Gone(Told):
    """The other rank has ended."""

    def gather(self, value):
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")

    from_first = gather


def test_a_rank_that_was_lost_between_the_stages_is_named():
    gone = Ranks(Gone(None), torch.device("cpu"), {}, launched=True)
    for talk in (gone.by_each, gone.by_first, lambda action: gone.require_same("data", action)):
        with pytest.raises(LostRankError, match="rank 0 of 2 lost another rank"):
            talk(lambda: 3)


def test_another_training_by_one_process_takes_the_batches_of_all_ranks():
    record = SimpleNamespace(training={"batch_size": 16, "ranks": 3})
    assert batch_size(record) == 48
    assert batch_size(SimpleNamespace(training={"batch_size": 16})) == 16
