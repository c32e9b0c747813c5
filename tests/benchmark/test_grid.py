"""The benchmark on a Dask cluster of this machine: two workers that do not know the client's folder, and what kills them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from made_units import made, marked, ran, trained

from stfbnn.benchmark import grid
from stfbnn.benchmark.records import load_records
from stfbnn.benchmark.runner import run_units, units_of
from stfbnn.benchmark.suites import SUITES, Suite
from stfbnn.errors import InputError, StfbnnError

psutil = pytest.importorskip("psutil")
pytest.importorskip("distributed")

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
CLIENT = """
import sys
from pathlib import Path
from made_units import made
from stfbnn.benchmark.grid import Grid
with Grid(sys.argv[1]) as engine:
    engine.start(0, made(Path(sys.argv[2]), "some", network="fine", swag="sleeps once", stf_bnn="fine"))
    while True:
        engine.next()
"""
DIED = "its process was ended by SIGKILL, as the system does where memory runs out"


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass(frozen=True)
class Cluster:
    address: str
    folder: Path


@contextmanager
def dask(folder: Path, *arguments: str) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        finally:
            process.kill()


@contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    note = folder / "scheduler.json"
    with dask(folder, "scheduler", "--port", "0", "--scheduler-file", str(note)):
        until(note.exists)
        yield json.loads(note.read_text())["address"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with scheduler(folder) as address, dask(folder, "worker", address, "--nworkers", "2", "--nthreads", "1"):
        yield Cluster(address, folder)


def test_what_dies_or_fails_on_workers_is_tried_again_then_told_and_the_others_are_done(
    cluster: Cluster, tmp_path: Path
) -> None:
    units = [
        made(tmp_path, "sound", network="fine", swag="fine"),
        made(tmp_path, "once", network="fine", swag="dies once", laplace_last="fails once", stf_bnn="fine"),
        made(tmp_path, "dies", network="fine", swag="dies", stf_bnn="fine"),
        made(tmp_path, "no-data", network="fine", swag="gives up", stf_bnn="fine"),
    ]
    failures = run_units(units, progress=False, scheduler=cluster.address, retries=1)  # type: ignore[arg-type]
    assert sorted(failures) == [
        f"dies 0 swag: {DIED} (2 times)",
        "no-data 0: RuntimeError: no data (2 times)",
    ]
    there = {unit.task.name: [unit.done(method) for method in unit.methods] for unit in units}
    assert there == {
        "sound": [True, True],
        "once": [True] * 4,
        "dies": [True, False, True],
        "no-data": [True, False, False],
    }
    # A network goes to the next attempt with its unit, wherever that is, and so does what is done.
    assert [trained(unit) for unit in units] == [1, 1, 1, 1]
    assert [ran(unit, "network") for unit in units] == [1, 1, 1, 1]
    assert not list(cluster.folder.rglob("records"))


def test_a_worker_that_is_killed_costs_its_unit_an_attempt_and_leaves_no_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    once = made(tmp_path, "once", network="fine", swag="kills its worker once")
    always = made(tmp_path, "always", network="fine", swag="kills its worker", stf_bnn="fine")
    failures = run_units([once, always], progress=False, scheduler=cluster.address, retries=1)  # type: ignore[list-item]
    assert [once.done(method) for method in once.methods] == [True, True]
    assert [always.done(method) for method in always.methods] == [True, False, True]
    assert len(failures) == 1
    assert re.fullmatch(r"always 0 swag: its worker tcp://\S+ was lost \(2 times\)", failures[0])
    assert [ran(unit, "network") for unit in (once, always)] == [1, 1]
    # They would have slept for minutes.
    until(lambda: not any(psutil.pid_exists(marked(unit, "sleeping")) for unit in (once, always)))


def test_a_client_that_is_killed_leaves_no_work_behind_and_what_came_back_is_not_run_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    unit = made(tmp_path, "some", network="fine", swag="sleeps once", stf_bnn="fine")
    with subprocess.Popen([sys.executable, "-c", CLIENT, cluster.address, str(tmp_path)], env=ENVIRONMENT) as client:
        until(lambda: unit.done("network") and (unit.markers / "sleeping").exists())
        client.send_signal(signal.SIGKILL)
    until(lambda: not psutil.pid_exists(marked(unit, "sleeping")))
    assert run_units([unit], progress=False, scheduler=cluster.address) == []  # type: ignore[list-item]
    assert all(unit.done(method) for method in unit.methods)
    assert [ran(unit, method) for method in unit.methods] == [1, 1, 1]
    # The network was on its way with the unit that was killed.
    assert trained(unit) == 2


def test_records_and_networks_are_those_of_one_process(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A relative folder: the workers, which work elsewhere, cannot write into the client's by its path.
    monkeypatch.chdir(tmp_path)
    sizes = {"train": 150, "test": 60, "choose": 60, "shifted": 10, "samples": 2, "epochs": 2, "courses": False}
    suite = Suite("tiny", "", 1, (replace(SUITES["smoke"].tasks[0], **sizes),))
    for folder, options in (("here", {}), ("there", {"scheduler": cluster.address})):
        units, _ = units_of(suite, Path(folder), methods=("network", "stf-bnn"))
        assert run_units(units, progress=False, **options) == []  # type: ignore[arg-type]
    pairs = list(zip(load_records(Path("here")), load_records(Path("there")), strict=True))
    assert {one.method for one, _ in pairs} == {"network", "stf-bnn"}
    for one, other in pairs:
        assert one.raw is not None
        assert (one.raw, one.scaled, one.settings, one.environment) == (
            other.raw,
            other.scaled,
            other.settings,
            other.environment,
        )
    network = Path("networks/digits-mlp/0/network.safetensors")
    assert (Path("here") / network).read_bytes() == (Path("there") / network).read_bytes()
    assert not list(cluster.folder.rglob("records"))


def test_other_versions_are_refused_before_anything_is_sent(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"Python": "3.11", "stfbnn": "0.0.1", "torch": "2.0.0"}
    monkeypatch.setattr(grid, "_own_versions", lambda: own)
    with pytest.raises(InputError, match=r"the worker tcp://\S+ has .*torch \S+ \(here 2\.0\.0\)"):
        run_units([made(tmp_path, "sound", network="fine")], scheduler=cluster.address)  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


def test_workers_that_come_later_with_other_versions_get_no_units(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if this process had had these when it looked at the workers that were there.
    monkeypatch.setattr(grid, "_checked_versions", lambda *_: {"Python": "3.11", "stfbnn": "0.0.1", "torch": "2.0.0"})
    with pytest.raises(StfbnnError, match=r"no worker is left .* stfbnn \S+ \(here 0.0.1\)"):
        run_units([made(tmp_path, "sound", network="fine")], progress=False, scheduler=cluster.address)  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


def test_without_dask_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"stfbnn\[grid\]"):
        run_units([], scheduler="tcp://127.0.0.1:9")


def test_a_scheduler_that_does_not_answer_or_has_no_workers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_CONNECT", 0.3)
    monkeypatch.setattr(grid, "_FIRST_WORKER", 0.3)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(InputError, match="no scheduler answers"):
            run_units([], scheduler=address)
    monkeypatch.setattr(grid, "_CONNECT", 60)
    with scheduler(tmp_path) as address, pytest.raises(InputError, match="has no workers"):
        run_units([], scheduler=address)
