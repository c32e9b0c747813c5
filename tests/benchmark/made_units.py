"""Units that need no torch, and do to their processes what a test asks for."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from stfbnn.files import write_json


@dataclass(frozen=True)
class MadeTask:
    name: str


@dataclass(frozen=True)
class MadeUnit:
    """What the engines need of a unit; ``acts`` says what its methods do, and ``markers`` what was done once already."""

    task: MadeTask
    acts: dict[str, str]
    folder: Path
    markers: Path
    methods: tuple[str, ...] = ()
    seed: int = 0

    def record_path(self, method):
        return self.folder / "records" / self.task.name / "0" / f"{method}.json"

    def network_files(self):
        folder = self.folder / "networks" / self.task.name / "0"
        return folder / "network.safetensors", folder / "network.json"

    def done(self, method):
        path = self.record_path(method)
        return path.exists() and json.loads(path.read_text())["failed"] is None

    def run(self, watch):
        os.write(1, b"what a method prints is no message\n")
        for method in self.methods:
            watch.begun(method)
            weights, note = self.network_files()
            if not note.exists():
                self._mark(f"trained in {os.getpid()}")
                weights.parent.mkdir(parents=True)
                weights.write_bytes(bytes(1_000))
                note.write_text("{}")
            failure = self._act(method, self.acts[method])
            self._mark(f"{method} ran in {os.getpid()}")
            write_json(self.record_path(method), {"failed": failure, "marker": "x" * 100_000})
            watch.done(method, failure)

    def _act(self, method, act):
        if act.endswith("once"):
            if (self.markers / f"{method} {act}").exists():
                return None
            self._mark(f"{method} {act}", str(os.getpid()))
        if act.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if act.startswith(("sleeps", "kills its worker")):
            self._mark("sleeping", str(os.getpid()))
        if act.startswith("kills its worker"):
            # What the unit said so far has left the worker by then: records are where the client keeps them.
            first = self.markers.parents[1] / "out" / "records" / self.task.name / "0" / f"{next(iter(self.acts))}.json"
            while not first.exists():
                time.sleep(0.05)
            time.sleep(1)
            os.kill(os.getppid(), signal.SIGKILL)
        if act.startswith(("sleeps", "kills its worker")):
            time.sleep(600)
        if act.startswith("gives up"):
            raise RuntimeError("no data")
        return "ValueError: no" if act.startswith("fails") else None

    def _mark(self, name, text=""):
        self.markers.mkdir(parents=True, exist_ok=True)
        write_json(self.markers / name, {"text": text})


def made(folder, name, **acts):
    """A unit called ``name`` whose methods (underscores for hyphens) act so."""
    named = {method.replace("_", "-"): act for method, act in acts.items()}
    return MadeUnit(MadeTask(name), named, folder / "out", folder / "markers" / name, tuple(named))


def ran(unit, method):
    """How often a method of a unit ran to its end."""
    return sum(path.name.startswith(f"{method} ran in") for path in unit.markers.iterdir())


def trained(unit):
    """How often the network of a unit was trained."""
    return sum(path.name.startswith("trained in") for path in unit.markers.iterdir())


def marked(unit, name):
    """The process that left a mark."""
    return int(json.loads((unit.markers / name).read_text())["text"])
