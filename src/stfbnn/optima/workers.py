"""How the runs of a retraining share the machine: stacked in one computation, one after another, or on threads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from stfbnn.batches import Batch
from stfbnn.optima.courses import Course
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.threads import threads
from stfbnn.trunk import shared_copy

Execution = Literal["stacked", "loop", "threads"]
EXECUTIONS: tuple[Execution, ...] = ("loop", "stacked", "threads")

# A step is timed once, and again where it was so short that the clock or a neighbour may have decided.
_TIMED_STEPS = 5
_LONG_STEP = 0.1

_T = TypeVar("_T")
_C = TypeVar("_C")


class Workers(Protocol):
    """Does the work of some runs."""

    def step(self, courses: Sequence[Course], batch: Batch) -> None:
        """Move every run by one step on a batch that is on the network's device."""

    def losses(self, weights: Sequence[Tensor], examples: Examples) -> list[float]:
        """The loss of each weight vector (d,) on examples in memory."""


@contextmanager
def workers(function: LayerFunction, execution: Execution) -> Iterator[Workers]:
    """Make ready for one way of execution; what a run comes to is the same in all, up to rounding.

    Args:
        function: The network as a function of the layer's weights.
        execution: "stacked": runs in groups of `LayerFunction.group`. "loop": one after another, each with all of torch's
            threads. "threads": as many runs at a time as torch had threads, each with one; within the block torch is
            set to one thread.
    """
    if execution != "threads":
        yield _InTurn(function, stacked=execution == "stacked")
        return
    count = torch.get_num_threads()
    with threads(1), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield _OnThreads([_copy(function) for _ in range(count)], pool)


def fastest(function: LayerFunction, start: Callable[[], list[Course]], batch: Batch) -> Execution:
    """Time one step of all runs in each way, after one to warm up.

    Args:
        function: The network as a function of the layer's weights.
        start: Makes the runs anew.
        batch: A minibatch on the network's device.
    """
    if len(start()) == 1:
        return "loop"
    possible: list[Execution] = ["loop"]
    if can_stack(function, batch):
        possible.append("stacked")
    if function.bnn.device.type == "cpu" and torch.get_num_threads() > 1:
        possible.append("threads")
    if len(possible) == 1:
        return "loop"
    return min(possible, key=lambda execution: _seconds(function, start(), batch, execution))


def can_stack(function: LayerFunction, batch: Batch) -> bool:
    """Whether the network can be run under several weights at once; recurrent layers, for one, cannot."""
    vectors, inputs = function.trained.repeat(2, 1), batch.rows(0, min(2, len(batch))).inputs
    try:
        torch.vmap(lambda vector: function.bnn.outputs(vector, inputs))(vectors)
    except RuntimeError:
        return False
    return True


class _InTurn:
    """Runs on the thread of the caller, alone or in groups."""

    def __init__(self, function: LayerFunction, stacked: bool) -> None:
        self._function, self._stacked = function, stacked

    def step(self, courses: Sequence[Course], batch: Batch) -> None:
        size = self._function.group(batch.inputs) if self._stacked else 1
        for start in range(0, len(courses), size):
            _step(self._function, courses[start : start + size], batch, self._stacked)

    def losses(self, weights: Sequence[Tensor], examples: Examples) -> list[float]:
        if self._stacked:
            return _losses(self._function, weights, examples)
        # By itself, so that a run's course does not depend on what runs beside it, not even by rounding.
        return [loss for one in weights for loss in _losses(self._function, [one], examples)]


class _OnThreads:
    """Every run on the next free thread, each of which calls a copy of the network: a call swaps a module's parameters."""

    def __init__(self, functions: Sequence[LayerFunction], pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._free: SimpleQueue[LayerFunction] = SimpleQueue()
        for function in functions:
            self._free.put(function)

    def step(self, courses: Sequence[Course], batch: Batch) -> None:
        self._deal(lambda function, course: _step(function, [course], batch, stacked=False), courses)

    def losses(self, weights: Sequence[Tensor], examples: Examples) -> list[float]:
        return self._deal(lambda function, one: _losses(function, [one], examples)[0], weights)

    def _deal(self, task: Callable[[LayerFunction, _C], _T], items: Sequence[_C]) -> list[_T]:
        def one(item: _C) -> _T:
            function = self._free.get()
            try:
                return task(function, item)
            finally:
                self._free.put(function)

        return list(self._pool.map(one, items))


def _step(function: LayerFunction, courses: Sequence[Course], batch: Batch, stacked: bool) -> None:
    vectors = torch.stack([course.weights for course in courses]).requires_grad_()
    # Whether gradients are taken is each thread's own setting.
    with torch.enable_grad():
        loss = function.losses(vectors, batch, stacked).sum()
    (gradients,) = torch.autograd.grad(loss, vectors)
    for course, gradient in zip(courses, gradients, strict=True):
        course.step(gradient)


def _losses(function: LayerFunction, weights: Sequence[Tensor], examples: Examples) -> list[float]:
    found: list[float] = examples.scores(function, torch.stack(list(weights))).loss.tolist()
    return found


def _copy(function: LayerFunction) -> LayerFunction:
    """The same function through modules of its own, which share all tensors."""
    twin, bnn = copy.copy(function), copy.copy(function.bnn)
    # A shallow copy of a module has its children in the same dictionary.
    bnn._modules = {**function.bnn._modules, "network": shared_copy(function.bnn.network)}
    twin.bnn = bnn
    return twin


def _seconds(function: LayerFunction, courses: Sequence[Course], batch: Batch, execution: Execution) -> float:
    taken: list[float] = []
    with workers(function, execution) as work:
        for _ in range(1 + _TIMED_STEPS):
            began = time.perf_counter()
            work.step(courses, batch)
            # To read a number waits for an accelerator.
            float(courses[-1].weights.sum())
            taken.append(time.perf_counter() - began)
            if len(taken) > 1 and taken[-1] > _LONG_STEP:
                break
    return min(taken[1:])
