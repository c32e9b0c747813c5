"""Units on the workers of a Dask scheduler; the records, and the networks, come back to the folder of the one who asked.

A worker is only where a unit's process is started, and what passes on what that says: each record as soon as it is there, as an
event, and once more all of them with the network as the result, for events may be lost with a worker and results may not. The
worker needs none of the folders that the client has; its unit works in a temporary one. Needs ``pip install "stfbnn[grid]"``.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stfbnn.benchmark.engines import Ended, Said
from stfbnn.benchmark.unit_process import Message, order_of, run_in_process
from stfbnn.errors import InputError, StfbnnError
from stfbnn.files import atomic_path, write_text

if TYPE_CHECKING:
    from distributed import Client, Future

    from stfbnn.benchmark.runner import Unit

_CONNECT, _FIRST_WORKER, _NO_WORKERS = 30.0, 30.0, 120.0
"""How long, in seconds, a connection, a first worker and a worker after all others were lost are waited for."""

_PACKAGES = ("stfbnn", "torch")


@dataclass
class _Run:
    """A run of a unit that is not over.

    Attributes:
        unit: The unit.
        future: Its task.
        heard: How many of its messages were passed on.
    """

    unit: Unit
    future: Future[Any]
    heard: int = 0


@dataclass(frozen=True)
class _Result:
    """What a task returns.

    Attributes:
        messages: All that the process said.
        died: What it died of, if it did.
        network: Files of a network that was trained, by their place under the unit's folder.
        refused: The worker that did not run the unit, and why; None where it did.
    """

    messages: list[Message] = field(default_factory=list)
    died: str | None = None
    network: Mapping[str, bytes] = field(default_factory=dict)
    refused: Mapping[str, str] | None = None


class Grid:
    """The workers of a scheduler as an engine; when the block ends, by an error too, nothing of it runs on any of them.

    Args:
        address: Of the scheduler, such as ``tcp://host:8786``.

    Raises:
        InputError: Dask is not installed; the scheduler cannot be reached; it has no workers; it, or a worker, has other
            versions than this process.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = _connected(address)
        try:
            self._versions = _checked_versions(self._client, address)
        except BaseException:
            self._client.close()
            raise
        self._topic = f"stfbnn-{uuid.uuid4().hex}"
        self._happened: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._client.subscribe_topic(self._topic, lambda event: self._happened.put(("said", event[1])))
        self._runs: dict[int, _Run] = {}
        self._refused: dict[str, str] = {}
        self._last_worker = time.monotonic()

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *_: object) -> None:
        # The scheduler drops the tasks of a client that leaves; the workers see it and end the processes.
        self._client.close()

    def start(self, run: int, unit: Unit) -> None:
        """Hand a unit to the scheduler, with the network if it was trained before."""
        import dask  # noqa: PLC0415 - an extra

        files = [path for path in unit.network_files() if path.exists()]
        network = {path.relative_to(unit.folder).as_posix(): path.read_bytes() for path in files}
        usable = [address for address in self._client.nthreads() if address not in self._refused]
        if self._refused and not usable:
            raise StfbnnError(f"no worker is left that can be used: {'; '.join(sorted(set(self._refused.values())))}")
        # Dask warns of large arguments; a network has to go there, whatever its size.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
            future = self._client.submit(
                _run_on_worker,
                order_of(unit),
                network,
                self._topic,
                run,
                self._versions,
                key=f"{unit.task.name}-{unit.seed}-{uuid.uuid4().hex}",
                pure=False,
                workers=usable if self._refused else None,
                allow_other_workers=bool(self._refused),
            )
        self._runs[run] = _Run(unit, future)
        future.add_done_callback(partial(self._ended, run))

    def next(self) -> Said | Ended | None:
        """What happened next; None where nothing did for a second.

        Raises:
            StfbnnError: The scheduler was lost, or all workers.
        """
        try:
            what, content = self._happened.get(timeout=1)
        except queue.Empty:
            self._look_for_workers()
            return None
        if what == "said":
            return self._hear(content["run"], content["number"], content["message"])
        run, future = content
        return self._end(run, future)

    def _ended(self, run: int, future: Future[Any]) -> None:
        self._happened.put(("ended", (run, future)))

    def _hear(self, run: int, number: int, message: Message) -> Said | None:
        known = self._runs.get(run)
        # One that is missing will be in the result; none is passed on before it, and none twice.
        return self._pass_on(run, known, message) if known is not None and number == known.heard + 1 else None

    def _pass_on(self, run: int, known: _Run, message: Message) -> Said:
        known.heard += 1
        if "done" in message:
            write_text(known.unit.record_path(message["done"]), message["record"])
        return Said(run, message)

    def _end(self, run: int, future: Future[Any]) -> Said | Ended | None:
        from distributed import KilledWorker  # noqa: PLC0415 - an extra, and slow to import

        known = self._runs.get(run)
        if known is None or known.future.key != future.key:
            return None
        if future.cancelled():
            raise StfbnnError(
                f"the scheduler {self._address} was lost; what is done is kept: run the same command again when it is there"
            )
        try:
            result: _Result = future.result()
        except KilledWorker:
            begun = self._client.get_events(_beginning(self._topic, run))
            if not begun:
                # It only waited where workers died.
                self.start(run, known.unit)
                return None
            result = _Result(died=_lost(begun))
        except Exception as error:  # Whatever a worker fails by, the other units are to be had.
            result = _Result(died=f"its worker failed with {type(error).__name__}: {error}")
        if result.refused is not None:
            self._refused.update(result.refused)
            self.start(run, known.unit)
            return None
        if known.heard < len(result.messages):
            # Some events were lost or are late: one of them now, and then this again.
            self._happened.put(("ended", (run, future)))
            return self._pass_on(run, known, result.messages[known.heard])
        for path in known.unit.network_files():
            content = result.network.get(path.relative_to(known.unit.folder).as_posix())
            if content is not None:
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
        del self._runs[run]
        return Ended(run, result.died)

    def _look_for_workers(self) -> None:
        if self._client.nthreads():
            self._last_worker = time.monotonic()
        elif time.monotonic() - self._last_worker > _NO_WORKERS:
            raise StfbnnError(
                f"the scheduler {self._address} has had no worker for {_NO_WORKERS:.0f} seconds; what is done is kept: "
                "run the same command again when there are workers"
            )


