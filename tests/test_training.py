"""Stage one: it learns, its arithmetic is that of the big batch, and a killed run resumed equals one that was not."""

import copy
import os
import random
import signal
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import training_script
from stfbnn.checkpoint import previous_path
from stfbnn.errors import CheckpointError, InputError
from stfbnn.provenance import attached, overlap, provenance_of
from stfbnn.training import train
from stfbnn.training_choices import Objective, Schedule, build_optimizer

SCRIPT = Path(training_script.__file__)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs=4, outputs=3):
    model = nn.Linear(inputs, outputs)
    with torch.no_grad():
        model.weight.copy_(draw(outputs, inputs, seed=7))
        model.bias.zero_()
    return model


def labelled(count=20, classes=3, seed=0):
    inputs = draw(count, 4, seed=seed)
    return inputs, (inputs[:, 0] > 0).long() * (classes - 1)


def loader_of(*tensors, batch_size=5, **options):
    return DataLoader(TensorDataset(*tensors), batch_size, **options)


def quick(model=None, loader=None, **options):
    settings = {"epochs": 1, "accelerator": "cpu"} | options
    return train(model or linear(), loader_of(*labelled()) if loader is None else loader, **settings)


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- learning


def test_it_learns_digits():
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    seen, held_out = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    val = loader_of(inputs[held_out], targets[held_out], batch_size=128)
    run = quick(
        model,
        loader_of(inputs[seen], targets[seen], batch_size=32, shuffle=True),
        epochs=15,
        lr=5e-3,
        warmup=0.1,
        val_loader=val,
    )
    assert run.model is model
    assert not model.training
    with torch.no_grad():
        logits = model(inputs[held_out])
    accuracy = float((logits.argmax(1) == targets[held_out]).float().mean())
    assert accuracy > 0.95
    last = run.history[-1]
    assert last.val_accuracy == pytest.approx(accuracy)
    assert last.val_loss == pytest.approx(float(F.cross_entropy(logits, targets[held_out])), rel=1e-5)
    assert [record.epoch for record in run.history] == list(range(1, 16))
    assert last.loss < run.history[0].loss
    assert run.provenance.count == len(np.unique(digits.data[seen.numpy()], axis=0))
    assert overlap(run.provenance, provenance_of(val)) == 0
    assert attached(model).digest() == run.provenance.digest()


def test_it_learns_a_regression_with_a_column_of_outputs():
    data = load_diabetes()
    inputs = torch.tensor(data.data[:, :4]).float() * 20
    targets = torch.tensor((data.target - data.target.mean()) / data.target.std())
    model = linear(4, 1)
    run = quick(model, loader_of(inputs, targets, batch_size=442), epochs=150, lr=0.1)
    design = np.column_stack([inputs.numpy(), np.ones(442)])
    residual = np.linalg.lstsq(design, targets.numpy(), rcond=None)[1][0] / 442
    assert run.history[-1].loss == pytest.approx(residual, rel=1e-3)
    assert run.history[-1].accuracy is None
    assert model.weight.grad is None


def test_sgd_step_by_hand():
    inputs, targets = labelled(6)
    model = linear()
    weight = model.weight.detach().clone().requires_grad_()
    loss = F.cross_entropy(inputs @ weight.T, targets, label_smoothing=0.2)
    (gradient,) = torch.autograd.grad(loss, weight)
    run = quick(
        model,
        [(inputs, targets)],
        optimizer="sgd",
        lr=0.5,
        momentum=0.0,
        schedule="constant",
        label_smoothing=0.2,
        clip_norm=1e3,
    )
    assert torch.allclose(model.weight, weight - 0.5 * gradient, atol=1e-6)
    assert run.history[0].loss == pytest.approx(loss.item(), rel=1e-6)
    assert run.history[0].learning_rate == 0.5


def test_clipping_bounds_the_step():
    model = linear()
    before = copy.deepcopy(model.state_dict())
    quick(
        model,
        [labelled(6)],
        optimizer="sgd",
        lr=1.0,
        momentum=0.0,
        schedule="constant",
        clip_norm=0.01,
    )
    moved = torch.cat([(model.state_dict()[name] - before[name]).flatten() for name in before])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 4, 4], [5, 2, 7, 3, 1, 6, 2]])
