"""What only a process of its own shows: exit codes, signals, kills and what an import costs."""

import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from stfbnn.cli import app

COMMAND = [sys.executable, "-c", "from stfbnn.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def fit_arguments(run, output):
    options = ["--epochs", "60", "--temperature", "0.1", "--samples", "4", "--device", "cpu"]
    return ["fit", str(run), "-o", str(output), *options]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process") / "run"
    arguments = ["train", "--data", "digits", "-o", str(folder), "--epochs", "3", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--model-args", '{"hidden": 32}'])
    assert result.exit_code == 0, result.output
    return folder


def start_and_wait_for(checkpoint, arguments):
    process = subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert checkpoint.exists(), process.communicate()
    return process


def test_killed_and_interrupted_fits_resume_to_the_identical_posterior(trained, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = CliRunner().invoke(app, fit_arguments(trained, whole))
    assert result.exit_code == 0, result.output

    killed = start_and_wait_for(broken / "fit.checkpoint", fit_arguments(trained, broken))
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (broken / "posterior").exists()

    # The checkpoint is there from the start now, so wait for the next one to be written.
    before = (broken / "fit.checkpoint").stat().st_mtime_ns
    process = subprocess.Popen(
        [*COMMAND, *fit_arguments(trained, broken)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while (broken / "fit.checkpoint").stat().st_mtime_ns == before and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert f"interrupted; the run resumes from {broken / 'fit.checkpoint'}" in said
    assert "Traceback" not in said
    assert not (broken / "posterior").exists()

    result = CliRunner().invoke(app, fit_arguments(trained, broken))
    assert result.exit_code == 0, result.output
    posterior = "posterior/posterior.safetensors"
    assert (broken / posterior).read_bytes() == (whole / posterior).read_bytes()


def test_help_and_version_do_not_wait_for_torch():
    # The package's own __init__ is left out: the claim is about the command line.
    script = (
        "import sys, types, importlib.util as u\n"
        "package = types.ModuleType('stfbnn')\n"
        "package.__path__ = u.find_spec('stfbnn').submodule_search_locations\n"
        "sys.modules['stfbnn'] = package\n"
        "import stfbnn.cli\n"
        "for word in (['--help'], ['--version'], ['fit', '--help']):\n"
        "    try:\n        stfbnn.cli.app(word)\n    except SystemExit as done:\n        assert not done.code\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'lightning_fabric'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stfbnn 0." in done.stdout
    for text in ("Exit codes", "130", "demo", "stfbnn fit run --tau held-out"):
        assert text in done.stdout


def test_the_entry_point_reports_errors_and_exit_codes(tmp_path):
    done = subprocess.run(
        [*COMMAND, "fit", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no run.json in")
    assert len(done.stderr.splitlines()) == 1
