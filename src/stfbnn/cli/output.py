"""What a command says: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfbnn.files import plain

if TYPE_CHECKING:
    from rich.table import Table

# Where no terminal says how wide it is, a table is not squeezed.
_WIDTH = 160


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during work that can be gone on with; its text says how."""


class Output:
    """Where one command writes.

    Args:
        as_json: Print one JSON object at the end and nothing else to standard output.
        silent: Write nothing at all; for a rank that another one speaks for.
    """

    def __init__(self, as_json: bool, silent: bool = False) -> None:
        self._as_json, self._silent = as_json, silent

    def note(self, text: str) -> None:
        """Say what is being done, on standard error."""
        if self._silent:
            return
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def show(self, what: Table | str) -> None:
        """Print a part of the result for a person; nothing with ``--json``."""
        if self._as_json or self._silent:
            return
        from rich.console import Console  # noqa: PLC0415 - slow, not needed for --help

        console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
        if isinstance(what, str):
            # Not wrapped: paths are copied from it.
            console.print(what, markup=False, soft_wrap=True)
        else:
            console.print(what)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Print the result for a program, with ``--json``."""
        if self._as_json and not self._silent:
            sys.stdout.write(json.dumps(plain(result), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def complain(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    """Let Ctrl-C say from where the work goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not checkpoint.exists():
            raise
        raise Interrupted(
            f"interrupted; the run resumes from {checkpoint} when the same command is run again"
        ) from error