def test_accumulation_equals_the_big_batch(sizes):
    inputs, targets = labelled(sum(sizes))
    small = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    big_sizes = [sum(sizes[start : start + 3]) for start in range(0, len(sizes), 3)]
    big = list(zip(inputs.split(big_sizes), targets.split(big_sizes), strict=True))
    options = {"epochs": 3, "optimizer": "sgd", "lr": 0.3, "schedule": "constant", "clip_norm": 0.2}
    first, second = (
        quick(linear(), small, accumulate=3, **options),
        quick(linear(), big, **options),
    )
    for name, value in first.model.state_dict().items():
        assert torch.allclose(value, second.model.state_dict()[name], atol=1e-6)
    for one, other in zip(first.history[:1], second.history[:1], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.accuracy == other.accuracy


def test_mappings_logits_and_target_key():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x, shift):
            return Output(self.layer(x + shift))

    inputs, targets = labelled()
    batches = [{"x": inputs, "shift": torch.zeros(20, 1), "y": targets}]
    run = quick(Model(), batches, target_key="y")
    other = quick(Model(), batches, target_key="y", output=lambda raw: raw.logits)
    assert run.history[0].loss == other.history[0].loss
    assert run.provenance.count == 20


def test_lazy_parameters_get_their_shapes_first():
    run = quick(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)), epochs=2)
    assert run.model[0].weight.shape == (8, 4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_run(precision):
    run = quick(precision=precision, epochs=3)
    reference = quick(epochs=3)
    assert run.history[-1].loss == pytest.approx(reference.history[-1].loss, rel=0.05)
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert run.model.weight.dtype == expected
    assert run.provenance.digest() == reference.provenance.digest()


def test_keep_best_ends_with_the_best_epoch():
    inputs, targets = labelled(40)
    held_out = [(draw(10, 4, seed=2), torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(1)))]
    run = quick(linear(), loader_of(inputs, targets), epochs=6, lr=0.3, val_loader=held_out, keep_best=True)
    losses = [record.val_loss for record in run.history]
    assert run.chosen_epoch == int(np.argmin(losses)) + 1 < 6
    with torch.no_grad():
        assert float(F.cross_entropy(run.model(held_out[0][0]), held_out[0][1])) == pytest.approx(min(losses))
    # The validation examples chose the parameters, so they count as seen; without keep_best they do not.
    assert run.provenance.count == 50
    plain = quick(linear(), loader_of(inputs, targets), val_loader=held_out)
    assert plain.provenance.count == 40
    assert plain.chosen_epoch == 1


def test_provenance_covers_what_drop_last_leaves_out():
    inputs, targets = labelled(11)
    loader = loader_of(inputs, targets, shuffle=True, drop_last=True)
    assert quick(loader=loader).provenance.count == 10
    assert quick(loader=loader, epochs=12).provenance.count == 11
    model = quick(loader=loader).model
    quick(model, loader_of(*labelled(8, seed=4)))
    assert attached(model).count == 18


def test_the_same_seed_gives_the_same_run_and_global_generators_are_left_alone():
    def once(seed):
        torch.manual_seed(11)
        run = quick(training_script.network(), loader_of(draw(20, 6), labelled()[1], shuffle=True), epochs=2, seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(11)))
        return run.model.state_dict()

    assert same(once(1), once(1))
    assert not same(once(1), once(2))


def test_every_epoch_draws_anew():
    class Spy(list):
        def __iter__(self):
            self.draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))
            return super().__iter__()

    loader = Spy([labelled()])
    loader.draws = []
    quick(loader=loader, epochs=3)
    assert len(loader.draws) == 4  # the first look and three epochs
    assert all(len(set(drawn)) == 4 for drawn in zip(*loader.draws, strict=True))


def test_loaders_without_length_and_samplers_with_epochs():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*labelled()))

    run = quick(loader=DataLoader(Stream(), 5), epochs=4, lr=1.0)
    assert run.provenance.count == 20
    expected = [Schedule().factor(epoch / 4) for epoch in range(4)]
    assert [record.learning_rate for record in run.history] == pytest.approx(expected)

    class Sampler(torch.utils.data.Sampler):
        def __init__(self):
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __iter__(self):
            return iter(range(20))

        def __len__(self):
            return 20

    sampler = Sampler()
    quick(loader=loader_of(*labelled(), sampler=sampler), epochs=3)
    assert sampler.epochs == [1, 2, 3]


def test_run_and_records_are_frozen_and_tabulated():
    run = quick(epochs=2)
    for frozen, name in ((run, "seconds"), (run.history[0], "loss")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, 0.0)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(run.table())
    console.file.close()
    text = console.export_text()
    assert "val accuracy" in text
    assert f"{run.history[1].loss:.4g}" in text
    assert run.seconds == pytest.approx(sum(record.seconds for record in run.history))


