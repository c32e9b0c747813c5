"""A unit in a process of its own: whatever it dies of, it takes nothing else with it, and ending it ends its work at once.

The process that starts it writes an order to its standard input, which then stays open: where it closes, because the starter
is gone, the process leaves too. It answers by one line of JSON for each thing that happens: a method begins (``begun``), a
method is done (``done``, with what it ``failed`` by, and its ``record``), the unit cannot go on (``gave_up``), the end
(``end``). This module is imported without torch, so that a worker that only starts such processes stays small.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stfbnn.benchmark.runner import Unit

Message = Mapping[str, Any]
"""One thing that a unit's process said."""

# How often a process that should stop is looked for, in seconds.
_LOOK = 0.2


def order_of(unit: Unit) -> bytes:
    """What a unit's process is to do; the command line goes along, for the records name it."""
    return pickle.dumps((unit, sys.argv))


def in_one_line(error: Exception) -> str:
    """What went wrong, for a list of failures."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run_in_process(
    order: bytes, folder: Path, said: Callable[[Message], None], stopped: Callable[[], bool]
) -> str | None:
    """Run a unit in a process of its own and wait for its end.

    Args:
        order: From `order_of`.
        folder: Where the unit finds and keeps its files, in place of its own.
        said: Called with each message of the process, in this thread.
        stopped: Asked all the time, in another thread; the process is killed when it says True.

    Returns:
        What the process died of; None where it came to its end.

    Raises:
        OSError: The process cannot be started.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(  # noqa: S603 - this library, by this interpreter
        [sys.executable, "-m", __name__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        # Ctrl-C at a terminal is for the process that the user started, which ends this one.
        start_new_session=True,
    ) as process:
        ended = threading.Event()
        watcher = threading.Thread(target=_kill_when, args=(stopped, process, ended))
        watcher.start()
        try:
            finished = _converse(process, order, said)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watcher.join()
    return None if finished else _cause(process.returncode)


def _converse(process: subprocess.Popen[bytes], order: bytes, said: Callable[[Message], None]) -> bool:
    """Hand over the order, pass on what is said until the process closes its end, and tell whether it said that it is done."""
    assert process.stdin is not None  # noqa: S101 - asked for above
    assert process.stdout is not None  # noqa: S101 - asked for above
    try:
        process.stdin.write(order)
        process.stdin.flush()
    except BrokenPipeError:
        # A process that died at once does not read its order; its exit code tells why. What it did not read is dropped.
        with suppress(BrokenPipeError):
            process.stdin.close()
    finished = False
    for line in process.stdout:
        # A line that a kill cut short is no message.
        with suppress(ValueError):
            message = json.loads(line)
            finished = finished or "end" in message
            said(message)
    return finished


def _kill_when(stopped: Callable[[], bool], process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    while not ended.wait(_LOOK):
        if stopped():
            process.kill()
            return


def _cause(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


class _Teller:
    """Tells the starter what happens to the unit."""

    def __init__(self, unit: Unit, answers: IO[str]) -> None:
        self._unit = unit
        self._answers = answers

    def say(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def begun(self, method: str) -> None:
        self.say(begun=method)

    def done(self, method: str, failure: str | None) -> None:
        self.say(done=method, failed=failure, record=self._unit.record_path(method).read_text(encoding="utf-8"))


def main() -> None:
    """Be the process of one unit."""
    # Only this function writes answers: what a method prints goes where its warnings go.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        folder = Path(sys.argv[1])
        unit, sys.argv = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
        threading.Thread(target=_leave_with_starter, daemon=True).start()
        unit = replace(unit, folder=folder)
        teller = _Teller(unit, answers)
        try:
            unit.run(teller)
        except Exception as error:  # Whatever it is, the starter is to know.
            teller.say(gave_up=in_one_line(error))
        teller.say(end=True)


def _leave_with_starter() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
