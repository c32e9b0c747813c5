"""Stage two as a whole: what changes, what never does, what is chosen, what is refused, and exact resume."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from core_models import classification, conv_net, loader, mlp, trained
from stfbnn.conversion import bayesianize
from stfbnn.errors import CheckpointError, InputError, ModelChangedError
from stfbnn.inference.fit import fit
from stfbnn.inference.options import DEFAULT_TEMPERATURE
from stfbnn.likelihood import Gaussian
from stfbnn.prediction import predict

ENGINES = ["natural-gradient", "bayes-by-backprop"]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_trunk_or_the_model_changes(engine: str) -> None:
    net = conv_net()
    net[1].train()  # a mode of the user's own
    net[3].weight.requires_grad_(False)
    x, y = torch.randn(96, 1, 8, 8), torch.randint(0, 3, (96,))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    wants = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    bnn = bayesianize(net, x[:2])
    trunk = {name: value.clone() for name, value in bnn.network.state_dict().items()}
    start = bnn.posterior.mean_vector().detach().clone()
    bnn.train()
    fit(bnn, loader(x, y), epochs=2, engine=engine, temperature=1.0)
    bnn.train()
    predict(bnn, x)
    bnn(x)
    assert not torch.equal(start, bnn.posterior.mean_vector())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, value in bnn.network.state_dict().items():
        assert torch.equal(value, trunk[name]), name
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert wants == {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in bnn.network.parameters())
    assert not any(module.training for module in bnn.network.modules())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_free_energy_falls(engine: str) -> None:
    x, y = classification(400)
    net = trained(mlp(hidden=30), x, y)
    bnn = bayesianize(net, x[:2])
    run = fit(bnn, loader(x, y), epochs=30, engine=engine, temperature=1.0, engine_options={"learning_rate": 0.02})
    assert run.history[-1].free_energy < run.history[0].free_energy
    last = run.history[-1]
    kl = float(bnn.posterior.kl(bnn.prior).detach())
    assert last.kl == pytest.approx(kl)
    # KL is summed, and divided by the number of examples.
    assert last.free_energy == pytest.approx(last.nll + kl / 400)
    assert run.num_examples == 400


def test_an_overconfident_network_is_repaired() -> None:
    x, y = classification(240)
    x_val, y_val = classification(300, seed=1)
    x_test, y_test = classification(2000, seed=2)
    net = trained(mlp(hidden=64), x, y, steps=600)
    before = float(nn.functional.cross_entropy(net(x_test), y_test).detach())
    bnn = bayesianize(net, x[:2])
    run = fit(bnn, loader(x, y), epochs=40, val_loader=loader(x_val, y_val))
    after = -float(predict(bnn, x_test).log_density(y_test).mean())
    assert before > 1.0
    assert after < 0.75 * before
    best = min(run.trials, key=lambda trial: trial.held_out_nll)
    assert run.temperature == bnn.temperature == best.temperature
    # The posterior that is kept is the one that was scored.
    again = -float(predict(bnn, x_val).log_density(y_val).mean())
    assert again == pytest.approx(best.held_out_nll, abs=0.03)


def test_the_predictive_temperature_is_the_best_on_held_out_data() -> None:
    x, y = classification(240)
    x_val, y_val = classification(300, seed=1)
    bnn = bayesianize(trained(mlp(hidden=64), x, y, steps=600), x[:2])
    run = fit(
        bnn,
        loader(x, y),
        epochs=3,
        temperature=0.01,
        val_loader=loader(x_val, y_val),
        predictive_temperature="held-out",
        val_samples=64,
    )
    assert run.predictive_temperature == bnn.predictive_temperature

    def nll(tau: float) -> float:
        pred = predict(bnn, x_val, samples=256, predictive_temperature=tau)
        return -float(pred.log_density(y_val).mean())

    at_best = nll(run.predictive_temperature)
    assert at_best < nll(run.predictive_temperature * 1.4)
    assert at_best < nll(run.predictive_temperature / 1.4)


def test_early_stopping_takes_back_the_best_epoch() -> None:
    x, y = classification(120)
    x_val, y_val = classification(300, seed=1)
    net = trained(mlp(hidden=64), x, y, steps=600)
    bnn = bayesianize(net, x[:2])
    run = fit(
        bnn,
        loader(x, y),
        epochs=60,
        temperature=0.02,
        val_loader=loader(x_val, y_val),
        engine="bayes-by-backprop",
        engine_options={"learning_rate": 0.03},
        early_stop="nll",
        patience=4,
    )
    scores = [record.held_out_nll for record in run.history]
    assert None not in scores
    assert len(scores) < 60
    assert len(scores) - 1 - scores.index(min(scores)) == 4  # type: ignore[type-var]
    assert run.trials[0].held_out_nll == pytest.approx(min(scores), abs=1e-6)  # type: ignore[type-var]


def test_the_same_seed_gives_the_same_posterior() -> None:
    x, y = classification()
    results = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator's state does not matter
        bnn = bayesianize(mlp(), x[:2])
        fit(bnn, loader(x, y), epochs=2, temperature=1.0, seed=seed)
        results.append(bnn.posterior.mean_vector().detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_global_generator_is_left_alone() -> None:
    x, y = classification()
    bnn = bayesianize(mlp(), x[:2])
    state = torch.get_rng_state()
    fit(bnn, loader(x, y), epochs=1, temperature=1.0)
    predict(bnn, x)
    assert torch.equal(state, torch.get_rng_state())


def test_without_held_out_data_a_warning_names_the_temperature() -> None:
    x, y = classification()
    bnn = bayesianize(mlp(), x[:2])
    with pytest.warns(UserWarning, match=f"T={DEFAULT_TEMPERATURE:g}"):
        run = fit(bnn, loader(x, y), epochs=1)
    assert run.temperature == DEFAULT_TEMPERATURE


def test_regression_end_to_end() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = x[:, 0] * 2 + 0.3 * torch.randn(300)
    net = trained(nn.Sequential(mlp(outputs=1), nn.Flatten(0)), x, y)
    bnn = bayesianize(net, x[:2])
    fit(bnn, loader(x, y), epochs=20, temperature=1.0)
    assert isinstance(bnn.likelihood, Gaussian)
    pred = predict(bnn, x)
    assert float((pred.mean - y).square().mean()) < 0.15
    far = predict(bnn, 20 * x)
    assert float(far.std.mean()) > 2 * float(pred.std.mean())


def held_out_cases() -> list[tuple[str, DataLoader, DataLoader]]:
    x, y = classification()
    data = TensorDataset(x, y)
    return [
        ("the same object", DataLoader(data, 32), DataLoader(data, 32)),
        ("overlapping subsets", DataLoader(Subset(data, range(100)), 32), DataLoader(Subset(data, range(99, 150)), 32)),
        ("equal values", DataLoader(data, 32), loader(x[:40].clone(), y[:40])),
    ]


@pytest.mark.parametrize("case", range(3))
def test_held_out_data_that_were_seen_are_refused(case: int) -> None:
    _, train_loader, val_loader = held_out_cases()[case]
    bnn = bayesianize(mlp(), torch.zeros(2, 6))
    with pytest.raises(InputError, match="not held out"):
        fit(bnn, train_loader, epochs=1, val_loader=val_loader)


def test_disjoint_subsets_are_accepted_and_a_chance_duplicate_is_a_warning() -> None:
    x, y = classification()
    data = TensorDataset(x, y)
    halves = DataLoader(Subset(data, range(100)), 32), DataLoader(Subset(data, range(100, 200)), 32)
    fit(bayesianize(mlp(), x[:2]), halves[0], epochs=1, val_loader=halves[1], temperatures=[1.0])
    x[150] = x[3]
    with pytest.warns(UserWarning, match="1 of the held-out"):
        fit(bayesianize(mlp(), x[:2]), halves[0], epochs=1, val_loader=halves[1], temperatures=[1.0])


def test_what_stage_one_saw_is_remembered() -> None:
    from stfbnn.provenance import ProvenanceRecorder, attach

    x, y = classification()
    net = mlp()
    recorder = ProvenanceRecorder()
    recorder.add(x[100:])
    attach(net, recorder.finish())
    bnn = bayesianize(net, x[:2])
    with pytest.raises(InputError, match="seen by stage one"):
        fit(bnn, loader(x[:100], y[:100]), epochs=1, val_loader=loader(x[100:], y[100:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"temperature": -1.0}, "temperatures must be positive"),
        ({"temperature": "held-out"}, "needs val_loader"),
        ({"temperature": "cold"}, "temperatures must be positive"),
        ({"predictive_temperature": "held-out", "temperature": 1.0}, "needs val_loader"),
        ({"predictive_temperature": 0.0, "temperature": 1.0}, "predictive_temperature"),
        ({"early_stop": "nll", "temperature": 1.0}, "needs val_loader"),
        ({"engine": "sgd", "temperature": 1.0}, "not known"),
        ({"engine_options": {"lr": 1}, "temperature": 1.0}, "settings"),
        ({"likelihood": "student", "temperature": 1.0}, "likelihood"),
        ({"num_examples": 0, "temperature": 1.0}, "num_examples"),
        ({"seed": -1, "temperature": 1.0}, "seed"),
        ({"temperatures": 0.1}, "temperatures must be numbers to try"),
        ({"predictive_temperature": True, "temperature": 1.0}, "predictive_temperature"),
        ({"max_seen_share": "few", "temperature": 1.0}, "max_seen_share"),
        ({"max_seen_share": -0.1, "temperature": 1.0}, "max_seen_share"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, object], message: str) -> None:
    x, y = classification()
    with pytest.raises(InputError, match=message):
        fit(bayesianize(mlp(), x[:2]), loader(x, y), **options)  # type: ignore[arg-type]


def test_temperatures_are_tried_from_high_to_low_and_once() -> None:
    x, y = classification()
    halves = loader(x[:99], y[:99]), loader(x[99:], y[99:])
    run = fit(bayesianize(mlp(), x[:2]), halves[0], val_loader=halves[1], temperatures=[0.3, 0.1, 1], epochs=1)
    assert [trial.temperature for trial in run.trials] == [1.0, 0.3, 0.1]
    with pytest.raises(InputError, match="different numbers"):
        fit(bayesianize(mlp(), x[:2]), halves[0], val_loader=halves[1], temperatures=[0.1, 0.1])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_temperature_comes_to_does_not_depend_on_the_others(engine: str) -> None:
    x, y = classification(200)
    batches, held = loader(x, y, shuffle=False), loader(*classification(100, seed=1))
    model = trained(mlp(), x, y, 50)
    alone, among = bayesianize(model, x[:2]), bayesianize(model, x[:2])
    options = {"epochs": 2, "engine": engine, "val_loader": held}
    first = fit(alone, batches, temperatures=[0.1], **options)
    both = fit(among, batches, temperatures=[1.0, 0.1], **options)
    assert both.trials[1] == first.trials[0]
    assert [r.free_energy for r in both.history if r.temperature == 0.1] == [r.free_energy for r in first.history]
    again = fit(alone, batches, temperatures=[1.0], **options)
    assert again.trials[0] == both.trials[0]


def test_bad_data_are_refused() -> None:
    x, y = classification()
    nan = x.clone()
    nan[5, 0] = float("nan")
    for data, message in (
        ([], "no batch"),
        ([(nan, y)], "NaN"),
        ([(x, y + 1)], "0 … 2"),
        ([(x, y[:10])], "inputs, but targets"),
        ([(x, y.float())], "gaussian|broadcast|outputs' shape"),
        ([x], "pair"),
    ):
        with pytest.raises(InputError, match=message):
            fit(bayesianize(mlp(), x[:2]), data, temperature=1.0)


def test_bad_labels_in_a_later_batch_are_named() -> None:
    x, y = classification()
    with pytest.raises(InputError, match="0 … 2"):
        fit(bayesianize(mlp(), x[:2]), [(x, y), (x, y + 1)], temperature=1.0)


def test_a_changed_model_is_refused() -> None:
    x, y = classification()
    net = mlp()
    bnn = bayesianize(net, x[:2])
    with torch.no_grad():
        net[2].bias.add_(1)
    with pytest.raises(ModelChangedError):
        fit(bnn, loader(x, y), temperature=1.0)


SCRIPT = """
import os, signal, sys, torch
from core_models import classification, loader, mlp, trained
from stfbnn.inference.fit import fit
from stfbnn.conversion import bayesianize
torch.set_num_threads(1)
engine, checkpoint, out, kill_at = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
x, y = classification(120)
x_val, y_val = classification(60, seed=1)
count = 0
class Killing(torch.utils.data.DataLoader):
    def __iter__(self):
        global count
        for batch in super().__iter__():
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
data = torch.utils.data.TensorDataset(x, y)
own = torch.Generator().manual_seed(5) if engine == "bayes-by-backprop" else None
train = Killing(data, batch_size=32, shuffle=True, generator=own)
bnn = bayesianize(trained(mlp(), x, y, 50), x[:2])
run = fit(bnn, train, epochs=3, engine=engine, val_loader=loader(x_val, y_val), temperatures=[1.0, 0.3],
          predictive_temperature="held-out", early_stop="free-energy", checkpoint=checkpoint)