# --- resuming


def process(*arguments, launcher=(), timeout=60):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def uninterrupted():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = training_script.result(training_script.resumable(None, training_script.Noisy()))
    torch.set_num_threads(before)
    return found


def assert_equal_results(found, expected):
    assert same(found["model"], expected["model"])
    assert found["history"] == expected["history"]
    assert torch.equal(found["seen"], expected["seen"])
    assert found["chosen"] == expected["chosen"]


def resume(folder):
    """The resumed run's result and how many examples it drew."""
    dataset = training_script.Noisy()
    run = training_script.resumable(folder, dataset)
    return training_script.result(run), dataset.drawn


# Draws of the data set: 8 in the first look, then 48 an epoch.


def test_killed_in_the_middle_of_an_epoch_and_resumed(tmp_path, uninterrupted):
    killed = process("killed", tmp_path, 8 + 2 * 48 + 13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found, drawn = resume(tmp_path)
    assert drawn == 8 + 3 * 48
    assert_equal_results(found, uninterrupted)


@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_interrupted_by_the_keyboard_and_resumed(tmp_path, uninterrupted, epoch):
    dataset = training_script.Noisy(8 + (epoch - 1) * 48 + 30, training_script.interrupt)
    with pytest.raises(KeyboardInterrupt):
        training_script.resumable(tmp_path, dataset)
    found, drawn = resume(tmp_path)
    assert drawn == 8 + (6 - epoch) * 48
    assert_equal_results(found, uninterrupted)


def test_a_finished_run_is_given_back_at_once(tmp_path, uninterrupted):
    resume(tmp_path)
    found, drawn = resume(tmp_path)
    assert drawn == 8
    assert_equal_results(found, uninterrupted)
    run = training_script.resumable(tmp_path, training_script.Noisy())
    assert attached(run.model).digest() == run.provenance.digest()


def test_a_damaged_checkpoint_costs_an_epoch_and_not_exactness(tmp_path, uninterrupted):
    resume(tmp_path)
    path = tmp_path / "run.ckpt"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-10])
    with pytest.warns(UserWarning, match="going on from"):
        found, drawn = resume(tmp_path)
    assert drawn == 8 + 48
    assert_equal_results(found, uninterrupted)


def test_other_settings_are_refused(tmp_path):
    options = {"checkpoint": tmp_path / "c", "lr": 0.1}
    quick(**options)
    with pytest.raises(CheckpointError, match=r"epochs: 1 in the checkpoint, 2 now"):
        quick(**options, epochs=2)
    with pytest.raises(CheckpointError, match=r"parameter shapes.weight: \[3, 4\] in the checkpoint, \[5, 4\] now"):
        quick(linear(4, 5), **options)
    with pytest.raises(CheckpointError, match="optimizer settings"):
        quick(checkpoint=tmp_path / "c", lr=0.2)
    with pytest.raises(CheckpointError, match=r'loss: "auto" in the checkpoint, "torch\.nn\.\S+cross_entropy" now'):
        quick(**options, loss=F.cross_entropy)
    with pytest.raises(InputError, match="0 generators"):
        quick(loader=loader_of(*labelled(), generator=torch.Generator()), **options)
    anew = quick(**options, epochs=2, resume=False)
    assert len(anew.history) == 2
    assert same(quick(**options, epochs=2).model.state_dict(), anew.model.state_dict())


