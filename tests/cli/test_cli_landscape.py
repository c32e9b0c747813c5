"""``stfbnn landscape``: what the files say is what the library says, for a run and for a built-in task."""

import json

import pytest

import stfbnn
from commands import run
from stfbnn.cli import sources, stage_two

QUICK = ["--runs", 2, "--epochs", 2, "--examples", 60, "--threads", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("landscape") / "run"
    small = ["--model-args", '{"hidden": 16}', "--device", "cpu", "--limit", 300]
    run("train", "--data", "digits", "-o", path, "--epochs", 2, "--hold-out", 0.2, *small)
    return path


def test_the_files_hold_what_the_library_finds(folder):
    shown = run("landscape", folder, *QUICK, "--no-curves").stdout
    content = json.loads((folder / "landscape" / "landscape.json").read_text())
    assert (folder / "landscape" / "landscape.png").stat().st_size > 10_000
    assert "first layer" in shown
    assert "Wrote" in shown
    request = stage_two.Request(folder, None, None, {}, None, None, None, "train", None, None, 0)
    ready = stage_two.prepare(request, lambda _: None)
    found = stfbnn.landscape(
        ready.network,
        sources.batches(ready.train, ready.record, 128, shuffle=True),
        sources.batches(ready.held_out, ready.record, 128),
        options=stfbnn.RetrainingOptions(runs=2, epochs=2, execution="loop"),
        examples=60,
        curves=False,
        progress=False,
    )
    losses = [[one["held_out_loss"] for one in layer["optima"]] for layer in content["layers"]]
    for layer, own in zip(found.layers, losses, strict=True):
        assert [one.held_out_loss for one in layer.optima] == pytest.approx(own, rel=1e-3)


def test_layers_that_are_named_are_studied_and_ranked(folder, tmp_path):
    said = run(
        "landscape",
        folder,
        *QUICK,
        "--layer",
        "1",
        "--widths",
        "--width-epochs",
        1,
        "--no-curves",
        "-o",
        tmp_path / "out",
        "--json",
    ).stdout
    content = json.loads(said)
    assert [layer["layer"] for layer in content["layers"]] == ["1"]
    assert content["widths"]["recommended"] in ("1", "3", "5")
    assert content["widths"] == json.loads((tmp_path / "out" / "widths.json").read_text())


def test_a_built_in_task_needs_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("landscape", "digits-mlp", *QUICK, "--layer", "5", "--no-curves", "-o", tmp_path / "out")
    assert "digits-mlp" in shown.stderr
    assert (tmp_path / "out" / "landscape.json").exists()


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("STFBNN_DATA", raising=False)
    assert "cannot be had: STFBNN_DATA is not set" in run("landscape", "fashion-mlp", code=1).stderr
    assert "there is no layer 'nothing'" in run("landscape", folder, "--layer", "nothing", code=1).stderr
    assert "start" in run("landscape", folder, "--start", "somewhere", code=1).stderr
    assert "--output" in run("landscape", code=1).stderr
    bare = tmp_path / "bare"
    small = ["--model-args", '{"hidden": 16}', "--device", "cpu", "--limit", 100]
    run("train", "--data", "digits", "-o", bare, "--epochs", 1, "--hold-out", 0, *small)
    assert "--hold-out" in run("landscape", bare, code=1).stderr
