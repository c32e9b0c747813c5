"""Running a suite: task by task, seed by seed, method by method, each kept when it is done and never run twice."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from safetensors import SafetensorError

from stfbnn.baselines.networks import PointNetwork
from stfbnn.benchmark.clock import uses_processor_time
from stfbnn.benchmark.engines import LocalProcesses
from stfbnn.benchmark.grid import Grid
from stfbnn.benchmark.measure import Measured
from stfbnn.benchmark.methods import METHODS, Context, Fitted, Method, Trained
from stfbnn.benchmark.methods.networks import likelihood_of
from stfbnn.benchmark.records import Candidate, Cost, Record, load_record, record_path
from stfbnn.benchmark.side_by_side import run_side_by_side
from stfbnn.benchmark.suites import Suite
from stfbnn.benchmark.tasks import Task
from stfbnn.benchmark.unit_process import in_one_line
from stfbnn.environment import environment
from stfbnn.errors import DataError, InputError
from stfbnn.evaluation.cost import alternating_seconds, peak_tensor_bytes, ratios
from stfbnn.files import write_json
from stfbnn.progress import Reporter, progress_bar
from stfbnn.threads import threads
from stfbnn.weights_file import save_weights

_TIMED_INPUTS, _ROUNDS = 1000, 3


class Watch(Protocol):
    """Who follows a unit as it runs."""

    def begun(self, method: str) -> None:
        """A method is next; the base network is trained now if the method needs it and it is not there."""

    def done(self, method: str, failure: str | None) -> None:
        """A method is done, and its record is kept; what it failed by, if it did."""


@dataclass(frozen=True)
class Unit:
    """One task and seed, in whose order methods are run.

    Attributes:
        task: The task.
        seed: The seed.
        budget: Settings of a method.
        methods: Names of the methods, the base network first.
        folder: Where everything is kept.
        threads: Threads of the computation.
    """

    task: Task
    seed: int
    budget: int
    methods: tuple[str, ...]
    folder: Path
    threads: int

    @property
    def settings(self) -> dict[str, Any]:
        """What is fixed for every method: a record with other settings is not of this unit."""
        content: dict[str, Any] = json.loads(json.dumps({"task": asdict(self.task), "budget": self.budget}))
        return content

    def done(self, method: str) -> bool:
        """Whether the record of a method is there, is of these settings and has figures: what failed is tried again."""
        path = self.record_path(method)
        if not path.exists():
            return False
        try:
            found = load_record(path)
        except DataError:
            return False
        return found.settings == self.settings and found.failed is None

    def record_path(self, method: str) -> Path:
        """Where the record of a method is kept."""
        return record_path(self.folder, self.task.name, self.seed, method)

    def network_files(self) -> tuple[Path, Path]:
        """Where the base network is kept: its weights, and what it was trained by, which is written after them."""
        folder = self.folder / "networks" / self.task.name / str(self.seed)
        return folder / "network.safetensors", folder / "network.json"

    def run(self, watch: Watch) -> None:
        """Run the methods that are not there yet."""
        missing = [name for name in self.methods if not self.done(name)]
        if not missing:
            for name in self.methods:
                watch.done(name, None)
            return
        with threads(self.threads), warnings.catch_warnings():
            # What a method warns of is for a user who chose it; here it is one of many.
            warnings.simplefilter("ignore", UserWarning)
            context = _context(self)
            for name in self.methods:
                watch.begun(name)
                if not METHODS[name].trains_base and context.base is None:
                    context = _with_base(context, self)
                watch.done(name, _run_method(METHODS[name], context, self) if name in missing else None)


class _Follower:
    """Shows what is being done on a bar, and gathers what failed."""

    def __init__(self, unit: Unit, bar: Reporter, failures: list[str]) -> None:
        self._unit = unit
        self._bar = bar
        self._failures = failures

    def begun(self, method: str) -> None:
        self._bar.describe(f"{self._unit.task.name} {self._unit.seed} {METHODS[method].title}")

    def done(self, method: str, failure: str | None) -> None:
        self._bar.advance()
        if failure:
            self._failures.append(f"{self._unit.task.name} {self._unit.seed} {method}: {failure}")


def units_of(
    suite: Suite,
    folder: Path,
    tasks: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    threads: int = 1,
) -> tuple[list[Unit], dict[str, str]]:
    """What there is to run.

    Args:
        suite: The suite.
        folder: Where records are kept.
        tasks: Names of tasks; all where there is none.
        methods: Names of methods, likewise.
        seeds: Seeds, likewise.
        threads: Of the computation.

    Returns:
        The units, and for each task that cannot be run here the reason.

    Raises:
        InputError: A name is unknown.
    """
    known = [task.name for task in suite.tasks]
    for what, given, names in (("task", tasks, known), ("method", methods, list(METHODS))):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise InputError(f"suite {suite.name} has no {what} {unknown[0]!r}; there are {', '.join(names)}")
    chosen = tuple(name for name in METHODS if not methods or name in methods)
    units, skipped = [], {}
    for task in suite.tasks:
        if tasks and task.name not in tasks:
            continue
        absent = task.missing()
        if absent:
            skipped[task.name] = absent
            continue
        units += [
            Unit(task, seed, min(suite.budget, task.budget or suite.budget), chosen, folder, threads)
            for seed in task.seeds
            if not seeds or seed in seeds
        ]
    return units, skipped


def run_units(
    units: Sequence[Unit], jobs: int = 1, progress: bool | None = None, scheduler: str | None = None, retries: int = 2
) -> list[str]:
    """Run what is not there yet: one unit after another in this process, or side by side.

    Side by side, every unit is in a process of its own, here or where the workers of a scheduler are. What fails there, by an
    exception or by the death of its process, is tried again; in this process it is not, for it would fail as it did.

    Args:
        units: From `units_of`.
        jobs: Processes of this machine that run units side by side.
        progress: Show a bar; None shows it on a terminal.
        scheduler: Address of a Dask scheduler whose workers run the units, such as ``tcp://host:8786``.
        retries: How often a method that failed is tried again, where units run side by side.

    Returns:
        Why methods failed, one line each.

    Raises:
        InputError: ``jobs`` or ``retries`` make no sense; the scheduler cannot be reached, or has no workers or other versions.
        StfbnnError: The scheduler, or all of its workers, were lost. What is done is kept.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, but they are {jobs}")
    if retries < 0:
        raise InputError(f"retries must be at least 0, but they are {retries}")
    if scheduler is not None and jobs > 1:
        raise InputError(
            "jobs are processes of this machine: leave them at 1 where a scheduler's workers run the units"
        )
    with progress_bar("benchmark", sum(len(unit.methods) for unit in units), progress) as bar:
        if jobs > 1 or scheduler is not None:
            with LocalProcesses(jobs) if scheduler is None else Grid(scheduler) as engine:
                return run_side_by_side(units, engine, retries, bar)
        failures: list[str] = []
        for unit in units:
            try:
                unit.run(_Follower(unit, bar, failures))
            except Exception as error:  # Whatever one unit fails by, the others are to be had.
                failures.append(f"{unit.task.name} {unit.seed}: {in_one_line(error)}")
        return failures