def test_checkpoints_every_few_epochs(tmp_path):
    run = quick(epochs=5, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert torch.equal(quick(epochs=5, checkpoint=tmp_path / "c").model.weight, run.model.weight)
    previous_path(tmp_path / "c").replace(tmp_path / "c")
    resumed = quick(epochs=5, checkpoint=tmp_path / "c")
    assert [astuple(record)[:-1] for record in resumed.history] == [astuple(record)[:-1] for record in run.history]
    # The previous one was of epoch 4, so only epoch 5 ran again and has another time.
    assert [first.seconds == second.seconds for first, second in zip(resumed.history, run.history, strict=True)] == [
        *[True] * 4,
        False,
    ]


def test_persistent_workers_are_warned_about(tmp_path):
    loader = loader_of(*labelled(), num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers"), pytest.raises(InputError, match="precision"):
        quick(loader=loader, checkpoint=tmp_path / "c", precision="7-true")


# --- several processes


def test_two_ranks_equal_one_process(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")
    done = process("ranks", tmp_path, launcher=(*launcher, str(20_000 + os.getpid() % 20_000)))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"result.{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in first:
        assert_equal_results(first[name], second[name])
    assert_equal_results(first["resumed"], first["straight"])
    assert_equal_results(first["finished"], first["straight"])
    alone = training_script.full_batch(1)
    for name, value in alone.model.state_dict().items():
        assert torch.allclose(value, first["full batch"]["model"][name], atol=1e-5)
    for (_, loss, accuracy, *_), record in zip(first["full batch"]["history"], alone.history, strict=True):
        assert loss == pytest.approx(record.loss, rel=1e-5)
        assert accuracy == pytest.approx(record.accuracy)
    assert torch.equal(first["full batch"]["seen"], alone.provenance.to_tensor())
    assert (tmp_path / "ranks.ckpt").exists()


def test_under_the_command_line_of_fabric(monkeypatch):
    for name, value in (("LT_CLI_USED", "1"), ("LT_DEVICES", "1"), ("LT_ACCELERATOR", "cpu"), ("LT_NUM_NODES", "1")):
        monkeypatch.setenv(name, value)
    assert quick(accelerator="auto").provenance.count == 20


def test_strategies_that_lose_the_model_are_refused():
    for strategy in ("ddp_spawn", "ddp_fork"):
        with pytest.raises(InputError, match="torchrun"):
            quick(devices=2, strategy=strategy)
    with pytest.raises(InputError, match="cannot be used here"):
        quick(devices=0)
    with pytest.raises(InputError, match="cannot be used here"):
        quick(precision="7-true")


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"accumulate": 1.5}, "accumulate must be a positive integer"),
        ({"checkpoint_every": True}, "checkpoint_every must be"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"keep_best": True}, "needs val_loader"),
        ({"seed": -1}, "seed must be"),
        ({"optimizer": "lion"}, 'must be "sgd"'),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1), "lr": 0.1}, "lr must be set inside"),
        ({"optimizer": lambda p: None}, "returned a NoneType"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"weight_decay": -1.0}, "weight_decay not negative"),
        ({"momentum": 0.9}, 'momentum belongs to optimizer="sgd"'),
        ({"momentum": 1.0, "optimizer": "sgd"}, r"momentum must be in \[0, 1\)"),
        ({"schedule": "linear"}, "schedule must be"),
        ({"schedule": lambda fraction: float("nan")}, "schedule= gave nan"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"loss": "mse"}, 'loss must be "auto"'),
        ({"loss": lambda outputs, target: outputs}, "scalar tensor"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"loss": F.cross_entropy, "label_smoothing": 0.1}, "inside your function"),
        ({"model": "x"}, "must be a torch.nn.Module"),
        ({"model": linear().requires_grad_(False)}, "nothing to train"),
        ({"model": nn.Sequential(linear(), nn.Softmax(1))}, "look like probabilities"),
        ({"model": linear(4, 1)}, "at least 2 classes"),
        ({"model": linear(4, 2)}, r"0 … 1 \(the model has 2 outputs\)"),
        ({"loader": iter([labelled()])}, "anew at each pass"),
        ({"loader": 3}, "anew at each pass"),
        ({"val_loader": 3}, "val_loader must give"),
        ({"loader": []}, "training loader gives no batch"),
        ({"val_loader": []}, "validation loader gives no batch"),
        ({"loader": loader_of(*labelled(), batch_size=99, drop_last=True)}, "drop_last"),
        ({"loader": [labelled()[0]]}, "pair"),
        ({"loader": [(labelled()[0] / 0, labelled()[1])]}, "inputs of the first training batch hold 80 NaN"),
        ({"val_loader": [(draw(2, 4), torch.tensor([0, 3]))]}, "they span 0 … 3"),
        ({"loader": [(draw(2, 4), F.one_hot(torch.tensor([0, 1]), 3))]}, "argmax"),
        ({"loader": [(draw(2, 4), torch.tensor([True, False]))]}, r"torch\.bool"),
        ({"loader": [(draw(2, 4), torch.zeros(2))]}, "shape"),
        ({"loader": [(draw(2, 4), torch.zeros(2, 3))], "label_smoothing": 0.1}, "integer targets"),
        ({"loader": [(draw(2, 4), torch.full((2, 3), torch.nan))]}, "targets hold NaN"),
    ],
)
def test_bad_input_is_refused_before_training(options, message, tmp_path):
    options = dict(options)
    model = options.pop("model", linear())
    with pytest.raises(InputError, match=message):
        quick(model, options.pop("loader", None), checkpoint=tmp_path / "c", **options)


