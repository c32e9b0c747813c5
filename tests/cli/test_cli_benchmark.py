"""``stfbnn benchmark``: it runs, writes a page, goes on where it was, and refuses what makes no sense."""

import json

import pytest
from typer.testing import CliRunner

from stfbnn.cli import app

FEW = ["--method", "network", "--method", "stf-bnn", "--seed", "0"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["benchmark", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    return folder, run("smoke", "-o", folder, *FEW)


def test_it_prints_tables_and_writes_a_page(smoke):
    folder, result = smoke
    for text in ("digits-mlp", "diabetes", "stf-bnn + τ", "not measured", str(folder / "report.html")):
        assert text in result.stdout
    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "stfbnn benchmark smoke" in page
    assert "digits-mlp" in (folder / "report.md").read_text()


def test_the_report_alone_runs_nothing(smoke):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").rglob("*.json")}
    (folder / "report.html").unlink()
    said = json.loads(run("smoke", "-o", folder, "--report", "--json").stdout)
    assert said["records"] == 4
    assert {claim["verdict"] for claim in said["claims"]} >= {"not measured"}
    assert (folder / "report.html").exists()
    assert {path: path.stat().st_mtime_ns for path in (folder / "records").rglob("*.json")} == before


def test_a_run_goes_on(smoke):
    folder, _ = smoke
    result = run("smoke", "-o", folder, *FEW, "--task", "digits-mlp")
    assert "2 results to come, 2 of them are there" in result.stderr


def test_the_user_s_own_data_and_network(tmp_path):
    table = tmp_path / "mine.csv"
    rows = [f"{i % 7},{i / 5},{'yes' if (i % 7) > 3 else 'no'}" for i in range(200)]
    table.write_text("\n".join(["a,b,target", *rows]) + "\n")
    options = ["--data", table, "--model", "stfbnn.models:mlp", "--model-args", '{"hidden": 8}', "--epochs", 2]
    said = json.loads(run("own", *options, "--fit-epochs", 1, "-o", tmp_path / "out", *FEW, "--json").stdout)
    assert (said["suite"], said["records"], said["failures"]) == ("own", 2, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["enormous"], "no suite"),
        (["own"], "--data and --model"),
        (["quick", "--data", "x.csv"], "for the suite 'own'"),
        (["smoke", "--method", "magic"], "no method"),
        (["smoke", "--task", "magic"], "no task"),
        (["smoke", "--report"], "no records"),
        (["smoke", "--jobs", "0", *FEW], "jobs"),
        (["smoke", "--jobs", "2", "--retries", "-1", *FEW], "retries"),
        (["smoke", "--jobs", "2", "--scheduler", "tcp://127.0.0.1:9", *FEW], "leave them at 1"),
    ],
)
def test_what_makes_no_sense_is_refused_before_work(tmp_path, arguments, message):
    result = run(*arguments, "-o", tmp_path / "none", code=1)
    assert message in result.stderr
    assert not (tmp_path / "none" / "networks").exists()


def test_what_failed_is_told_where_nothing_else_came_of_it(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("a,b,target\n")
    result = run("own", "--data", table, "--model", "stfbnn.models:mlp", "-o", tmp_path / "out", *FEW, code=1)
    assert "failed: own 0: DataError" in result.stderr


def test_data_that_are_missing_are_told(tmp_path, monkeypatch):
    monkeypatch.delenv("STFBNN_DATA", raising=False)
    result = run("quick", "-o", tmp_path, "--task", "uci-yacht", code=1)
    assert "skipped uci-yacht: STFBNN_DATA is not set" in result.stderr