def _run_on_worker(
    order: bytes, network: Mapping[str, bytes], topic: str, run: int, versions: Mapping[str, str | None]
) -> _Result:
    """The task: run a unit in a process of its own and a temporary folder, and tell the client all about it.

    The scheduler gives a task whose worker was lost to another worker; that one only says so, for the client knows better than
    the task what is left to do.
    """
    from distributed import get_client, get_worker  # noqa: PLC0415 - an extra

    worker, client = get_worker(), get_client()
    wrong = _difference(f"the worker {worker.address}", _own_versions(), versions)
    if wrong:
        return _Result(refused={worker.address: wrong})
    begun = client.get_events(_beginning(topic, run))
    if begun:
        return _Result(died=_lost(begun))
    client.log_event(_beginning(topic, run), worker.address)
    key = worker.get_current_task()
    messages: list[Message] = []

    def said(message: Message) -> None:
        messages.append(message)
        worker.log_event(topic, {"run": run, "number": len(messages), "message": message})

    def dropped() -> bool:
        # The scheduler no longer wants it: the client has left or thinks that the worker is lost.
        task = worker.state.tasks.get(key)
        return task is None or task.state != "executing"

    with TemporaryDirectory(prefix="stfbnn-", dir=worker.local_directory) as name:
        folder = Path(name)
        for place, content in network.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        died = run_in_process(order, folder, said, dropped)
        found = {path.relative_to(folder).as_posix(): path for path in (folder / "networks").glob("*/*/network.*")}
        made = {place: path.read_bytes() for place, path in found.items()}
    return _Result(messages, died, {} if made == network else made)


def _beginning(topic: str, run: int) -> str:
    """Under which topic the scheduler keeps where a run was begun."""
    return f"{topic}-{run}"


def _lost(begun: Sequence[tuple[float, str]]) -> str:
    return f"its worker {begun[0][1]} was lost"


def _connected(address: str) -> Client:
    try:
        from distributed import Client  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InputError('units on other machines need Dask: pip install "stfbnn[grid]"') from error
    try:
        client = Client(address, timeout=_CONNECT, set_as_default=False, name="stfbnn")
    except (OSError, ValueError) as error:
        raise InputError(
            f"no scheduler answers at {address} ({error}); start one with `dask scheduler` and give its address, such as "
            "tcp://host:8786"
        ) from error
    try:
        client.wait_for_workers(1, timeout=_FIRST_WORKER)
    except OSError as error:
        client.close()
        raise InputError(f"the scheduler {address} has no workers; start some with `dask worker {address}`") from error
    return client


def _checked_versions(client: Client, address: str) -> dict[str, str | None]:
    """The versions of this process, which all others must have."""
    own = _own_versions()
    found: Any = client.get_versions(packages=list(_PACKAGES))
    # The scheduler learns what it hands out by importing this module, but it computes nothing.
    there = {**_versions_in(found["scheduler"]["packages"]), "torch": own["torch"]}
    wrong = [_difference(f"the scheduler {address}", there, own)]
    wrong += [
        _difference(f"the worker {name}", _versions_in(of["packages"]), own) for name, of in found["workers"].items()
    ]
    told = [line for line in wrong if line]
    if told:
        raise InputError(
            f"{'; '.join(told[:3])}: install the same versions everywhere, or records would not be comparable"
        )
    return own


def _own_versions() -> dict[str, str | None]:
    from distributed.versions import get_versions  # noqa: PLC0415 - an extra

    return _versions_in(get_versions(_PACKAGES)["packages"])


def _versions_in(packages: Mapping[str, str | None]) -> dict[str, str | None]:
    """What has to be the same: of Python the minor version, of torch the version without the kind of its build."""
    torch = packages["torch"]
    return {
        "Python": ".".join(str(packages["python"]).split(".")[:2]),
        "stfbnn": packages["stfbnn"],
        "torch": None if torch is None else torch.split("+")[0],
    }


def _difference(who: str, there: Mapping[str, str | None], here: Mapping[str, str | None]) -> str:
    """How versions differ, in words; empty where they do not."""
    other = [
        f"{name} {there[name] or 'missing'} (here {version})"
        for name, version in here.items()
        if there[name] != version
    ]
    return f"{who} has {', '.join(other)}" if other else ""
