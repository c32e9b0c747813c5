"""Units side by side in processes of this machine: what dies or fails is tried again so often, told, and costs nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_units import made, marked, ran, trained

from stfbnn.benchmark.runner import run_units
from stfbnn.errors import InputError

HERE = Path(__file__).parent
DIED = "its process was ended by SIGKILL, as the system does where memory runs out"
CLIENT = """
import sys
from pathlib import Path
from made_units import made
from stfbnn.benchmark.engines import LocalProcesses
with LocalProcesses(1) as engine:
    for name in ("first", "second"):
        engine.start(0, made(Path(sys.argv[1]), name, network="sleeps"))
    while True:
        engine.next()
"""


def test_what_dies_or_fails_is_tried_again_then_told_and_the_others_are_done(tmp_path: Path) -> None:
    units = [
        made(tmp_path, "sound", network="fine", swag="fine"),
        made(tmp_path, "once", network="fine", swag="dies once", laplace_last="fails once", stf_bnn="fine"),
        made(tmp_path, "dies", network="fine", swag="dies", stf_bnn="fine"),
        made(tmp_path, "fails", network="fine", swag="fails", stf_bnn="fine"),
        made(tmp_path, "hopeless", network="dies", stf_bnn="fine"),
        made(tmp_path, "no-data", network="fine", swag="gives up", stf_bnn="fine"),
    ]
    failures = run_units(units, jobs=2, progress=False, retries=1)  # type: ignore[arg-type]
    assert sorted(failures) == [
        f"dies 0 swag: {DIED} (2 times)",
        "fails 0 swag: ValueError: no (2 times)",
        f"hopeless 0 network: {DIED} (2 times)",
        "no-data 0: RuntimeError: no data (2 times)",
    ]
    there = {(unit.task.name, method) for unit in units for method in unit.methods if unit.done(method)}
    assert there == {
        *(("sound", method) for method in ("network", "swag")),
        *(("once", method) for method in ("network", "swag", "laplace-last", "stf-bnn")),
        *((name, method) for name in ("dies", "fails") for method in ("network", "stf-bnn")),
        ("no-data", "network"),
    }
    # What is done is not done again for what fails beside it.
    assert {ran(unit, "network") for unit in units if unit.done("network")} == {1}
    assert (ran(units[3], "swag"), ran(units[3], "stf-bnn"), trained(units[3])) == (2, 1, 1)


def test_what_is_done_is_not_run_again_and_without_retries_nothing_is_tried_twice(tmp_path: Path) -> None:
    unit = made(tmp_path, "some", network="fine", swag="dies once", stf_bnn="fine")
    assert run_units([unit], jobs=2, progress=False, retries=0) == [f"some 0 swag: {DIED}"]  # type: ignore[list-item]
    assert run_units([unit], jobs=2, progress=False, retries=0) == []  # type: ignore[list-item]
    assert run_units([unit], jobs=2, progress=False, retries=0) == []  # type: ignore[list-item]
    assert [ran(unit, method) for method in unit.methods] == [1, 1, 1]
    assert trained(unit) == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_client_that_is_interrupted_or_killed_leaves_no_process(tmp_path: Path, sent: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    first, second = (made(tmp_path, name, network="sleeps") for name in ("first", "second"))
    deadline = time.monotonic() + 120
    start = [sys.executable, "-c", CLIENT, str(tmp_path)]
    with subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True) as client:
        while not (first.markers / "sleeping").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        client.send_signal(sent)
        said = client.communicate()[1]
    assert ("KeyboardInterrupt" in said) == (sent == signal.SIGINT)
    while _lives(marked(first, "sleeping")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(marked(first, "sleeping"))
    # The second waited for the first; it is not begun.
    assert not second.markers.exists()


def _lives(process: int) -> bool:
    """Whether it runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_numbers_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="retries must be"):
        run_units([], jobs=2, retries=-1)
    with pytest.raises(InputError, match="leave them at 1"):
        run_units([], jobs=2, scheduler="tcp://127.0.0.1:9")
