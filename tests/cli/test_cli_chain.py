"""The whole way in one process: train, fit, evaluate, predict, and what each of them refuses."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commands import run, run_json
from stfbnn.artifact import load
from stfbnn.data import hold_out, loader
from stfbnn.data import load as load_data
from stfbnn.models import mlp
from stfbnn.prediction import predict
from stfbnn.provenance import Provenance, overlap, provenance_of
from stfbnn.randomness import seeded
from stfbnn.training import train

SMALL = ["--model-args", '{"hidden": 16}', "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    result = run_json("train", "--data", "digits", "-o", folder, "--epochs", 6, "--hold-out", 0.2, "--seed", 3, *SMALL)
    return folder, result


@pytest.fixture(scope="module")
def fitted(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "out"
    return folder, run_json("fit", trained[0], "-o", folder, "--epochs", 2, "--tau", "held-out", "--samples", 4)


def digits(seed=3):
    data = load_data("digits")
    return data, *hold_out(data.train, 0.2, seed)


def test_train_holds_out_before_it_trains(trained):
    folder, result = trained
    data, rest, held = digits()
    assert (result["examples"], result["held_out"]) == (len(rest), len(held))
    seen = Provenance.from_tensor(load_file(folder / "seen.safetensors")["seen"])
    assert overlap(seen, provenance_of(loader(rest, 512, mean=data.mean, std=data.std))) == seen.count
    own = provenance_of(loader(held, 512, mean=data.mean, std=data.std))
    # Not one, but for digits that are equal pixel for pixel.
    assert overlap(seen, own) == overlap(provenance_of(loader(rest, 512, mean=data.mean, std=data.std)), own)
    record = json.loads((folder / "run.json").read_text())
    assert record["hold_out"] == {"share": 0.2, "seed": 3, "part": "train"}
    assert record["classes"] == [str(digit) for digit in range(10)]


def test_the_weights_are_those_that_the_library_trains(trained):
    folder, result = trained
    data, rest, _ = digits()
    with seeded(3, "model"):
        model = mlp((1, 8, 8), 10, hidden=16)
    train(model, loader(rest, 128, shuffle=True, mean=data.mean, std=data.std), epochs=6, seed=3, progress=False)
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["last_epoch"]["epoch"] == 6


def test_train_again_goes_on_and_ends_the_same(trained, tmp_path):
    folder, result = trained
    again = run_json("train", "--data", "digits", "-o", folder, "--epochs", 6, "--hold-out", 0.2, "--seed", 3, *SMALL)
    assert again == result


def test_fit_picks_the_split_up_and_writes_a_posterior_of_the_right_size(fitted, trained):
    folder, result = fitted
    assert result["random_parameters"] == 64 * 16 + 16
    assert {trial["temperature"] for trial in result["trials"]} <= {1.0, 0.3, 0.1, 0.03, 0.01}
    assert result["num_examples"] == trained[1]["examples"]
    assert (folder / "posterior" / "posterior.safetensors").stat().st_size < 8 * 1040 + 1000
    record, before = (json.loads(path.read_text()) for path in (folder / "fit.json", trained[0] / "run.json"))
    for name in ("hold_out", "train_digest", "held_out_digest", "mean", "std", "classes"):
        assert record[name] == before[name]


def test_fit_prints_what_it_finds_wrong_and_takes_a_prior_for_each_parameter(trained, tmp_path):
    options = ["--epochs", 1, "--temperature", 1e-8, "--samples", 4, "--prior", '{"weight": 0.2, "bias": 3}']
    said = " ".join(run("fit", trained[0], "-o", tmp_path / "a", *options).stdout.split())
    assert "collapsed-to-point" in said
    result = run_json("fit", trained[0], "-o", tmp_path / "b", *options)
    assert "collapsed-to-point" in {finding["name"] for finding in result["findings"]}
    config = json.loads((tmp_path / "b" / "posterior" / "config.json").read_text())
    assert config["prior"]["std"] == pytest.approx([0.2, 3.0])


def test_evaluate_and_predict_say_what_the_library_says(fitted, trained, tmp_path):
    folder, _ = fitted
    model = mlp((1, 8, 8), 10, hidden=16)
    model.load_state_dict(load_file(trained[0] / "model.safetensors"))
    bnn = load(folder / "posterior", model)
    data = load_data("digits")
    expected = predict(bnn, loader(data.test, 64, mean=data.mean, std=data.std), samples=4, seed=1, progress=False)

    target = tmp_path / "p.csv"
    said = run_json("predict", folder, "-o", target, "--samples", 4, "--seed", 1)
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert said["count"] == len(rows) == len(data.test)
    assert [int(row["class"]) for row in rows] == expected.labels.tolist()
    assert np.allclose([float(row["epistemic"]) for row in rows], expected.epistemic, atol=1e-6)
    assert np.allclose([float(row["probability_3"]) for row in rows], expected.probs[:, 3], atol=1e-6)

    figures = run_json("evaluate", folder, "--samples", 4, "--seed", 1, "--plots", tmp_path / "plots")
    assert list(figures["methods"]) == ["trained network", "temperature-scaled", "STF-BNN"]
    accuracy = (expected.labels == data.test.targets).double().mean().item()
    assert figures["methods"]["STF-BNN"]["accuracy"] == pytest.approx(accuracy)
    nll = -expected.log_density(data.test.targets).mean().item()
    assert figures["methods"]["STF-BNN"]["nll"] == pytest.approx(nll, abs=1e-6)
    assert [Path(path).read_bytes()[:4] for path in figures["plots"]] == [b"\x89PNG"]


def test_at_mean_has_no_epistemic_part(fitted, tmp_path):
    said = run_json("predict", fitted[0], "-o", tmp_path / "p.npz", "--at-mean")
    assert said["means"]["epistemic"] == 0 < said["means"]["aleatoric"]


def test_merged_weights_predict_as_the_mean_does_and_overwrite_nothing(fitted, trained, tmp_path):
    said = run_json("merge", fitted[0], "-o", tmp_path / "merged.safetensors")
    model, merged = mlp((1, 8, 8), 10, hidden=16), mlp((1, 8, 8), 10, hidden=16)
    model.load_state_dict(load_file(trained[0] / "model.safetensors"))
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    pairs = zip(model.state_dict().items(), merged.state_dict().values(), strict=True)
    changed = {name for (name, before), after in pairs if not torch.equal(before, after)}
    assert changed == {f"{said['layer']}.weight", f"{said['layer']}.bias"}
    x = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    probs = (merged(x).double() / said["predictive_temperature"]).softmax(1)
    expected = predict(load(fitted[0] / "posterior", model), x, weights="mean").probs
    torch.testing.assert_close(probs, expected.double(), rtol=1e-5, atol=1e-6)

    weights = trained[0] / "model.safetensors"
    before = weights.read_bytes()
    assert "exists" in run("merge", fitted[0], "-o", weights, code=1).stderr
    assert weights.read_bytes() == before
    assert "must end in .safetensors" in run("merge", fitted[0], "-o", tmp_path / "merged.pt", code=1).stderr


def test_strange_examples_are_told_apart_and_tables_are_printed(fitted, tmp_path):
    strange = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", x=strange)
    out = run("evaluate", fitted[0], "--ood", tmp_path / "noise.npz", "--plots", tmp_path, "--samples", 4)
    assert "Out of distribution: noise.npz" in out.stdout
    assert "temperature-scaled: τ =" in out.stdout
    assert "359 test examples" in out.stdout
    assert (tmp_path / "entropy_noise-npz.png").exists()
    figures = run_json("evaluate", fitted[0], "--ood", tmp_path / "noise.npz", "--samples", 4)
    seen = figures["out_of_distribution"]["noise.npz"]
    assert seen["trained network"]["auroc_epistemic"] is None
    assert 0.5 < seen["STF-BNN"]["auroc_entropy"] <= 1


def test_the_tables_fit_a_terminal_of_80_characters(fitted, tmp_path):
    out = run("evaluate", fitted[0], "--ood", "digits", "--samples", 2).stdout
    assert max(len(line) for line in out.splitlines() if line[:1] in "┏┃│") <= 80


def test_another_held_out_part_is_refused(trained, tmp_path):
    for option in (["--hold-out", 0.1], ["--hold-out", 0.2, "--hold-out-of", "test"], ["--hold-out", 0]):
        said = run("fit", trained[0], "-o", tmp_path, *option, code=1).stderr
        assert said.startswith("error: stage one held out 0.2 with seed 3")
    assert "needs the same" in run("fit", trained[0], "-o", tmp_path, "--mean", 0, "--std", 1, code=1).stderr


def test_other_training_data_are_refused_and_the_same_elsewhere_are_not(trained, tmp_path):
    data = load_data("digits")
    parts = {"x_train": data.train.stored, "y_train": data.train.targets, "x_test": data.test.stored}
    parts |= {"y_test": data.test.targets}
    np.savez(tmp_path / "copy.npz", **{name: part.numpy() for name, part in parts.items()})
    parts["x_train"] = parts["x_train"].clone()
    parts["x_train"][5, 0, 3, 3] = 1 - parts["x_train"][5, 0, 3, 3]
    np.savez(tmp_path / "other.npz", **{name: part.numpy() for name, part in parts.items()})
    fast = ["-o", tmp_path / "o", "--epochs", 1, "--temperature", 0.1, "--samples", 1]
    said = run("fit", trained[0], "--data", tmp_path / "other.npz", *fast, code=1).stderr
    assert "not those of the earlier stage" in said
    run("fit", trained[0], "--data", tmp_path / "copy.npz", *fast)


def test_a_folder_of_another_run_is_not_gone_on_with(trained, tmp_path):
    other = ["train", "--data", "digits", "--epochs", 1, *SMALL, "-o", tmp_path / "a"]
    run(*other)
    said = run(*other, "--hold-out", 0.3, code=1).stderr
    assert "records another run" in said
    assert "training examples" in said
    run(*other, "--hold-out", 0.3, "--no-resume")


def test_a_network_of_the_users_own_is_measured_on_a_share_of_the_test_part(trained, tmp_path):
    weights = tmp_path / "net.pt"
    torch.save({"state_dict": load_file(trained[0] / "model.safetensors")}, weights)
    own = ["--model", "stfbnn.models:mlp", *SMALL, "--checkpoint", weights, "--data", "digits", "--epochs", 1]
    own += ["--temperature", 0.1, "--samples", 2]
    out = run("fit", *own, "--hold-out", 100, "--hold-out-of", "test", "-o", tmp_path / "bayes")
    assert "note: inputs are normalised" in out.stderr
    assert run_json("evaluate", tmp_path / "bayes", "--samples", 2)["examples"] == 259
    # All of the test part by name brings the held-out examples in, and that is said.
    said = run("evaluate", tmp_path / "bayes", "--data", "digits", "--samples", 2).stderr
    assert re.search(r"warning: (99|100) of the 35\d test examples are the held-out ones", said)
    assert "warning: nothing says" in run("fit", *own, "--hold-out", 0.1, "-o", tmp_path / "b").stderr
    assert (
        "T=0.1 is taken"
        in run("fit", *[o for o in own if o not in ("--temperature", 0.1)], "-o", tmp_path / "c").stderr
    )
    assert "needs val_loader" in run("fit", *own, "-o", tmp_path / "d", "--tau", "held-out", code=1).stderr


def test_weights_that_changed_since_are_refused(fitted, trained, tmp_path):
    state = load_file(trained[0] / "model.safetensors")
    state["3.bias"] += 1e-3
    torch.save(state, tmp_path / "changed.pt")
    said = run("evaluate", fitted[0], "--checkpoint", tmp_path / "changed.pt", code=1).stderr
    assert said.startswith("error: ")
    assert "other trunk weights" in said


def test_test_examples_that_were_trained_on_are_pointed_out(fitted, tmp_path):
    _, rest, _ = digits()
    np.savez(tmp_path / "seen.npz", x=rest.stored[:50].numpy(), y=rest.targets[:50].numpy())
    said = run("evaluate", fitted[0], "--data", tmp_path / "seen.npz", "--samples", 2).stderr
    assert "trained on 50 of the 50 test examples" in said


def write_table(path, rows, header):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    inputs = random.normal(size=(120, 2)) * [1, 5] + [0, 40]
    target = 1000 + 30 * inputs[:, 0] - inputs[:, 1] + random.normal(size=120)
    write_table(folder / "t.csv", np.column_stack([inputs, target]).tolist(), ["a", "b", "price"])
    common = ["--epochs", 60, "--hold-out", 0.25, "--batch-size", 32, "--lr", 0.01]
    run("train", "--data", folder / "t.csv", "-o", folder / "r", *common, *SMALL)
    run("fit", folder / "r", "--epochs", 3, "--samples", 4)
    return folder


def test_a_regression_goes_the_same_way_in_the_targets_unit(table_run, tmp_path):
    write_table(tmp_path / "new.csv", [[0, 40], [1, 40], [-1, 40]], ["a", "b"])
    run("predict", table_run / "r", "--data", tmp_path / "new.csv", "-o", tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["mean"] for row in rows] == pytest.approx([960, 990, 930], abs=15)
    for row in rows:
        assert row["std"] ** 2 == pytest.approx(row["aleatoric_std"] ** 2 + row["epistemic_std"] ** 2, rel=1e-4)
    figures = run_json("evaluate", table_run / "r", "--data", table_run / "t.csv")
    assert list(figures["methods"]) == ["trained network", "STF-BNN"]
    assert figures["methods"]["STF-BNN"]["rmse"] < 15
    assert "no test part" in run("evaluate", table_run / "r", code=1).stderr
    assert "categorical" in run("evaluate", table_run / "r", "--ood", "digits", code=1).stderr


def test_tables_with_other_columns_are_refused(table_run, tmp_path):
    for header in (["b", "a"], ["b", "a", "price"], ["a", "c", "price"]):
        write_table(tmp_path / "new.csv", [[1.0] * len(header)] * 3, header)
        said = run("predict", table_run / "r", "--data", tmp_path / "new.csv", "-o", tmp_path / "p.csv", code=1).stderr
        assert "the network was made for ['a', 'b']" in said
    assert not (tmp_path / "p.csv").exists()


def test_classes_are_matched_by_name_not_by_order(tmp_path):
    random = np.random.default_rng(1)
    first = np.concatenate([random.normal(-4, 1, 60), random.normal(4, 1, 60), random.normal(12, 1, 60)])
    names = ["apple"] * 60 + ["kiwi"] * 60 + ["pear"] * 60
    write_table(tmp_path / "t.csv", list(zip(first, first * 0, names, strict=True)), ["u", "v", "fruit"])
    write_table(tmp_path / "n.csv", [(12, 0, "pear"), (11, 0, "pear"), (4, 0, "kiwi")], ["u", "v", "fruit"])
    write_table(tmp_path / "x.csv", [(12, 0, "plum")], ["u", "v", "fruit"])
    run("train", "--data", tmp_path / "t.csv", "-o", tmp_path / "r", "--epochs", 30, "--lr", 0.02, *SMALL)
    run("fit", tmp_path / "r", "--epochs", 1, "--temperature", 0.01, "--samples", 2)
    figures = run_json("evaluate", tmp_path / "r", "--data", tmp_path / "n.csv")
    assert figures["methods"]["trained network"]["accuracy"] == 1
    assert (
        "['plum'], which the network does not know"
        in run("evaluate", tmp_path / "r", "--data", tmp_path / "x.csv", code=1).stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-o", "x"], "say what to train on with --data"),
        (["train", "--data", "digits", "-o", "x", "--hold-out", "1.5"], "--hold-out must be a share"),
        (["train", "--data", "digits", "-o", "x", "--model-args", "{"], "--model-args must be a JSON object"),
        (["train", "--data", "digits", "-o", "x", "--model-args", "[]"], "--model-args must be a JSON object"),
        (["train", "--data", "nowhere", "-o", "x"], "there is no file or folder nowhere"),
        (["train", "--data", "digits", "-o", "x", "--device", "abacus"], "--device abacus cannot be used"),
        (["train", "--data", "digits", "-o", "x", "--mean", "0"], "give both --mean and --std"),
        (["train", "--data", "digits", "-o", "x", "--mean", "a"], "--mean must be a number"),
        (["train", "--data", "digits", "-o", "x", "--image-size", "8y8"], "--image-size must be"),
        (["train", "-o", "x", "--kind", "csv"], "--kind say how to read --data"),
        (["fit"], "say where to put the posterior"),
        (["fit", "-o", "x"], "give RUN, the folder"),
        (["fit", "nowhere"], "there is no run.json in nowhere"),
        (["fit", "-o", "x", "--prior", "narrow"], "--prior must be a number or one of"),
        (["fit", "-o", "x", "--prior", '{"weight": '], "--prior must be a JSON object"),
        (["fit", "-o", "x", "--hold-out-of", "middle"], "--hold-out-of must be train or test"),
        (["evaluate", "nowhere"], "there is no fit.json in nowhere"),
        (["evaluate", "nowhere", "--limit", "3"], "--limit"),
        (["predict", "nowhere", "-o", "p.txt"], "--output must end in"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=1)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_temperatures_to_try_can_be_said(trained, tmp_path):
    said = run_json("fit", trained[0], "-o", tmp_path, "--epochs", 1, "--temperatures", "0.2,0.5", "--samples", 2)
    assert [trial["temperature"] for trial in said["trials"]] == [0.5, 0.2]
    assert "different numbers" in run("fit", trained[0], "-o", tmp_path, "--temperatures", "0.2,0.2", code=1).stderr


def test_held_out_data_that_changed_are_refused(trained, tmp_path):
    _, rest, held = digits()
    values = held.stored.numpy().copy()
    np.savez(tmp_path / "val.npz", x=values, y=held.targets.numpy())
    fast = ["--epochs", 1, "--temperatures", "0.2", "--samples", 2]
    run("fit", trained[0], "-o", tmp_path / "f", "--val-data", tmp_path / "val.npz", *fast)
    assert "STF-BNN" in run_json("evaluate", tmp_path / "f", "--samples", 2)["methods"]
    np.savez(tmp_path / "val.npz", x=values[:-1], y=held.targets.numpy()[:-1])
    assert "no longer those that T was chosen on" in run("evaluate", tmp_path / "f", code=1).stderr
    np.savez(tmp_path / "val.npz", x=rest.stored[:99].numpy(), y=rest.targets[:99].numpy())
    said = run("fit", trained[0], "-o", tmp_path / "g", "--val-data", tmp_path / "val.npz", *fast, code=1).stderr
    assert "val_loader is not held out" in said


def test_the_librarys_own_refusals_come_through(trained, tmp_path):
    said = run("train", "--data", "digits", "-o", tmp_path / "x", "--optimizer", "magic", code=1).stderr
    assert 'error: optimizer must be "sgd", "adam", "adamw"' in said
    assert "engine='magic' is not known" in run("fit", trained[0], "-o", tmp_path, "--engine", "magic", code=1).stderr
    assert "early_stop must be" in run("fit", trained[0], "-o", tmp_path, "--early-stop", "x", code=1).stderr


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in run("--debug", "fit", tmp_path, code=1).stderr


def test_a_wrong_command_line_ends_in_2():
    assert run("train", code=2).exit_code == 2
    run("fit", "--no-such-option", code=2)
    run("no-such-command", code=2)


def test_a_damaged_record_is_refused(fitted, tmp_path):
    text = (fitted[0] / "fit.json").read_text()
    for broken in (text[:-30], "[]", "{}", text.replace('"input_shape"', '"shape"'), text.replace("stfbnn-run", "x")):
        (tmp_path / "fit.json").write_text(broken)
        assert run("evaluate", tmp_path, code=1).stderr.startswith(f"error: {tmp_path / 'fit.json'}")
