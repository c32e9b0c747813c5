"""``stfbnn attack`` on a run: what it prints and writes, that it goes on, and what it refuses."""

import json

import pytest

from commands import run

SMALL = ["--model-args", '{"hidden": 16}', "--device", "cpu"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    run("train", "--data", "digits", "-o", folder / "run", "--epochs", 12, "--lr", 0.01, "--hold-out", 0.2, *SMALL)
    run("fit", folder / "run", "-o", folder / "fit", "--epochs", 1, "--samples", 4)
    return folder / "fit"


@pytest.fixture(scope="module")
def attacked(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    options = ["--examples", 15, "--samples", 4, "--epsilon", 0.05, "--epsilon", 0.3, "--detect", "--certify"]
    arguments = ["attack", fitted, "-o", folder, *options]
    return arguments, folder, run(*arguments).stdout


def test_both_networks_are_attacked_and_the_tables_say_how(attacked):
    _, folder, printed = attacked
    for text in ("trained network", "STF-BNN", "FGSM", "PGD-20", "worst case", "Checks of the attacks", "l2 radius"):
        assert text in printed, text
    methods = json.loads((folder / "attack.json").read_text())["methods"]
    for method in methods.values():
        worst = [entry["value"] for entry in method["summary"]["worst"]]
        # A small network on digits: an l∞ change of .3 undoes nearly all of it.
        assert method["summary"]["clean"]["value"] >= worst[0] >= worst[1]
        assert worst[1] < 0.3
        assert method["detection"]["examples"] > 0

    assert methods["STF-BNN"]["smoothing"]
    assert methods["trained network"]["smoothing"] is None
    assert (folder / "attack.png").stat().st_size > 1000


def test_the_same_command_goes_on_from_what_is_kept(attacked):
    arguments, folder, _ = attacked
    before = json.loads((folder / "attack.json").read_text())
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert kept
    run(*arguments)
    assert kept == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    after = json.loads((folder / "attack.json").read_text())
    for name, method in before["methods"].items():
        assert after["methods"][name]["outcomes"] == method["outcomes"]


def test_what_cannot_be_attacked_is_refused(fitted, tmp_path):
    assert "linf or l2" in run("attack", fitted, "--norm", "l1", code=1).stderr
    assert "--examples" in run("attack", fitted, "--examples", 0, code=1).stderr
    assert "before normalisation" in run("attack", fitted, "-o", tmp_path, "--upper", 0.5, code=1).stderr
    assert "run it first" in run("attack", tmp_path, code=1).stderr
