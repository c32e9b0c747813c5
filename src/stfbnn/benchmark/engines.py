"""What runs units side by side, as the one who hands them out sees it; and the processes of this machine as such an engine."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stfbnn.benchmark.unit_process import Message, order_of, run_in_process

if TYPE_CHECKING:
    from stfbnn.benchmark.runner import Unit


@dataclass(frozen=True)
class Said:
    """A run of a unit said something.

    Attributes:
        run: Which run.
        message: What it said.
    """

    run: int
    message: Message


@dataclass(frozen=True)
class Ended:
    """A run of a unit is over; nothing more comes of it.

    Attributes:
        run: Which run.
        died: What its process died of; None where it came to its end.
    """

    run: int
    died: str | None


class Engine(Protocol):
    """Runs units side by side; what they keep is in their folders when it is said to be done."""

    def start(self, run: int, unit: Unit) -> None:
        """Run a unit as soon as there is room for it.

        Args:
            run: A number that no other run has.
            unit: With the methods that are to be run, none of which is done.
        """

    def next(self) -> Said | Ended | None:
        """What happened next; None where nothing did for a while."""


class LocalProcesses:
    """Processes of this machine, one for each unit and so many at a time; when the block ends, by an error too, so do they.

    Args:
        count: How many run at a time.
    """

    def __init__(self, count: int) -> None:
        # The threads only wait for the processes.
        self._threads = ThreadPoolExecutor(count)
        self._happened: queue.SimpleQueue[Said | Ended] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._threads.shutdown(cancel_futures=True)

    def start(self, run: int, unit: Unit) -> None:
        """Run a unit in a process of its own when its turn comes."""
        self._threads.submit(self._run, run, unit)

    def next(self) -> Said | Ended | None:
        """What happened next; None where nothing did for a second."""
        try:
            return self._happened.get(timeout=1)
        except queue.Empty:
            return None

    def _run(self, run: int, unit: Unit) -> None:
        def said(message: Message) -> None:
            self._happened.put(Said(run, message))

        try:
            died = run_in_process(order_of(unit), unit.folder, said, self._stopped.is_set)
        except OSError as error:
            died = f"its process could not be started ({error})"
        self._happened.put(Ended(run, died))