def _run_method(method: Method, context: Context, unit: Unit) -> str | None:
    """Run one method and save its record; what it failed by, if it did."""
    blank = Record(unit.task.name, context.data.kind, unit.seed, method.name, _environment(), unit.settings)
    unsuitable = method.missing(context)
    if method.name in unit.task.left_out:
        unsuitable = "left out of this task for time"
    if context.data.kind not in method.kinds:
        unsuitable = f"it is not for a {context.data.kind}"
    if unsuitable:
        replace(blank, failed=unsuitable).save(unit.folder)
        return None
    try:
        fitted = method.fit(context)
        if method.trains_base:
            _save_base(fitted, unit)
            context = _with_base(context, unit)
        record = _record(method, fitted, context, blank)
    except Exception as error:  # Whatever one method fails by, the others are to be had.
        replace(blank, failed=in_one_line(error)).save(unit.folder)
        return in_one_line(error)
    record.save(unit.folder)
    return None


def _record(method: Method, fitted: Fitted, context: Context, blank: Record) -> Record:
    measured = Measured(fitted, fitted.raw, context.data)
    raw, scaled = measured.row(), None
    if fitted.scaled is not None:
        other = measured if fitted.scaled == fitted.raw else Measured(fitted, fitted.scaled, context.data)
        scaled = other.row(fitted.candidates[fitted.scaled].tau)
    return replace(
        blank,
        candidates=fitted.candidates,
        chosen=(fitted.raw, fitted.scaled),
        course=_course(method, fitted, context),
        cost=_cost(method, fitted, context),
        raw=raw,
        scaled=scaled,
        notes=fitted.notes,
    )