def test_labels_out_of_range_in_a_later_batch():
    inputs, targets = labelled()
    targets[-1] = 7
    with pytest.raises(InputError, match="they span 0 … 7"):
        quick(loader=loader_of(inputs, targets))
    with pytest.raises(InputError, match="shape"):
        quick(loader=[labelled(), (inputs, targets.float())])


def test_divergence_names_the_place_and_keeps_the_last_checkpoint(tmp_path):
    def loss(outputs, target):
        # The first look, then 4 steps an epoch: this is epoch 2, step 1.
        loss.calls += 1
        return F.cross_entropy(outputs, target) / (loss.calls != 1 + 4 + 2)

    options = {"epochs": 3, "checkpoint": tmp_path / "c", "lr": 0.01, "loss": loss}
    loss.calls = 0
    model = linear()
    with pytest.raises(InputError, match=r"the loss is inf at epoch 2, step 1 .*lower lr \(it is"):
        quick(model, **options)
    assert bool(torch.isfinite(model.weight).all())
    assert not model.training
    resumed = quick(**options)
    assert [record.epoch for record in resumed.history] == [1, 2, 3]


def test_parameters_that_blow_up_in_the_last_step_are_not_kept(tmp_path):
    class Explosion(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.inf

    def loss(outputs, target):
        return F.cross_entropy(Explosion.apply(outputs) if bool((target == 1).all()) else outputs, target)

    batches = [labelled()] * 3 + [(labelled()[0], torch.ones(20, dtype=torch.int64))]
    with pytest.raises(InputError, match="parameter is NaN or infinite at epoch 1, step 3"):
        quick(loader=batches, loss=loss, checkpoint=tmp_path / "c")


def test_nan_inputs_in_a_later_batch_are_named():
    inputs, targets = labelled()
    inputs[-1, 0] = torch.nan
    with pytest.raises(InputError, match="the inputs of epoch 1, step 3 hold 1 NaN"):
        quick(loader=loader_of(inputs, targets))


def test_a_loader_that_dries_up():
    class Once:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([labelled()] if self.passes < 3 else [])

    with pytest.raises(InputError, match="no batch in epoch 2"):
        quick(loader=Once(), epochs=3)


# --- the choices


def test_schedule_against_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert Schedule().factor(step / 40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()
    warm = Schedule("constant", warmup=0.25)
    assert [warm.factor(fraction) for fraction in (0.0, 0.125, 0.25, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert Schedule("cosine", warmup=0.5).factor(0.75) == pytest.approx(0.5)
    assert Schedule(lambda fraction: 1 - fraction, warmup=0.5).factor(0.25) == pytest.approx(0.375)


def test_objective_shapes():
    outputs, labels = draw(6, 3), torch.arange(6) % 3
    expected = F.cross_entropy(outputs, labels)
    for target in (labels, labels[:, None], labels.to(torch.uint8)):
        assert Objective()(outputs, target) == expected
        assert Objective.correct(outputs, target) == (int((outputs.argmax(1) == labels).sum()), 6)
    dense, grid = draw(2, 3, 5), torch.zeros(2, 5, dtype=torch.int64)
    assert Objective()(dense, grid) == Objective()(dense, grid[:, None]) == F.cross_entropy(dense, grid)
    column, row = draw(6, 1), draw(6, seed=1)
    squares = float((column[:, 0] - row).square().mean())
    assert float(Objective()(column, row)) == float(Objective()(column[:, 0], row[:, None])) == pytest.approx(squares)
    assert Objective()(column, row[:, None].double()).dtype == torch.float32
    for target in (row[:5], draw(1, 6), draw(6, 2)):
        with pytest.raises(InputError, match="shape"):
            Objective()(column, target)


def test_optimizers_by_name():
    parameters = [nn.Parameter(torch.zeros(2))]
    sgd = build_optimizer("sgd", parameters, None, None, None)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.05, 0.9, 0.0)
    adamw = build_optimizer("adamw", parameters, 0.2, 0.3, None)
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.2, 0.3)
    own = build_optimizer(lambda p: torch.optim.RMSprop(p, lr=0.7), parameters, None, None, None)
    assert isinstance(own, torch.optim.RMSprop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = quick(optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01), epochs=2)
    assert run.history[0].learning_rate == pytest.approx(0.01 * Schedule().factor(3.5 / 8))
