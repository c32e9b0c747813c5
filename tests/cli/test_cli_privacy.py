"""``stfbnn privacy`` on a run: thresholds, shadow models that go on after a stop, and what is refused."""

import json

import pytest

from commands import run

SMALL = ["--model-args", '{"hidden": 16}', "--device", "cpu"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("privacy")
    trained = ["--epochs", 4, "--lr", 0.01, "--hold-out", 0.2, "--limit", 700, "--adversarial", 0.05]
    run("train", "--data", "digits", "-o", folder / "run", *trained, "--adversarial-steps", 1, *SMALL)
    run("fit", folder / "run", "-o", folder / "fit", "--epochs", 1, "--samples", 4)
    return folder / "fit"


def test_thresholds_attack_both_networks(fitted, tmp_path):
    printed = run("privacy", fitted, "-o", tmp_path).stdout
    assert "trained network" in printed
    assert "STF-BNN" in printed
    content = json.loads((tmp_path / "privacy.json").read_text())["thresholds"]
    for outcome in content.values():
        # Four epochs memorise nothing: members are hardly told.
        assert 0.4 < outcome["attacks"]["loss"]["auc"]["mean"] < 0.65
    assert (tmp_path / "privacy.png").stat().st_size > 1000


def test_shadow_models_are_trained_as_the_run_was_and_kept(fitted, tmp_path):
    arguments = ["privacy", fitted, "-o", tmp_path, "--shadows", 6, "--pool", 60, "--release", "network"]
    first = json.loads(run(*arguments, "--json").stdout)["study"]
    training = first["settings"]["training"]["training"]
    assert training["epochs"] == 4
    assert training["adversarial"] == 0.05
    assert first["settings"]["models"] == 6
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shadows").rglob("*") if path.is_file()}
    again = json.loads(run(*arguments, "--json").stdout)["study"]
    assert again == first
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "shadows").rglob("*") if path.is_file()}


def test_what_cannot_be_attacked_is_refused(fitted, tmp_path):
    assert "--shadows asks for" in run("privacy", fitted, "--release", "network", code=1).stderr
    assert "models" in run("privacy", fitted, "-o", tmp_path, "--shadows", 2, code=1).stderr
    assert "not known" in run("privacy", fitted, "-o", tmp_path, "--shadows", 6, "--release", "x", code=1).stderr
    assert "run it first" in run("privacy", tmp_path, code=1).stderr


def test_a_network_from_elsewhere_cannot_be_trained_again(fitted, tmp_path):
    record = json.loads((fitted / "fit.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    weights = (fitted / record["model"]["weights"]).resolve()
    record["training"], record["model"]["weights"] = None, str(weights)
    (other / "fit.json").write_text(json.dumps(record))
    (other / "posterior").symlink_to(fitted / "posterior")
    assert "nothing says how" in run("privacy", other, "--shadows", 6, code=1).stderr
