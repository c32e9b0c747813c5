"""``stfbnn abstain`` and ``predict --rule``: what the files say is what the library says."""

import csv
import json

import numpy as np
import pytest
import torch

import stfbnn
from commands import run
from stfbnn.cli import fitted, sources
from stfbnn.data import hold_out
from stfbnn.decision import AbstentionRule, abstention_rule, evaluate_abstention

RISK = 0.07


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("abstain") / "run"
    small = ["--model-args", '{"hidden": 32}', "--device", "cpu"]
    run("train", "--data", "digits", "-o", path, "--epochs", 8, "--lr", 0.01, "--hold-out", 0.2, *small)
    run("fit", path, "--epochs", 1, "--temperature", 0.1, "--samples", 4)
    return path


@pytest.fixture(scope="module")
def rule(folder):
    path = folder.parent / "rule.json"
    said = run("abstain", folder, "--max-risk", RISK, "--samples", 4, "--seed", 3, "-o", path, "--json").stdout
    return path, json.loads(said)


def test_the_rule_is_the_library_s_on_one_half_and_the_figures_of_the_other(folder, rule):
    path, said = rule
    found = fitted.load_run(folder, None, "{}", None, "cpu")
    look, choose = hold_out(sources.test_part(found.record), 0.5, seed=3)
    preds = [
        stfbnn.predict(found.bnn, sources.batches(part, found.record, 256), samples=4, seed=3, progress=False)
        for part in (choose, look)
    ]
    expected = abstention_rule(preds[0], choose.targets, max_risk=RISK)
    assert AbstentionRule.from_dict(json.loads(path.read_text())["rule"]) == expected
    assert said["rule"] == expected.as_dict()
    assert said["figures"]["STF-BNN"] == json.loads(
        json.dumps(evaluate_abstention(preds[1], look.targets, expected).as_dict())
    )
    assert set(said["figures"]) == {"trained network", "STF-BNN"}


def test_the_table_is_for_a_person(folder, tmp_path):
    shown = run("abstain", folder, "--max-risk", 0.2, "--samples", 2, "-o", tmp_path / "r.json").stdout
    for text in ("answered", "wrong of them", "Promises errors of at most 0.2", "--rule"):
        assert text in shown


def test_predictions_say_where_to_abstain(folder, rule, tmp_path):
    path, _ = rule
    said = json.loads(run("predict", folder, "--rule", path, "-o", tmp_path / "p.csv", "--json").stdout)
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = json.loads(path.read_text())["rule"]["threshold"]
    scores = np.array([float(row["entropy"]) for row in rows])
    silent = np.array([int(row["abstain"]) for row in rows])
    assert np.array_equal(silent, (scores > chosen).astype(int))
    assert said["abstained"] == silent.sum()
    assert 0 < silent.sum() < len(rows)


def test_a_rule_of_another_posterior_is_refused(folder, rule, tmp_path):
    content = json.loads(rule[0].read_text())
    content["posterior"] = "0" * 16
    other = tmp_path / "rule.json"
    other.write_text(json.dumps(content))
    failed = run("predict", folder, "--rule", other, "-o", tmp_path / "p.csv", code=1)
    assert "another posterior" in failed.stderr
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"format": "stfbnn-abstention-rule-1"}', '{"format": "other", "seed": 1}']
)
def test_a_damaged_rule_is_refused(folder, damage, tmp_path):
    path = tmp_path / "rule.json"
    path.write_text(damage)
    assert "rule" in run("predict", folder, "--rule", path, "-o", tmp_path / "p.csv", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-risk", 0], "max_risk"),
        (["--max-risk", 0.1, "--confidence", 2], "confidence"),
        (["--max-risk", 0.1, "--score", "mood"], "mood"),
        (["--max-risk", 0.1, "--limit", 5], "--limit"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, arguments, message, tmp_path):
    failed = run("abstain", folder, *arguments, "-o", tmp_path / "rule.json", code=1)
    assert message in failed.stderr
    assert not (tmp_path / "rule.json").exists()


def test_a_rule_is_not_for_the_posterior_mean(folder, rule, tmp_path):
    failed = run("predict", folder, "--rule", rule[0], "--at-mean", "-o", tmp_path / "p.csv", code=1)
    assert "exclude" in failed.stderr


def test_a_network_has_no_epistemic_part(folder, tmp_path):
    options = ["--max-risk", 0.3, "--score", "epistemic", "--samples", 4, "-o", tmp_path / "rule.json", "--json"]
    assert set(json.loads(run("abstain", folder, *options).stdout)["figures"]) == {"STF-BNN"}


def test_the_digest_changes_with_the_posterior_and_with_the_temperature(folder):
    from stfbnn.cli.rule_files import posterior_digest

    bnn = fitted.load_run(folder, None, "{}", None, "cpu").bnn
    before = posterior_digest(bnn)
    assert posterior_digest(fitted.load_run(folder, None, "{}", None, "cpu").bnn) == before
    bnn.predictive_temperature = 2.0
    assert posterior_digest(bnn) != before
    bnn.predictive_temperature = 1.0
    with torch.no_grad():
        next(bnn.posterior.parameters())[0] += 1e-6
    assert posterior_digest(bnn) != before
