"""The commands, run in this process."""

import json

from typer.testing import CliRunner

from stfbnn.cli import app


def run(*arguments, code=0):
    """Run a command; ``code`` is what its exit code must be."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def run_json(*arguments):
    """Run with ``--json``; everything on standard output must be one JSON object."""
    return json.loads(run(*arguments, "--json").stdout)
