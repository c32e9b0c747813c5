"""Progress on a terminal: a bar with the time left and the figures of the moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """What long work tells of its progress."""

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Count ``steps`` as done and show ``figures`` beside the bar."""

    def describe(self, text: str) -> None:
        """Change what the bar says is being done."""


class _Silent:
    def advance(self, steps: int = 1, **figures: float) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class _Bar:
    def __init__(self, progress: Progress, description: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, figures="")

    def advance(self, steps: int = 1, **figures: float) -> None:
        if figures:
            self._progress.update(self._task, figures=_line(figures))
        self._progress.advance(self._task, steps)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)


@contextmanager
def progress_bar(description: str, total: int | None, show: bool | None = None) -> Iterator[Reporter]:
    """Show a progress bar on standard error while the block runs.

    Args:
        description: What is being done.
        total: Steps in all, or None where that is not known.
        show: True or False to force it; None shows it where standard error is a terminal.

    Yields:
        A reporter to advance; a silent one where nothing is shown.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield _Silent()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        yield _Bar(progress, description, total)


def _line(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