def _course(method: Method, fitted: Fitted, context: Context) -> tuple[Candidate, ...]:
    if method.course is None or not context.task.courses:
        return ()
    return tuple(sorted(method.course(context, fitted.candidates[fitted.raw]), key=lambda one: one.seconds))


def _cost(method: Method, fitted: Fitted, context: Context) -> Cost:
    assert context.base is not None  # noqa: S101 - the runner trains it first
    predictor, network = fitted.predictor(fitted.raw), PointNetwork(context.model, likelihood_of(context))
    inputs = context.data.test.first(_TIMED_INPUTS)
    batches = list(inputs.batches(_TIMED_INPUTS))
    seconds = alternating_seconds(
        {"network": lambda: network.outputs(batches), "method": lambda: predictor.outputs(batches)}, rounds=_ROUNDS
    )
    step = method.step
    small = context.one_batch()
    held = [*context.model.parameters(), *context.model.buffers()] if method.holds_base else []
    peak = None if step is None else peak_tensor_bytes(lambda: step(small), held=held)
    own = method.name == "network"
    return Cost(
        stage_one_seconds=context.base.seconds,
        seconds=0.0 if own else fitted.seconds,
        # Of the network it is what trying other settings took beside the one that was kept.
        search_seconds=fitted.search_seconds - (context.base.seconds if own else 0.0),
        predict_seconds=statistics.median(seconds["method"]) * 1000 / len(inputs),
        predict_ratio=1.0 if own else ratios(seconds, "method", "network").median,
        peak_bytes=peak,
        trainable_parameters=predictor.trainable_parameters,
        artifact_bytes=predictor.artifact_bytes,
    )


def _environment() -> dict[str, Any]:
    return {**environment(), "seconds": "of the processor" if uses_processor_time() else "of the wall clock"}


def trained_context(unit: Unit) -> Context:
    """A task's data and its network, which is trained now if it is not there."""
    return _with_base(_context(unit), unit)


def _context(unit: Unit) -> Context:
    return Context(unit.task, unit.task.data(unit.seed), unit.seed, unit.budget)


def _save_base(fitted: Fitted, unit: Unit) -> None:
    weights, note = unit.network_files()
    predictor = fitted.predictor(fitted.raw)
    assert isinstance(predictor, PointNetwork)  # noqa: S101 - the one method that trains the base network
    save_weights(predictor.model, weights)
    candidate = fitted.candidates[fitted.raw]
    write_json(note, {"settings": unit.settings, "setting": dict(candidate.setting), "seconds": candidate.seconds})


def _with_base(context: Context, unit: Unit) -> Context:
    """The context with the trained network, which is trained now if it is not there."""
    weights, note = unit.network_files()
    for attempt in range(2):
        try:
            content = json.loads(note.read_text(encoding="utf-8"))
            if content["settings"] == unit.settings:
                model = context.fresh("member", 0)
                model.load_state_dict(safetensors.torch.load_file(weights))
                base = Trained(model.eval(), content["setting"], content["seconds"])
                return Context(context.task, context.data, context.seed, context.budget, base)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            if attempt:
                raise
        _save_base(METHODS["network"].fit(context), unit)
    raise AssertionError("the network was just saved")
