"""Units side by side on an engine: what fails is tried again so many times, then told, and costs nobody else anything.

A run of a unit is its missing methods, one after another. What ends it early, or fails in it, is held against the method that
was at work; that method is left out once it has failed too often, and the unit goes on without it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stfbnn.benchmark.engines import Ended, Engine
from stfbnn.benchmark.methods import METHODS
from stfbnn.benchmark.unit_process import Message
from stfbnn.progress import Reporter

if TYPE_CHECKING:
    from stfbnn.benchmark.runner import Unit

# What failed where it was no single method, such as reading the data.
_WHOLE = ""


@dataclass
class _Course:
    """How a unit stands, over all its runs.

    Attributes:
        unit: The unit.
        retries: How often what failed is tried again.
        left: Methods that are to be run yet.
        begun: The method that is at work.
        failed: How often each method failed.
        failures: What to tell in the end, one line each.
    """

    unit: Unit
    retries: int
    left: list[str]
    begun: str = _WHOLE
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def hear(self, message: Message) -> None:
        if "begun" in message:
            self.begun = message["begun"]
        elif "done" in message:
            self.begun = _WHOLE
            if message["failed"]:
                self.fail(message["done"], message["failed"])
            else:
                self.left.remove(message["done"])
        elif "gave_up" in message:
            # It was at work on no method, or on the network that the method needs.
            self.begun = _WHOLE
            self.fail(_WHOLE, message["gave_up"])

    def end(self, died: str | None) -> None:
        """A run is over."""
        if died is not None:
            self.fail(self.begun, died)
        self.begun = _WHOLE

    def fail(self, method: str, why: str) -> None:
        self.failed[method] += 1
        if self.failed[method] <= self.retries:
            return
        # Without the network there is nothing for any other method.
        whole = method == _WHOLE or METHODS[method].trains_base
        self.left = [] if whole else [name for name in self.left if name != method]
        name = " ".join([self.unit.task.name, str(self.unit.seed), method]).strip()
        times = f" ({self.failed[method]} times)" if self.retries else ""
        self.failures.append(f"{name}: {why}{times}")


def run_side_by_side(units: Sequence[Unit], engine: Engine, retries: int, bar: Reporter) -> list[str]:
    """Run what is not there yet.

    Args:
        units: The units.
        engine: What runs them.
        retries: How often a method that failed is tried again.
        bar: Counts methods.

    Returns:
        Why methods failed, one line each.
    """
    numbers = itertools.count()
    running: dict[int, _Course] = {}
    failures: list[str] = []

    def go_on(course: _Course) -> None:
        if course.left:
            running[run := next(numbers)] = course
            engine.start(run, replace(course.unit, methods=tuple(course.left)))
        else:
            failures.extend(course.failures)

    for unit in units:
        left = [name for name in unit.methods if not unit.done(name)]
        bar.advance(len(unit.methods) - len(left))
        go_on(_Course(unit, retries, left))
    while running:
        event = engine.next()
        if event is None:
            continue
        course = running[event.run]
        before = len(course.left)
        if isinstance(event, Ended):
            del running[event.run]
            course.end(event.died)
            go_on(course)
        else:
            course.hear(event.message)
            if course.begun:
                bar.describe(f"{course.unit.task.name} {course.unit.seed} {METHODS[course.begun].title}")
        bar.advance(before - len(course.left))
    return failures
