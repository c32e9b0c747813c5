"""``stfbnn certify`` on a run: the bound on the held-out part, a fit with the bound, far away, and what is refused."""

import json

import numpy as np
import pytest

from commands import run
from stfbnn.data import load

SMALL = ["--model-args", '{"hidden": 16}', "--device", "cpu"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certify")
    run("train", "--data", "digits", "-o", folder / "run", "--epochs", 12, "--lr", 0.01, "--hold-out", 0.4, *SMALL)
    run("fit", folder / "run", "-o", folder / "fit", "--epochs", 1, "--samples", 4)
    return folder / "fit"


def test_a_posterior_fitted_with_the_bound_certifies_more_than_one_inferred_for_prediction(fitted, tmp_path):
    plain = json.loads(run("certify", fitted, "-o", tmp_path / "plain", "--json").stdout)["certificate"]
    arguments = ["certify", fitted, "-o", tmp_path / "fit", "--fit", "--prior-std", 0.01, "--prior-std", 0.3]
    printed = run(*arguments, "--epochs", 2).stdout
    assert "trained network" in printed
    content = json.loads((tmp_path / "fit" / "certificate.json").read_text())
    best = content["certificate"]
    assert best["reasons"] == plain["reasons"] == []
    assert best["examples"] == plain["examples"] > 400
    assert best["priors_considered"] == 2
    assert best["bounds"][0]["value"] < 0.3 < plain["bounds"][0]["value"]
    assert best["bounds"][0]["value"] == min(one["certificate"]["bounds"][0]["value"] for one in content["fits"])
    assert (tmp_path / "fit" / "posterior" / "config.json").exists()


def test_the_far_field_of_the_same_run(fitted, tmp_path):
    content = json.loads(run("certify", fitted, "-o", tmp_path, "--far-field", 3, "--draws", 50, "--json").stdout)
    assert content["far_field"]["limits"]
    assert (tmp_path / "far_field.png").stat().st_size > 1000


def test_what_is_no_certificate_is_refused_or_labelled(fitted, tmp_path):
    # The training part, most of which trained the network.
    part = load("digits").train
    np.savez(tmp_path / "seen.npz", x=part.inputs.numpy(), y=part.targets.numpy())
    said = run("certify", fitted, "-o", tmp_path, "--data", tmp_path / "seen.npz", code=1).stderr
    assert "stage one" in said
    allowed = run("certify", fitted, "-o", tmp_path, "--data", tmp_path / "seen.npz", "--allow-invalid").stdout
    assert "NOT A CERTIFICATE" in allowed
    assert "--prior-std belongs to --fit" in run("certify", fitted, "--prior-std", 0.1, code=1).stderr
    assert "delta" in run("certify", fitted, "-o", tmp_path, "--delta", 2, code=1).stderr