torch.save({"posterior": bnn.posterior.state_dict(), "T": run.temperature, "tau": run.predictive_temperature,
            "history": [(r.nll, r.kl, r.held_out_nll) for r in run.history]}, out)
"""


def run_script(arguments: list[str], expect: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, check=False)
    assert done.returncode == expect, done.stderr.decode()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_resumes_bit_for_bit(engine: str, tmp_path: Path) -> None:
    run_script([engine, str(tmp_path / "a.ckpt"), str(tmp_path / "a.pt"), "-1"], 0)
    # 4 batches an epoch; the survey and the first look come first: killed within stages one and two.
    for kill_at in ("11", "15"):
        run_script([engine, str(tmp_path / "b.ckpt"), str(tmp_path / "b.pt"), kill_at], -signal.SIGKILL)
    run_script([engine, str(tmp_path / "b.ckpt"), str(tmp_path / "b.pt"), "-1"], 0)
    whole, resumed = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")
    for name, value in whole["posterior"].items():
        assert torch.equal(value, resumed["posterior"][name]), name
    assert {key: whole[key] for key in ("T", "tau", "history")} == {
        key: resumed[key] for key in ("T", "tau", "history")
    }


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    x, y = classification()
    path = tmp_path / "run.ckpt"
    bnn = bayesianize(mlp(), x[:2])
    first = fit(bnn, loader(x, y), epochs=2, temperature=1.0, checkpoint=path)
    again = bayesianize(mlp(), x[:2])
    second = fit(again, loader(x, y), epochs=2, temperature=1.0, checkpoint=path)
    assert second == first
    assert torch.equal(again.posterior.mean_vector(), bnn.posterior.mean_vector())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    x, y = classification()
    path = tmp_path / "run.ckpt"
    fit(bayesianize(mlp(), x[:2]), loader(x, y), epochs=1, temperature=1.0, checkpoint=path)
    with pytest.raises(CheckpointError, match="temperatures"):
        fit(bayesianize(mlp(), x[:2]), loader(x, y), epochs=1, temperature=0.5, checkpoint=path)
    with pytest.raises(CheckpointError, match="model"):
        fit(bayesianize(mlp(seed=1), x[:2]), loader(x, y), epochs=1, temperature=1.0, checkpoint=path)
    fit(bayesianize(mlp(), x[:2]), loader(x, y), epochs=1, temperature=0.5, checkpoint=path, resume=False)


def test_the_history_is_shown_as_a_table() -> None:
    from rich.console import Console

    x, y = classification()
    bnn = bayesianize(mlp(), x[:2])
    halves = loader(x[:100], y[:100]), loader(x[100:], y[100:])
    run = fit(bnn, halves[0], epochs=1, val_loader=halves[1], temperatures=[1.0, 0.3])
    stream = io.StringIO()
    Console(width=120, file=stream).print(run.table())
    text = stream.getvalue()
    assert "free energy" in text
    assert f"{run.trials[0].held_out_nll:.4f}" in text
    assert run.as_dict()["temperature"] == run.temperature
