"""One layer drawn anew, several times, and each time retrained by itself until its held-out loss stops improving."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from stfbnn.batches import TARGET_KEY, Batch
from stfbnn.checkpoint import load_checkpoint, prepare_checkpoint, save_checkpoint
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_gradients, require_positive
from stfbnn.inference.components.start import kept_where_unused, of_its_statistics, reinitialized
from stfbnn.inference.loaders import (
    count_examples,
    generator_states,
    kept_generators,
    length,
    require_rereadable,
    set_generator_states,
)
from stfbnn.inference.maximum_a_posteriori import adam_rate
from stfbnn.inference.survey import checked_batch
from stfbnn.layer_parameters import has_embeddings
from stfbnn.network import BayesianNetwork
from stfbnn.optima.courses import Course
from stfbnn.optima.layer_function import Examples, LayerFunction
from stfbnn.optima.workers import EXECUTIONS, Execution, Workers, can_stack, fastest, workers
from stfbnn.progress import Reporter, progress_bar
from stfbnn.provenance import ProvenanceRecorder
from stfbnn.randomness import derive_seed, generator, seeded

Start = Literal["reinitialize", "statistics"]

# The share of a pre-activation's size by which one step may change it: on the digits and networks of `stfbnn.models` runs from
# scratch converge within 50 short epochs, and lower rates do not.
_RELATIVE_RATE = 0.5


@dataclass(frozen=True)
class RetrainingOptions:
    """How often and how a layer is retrained.

    Attributes:
        runs: K, from how many draws.
        start: Where a run starts: "reinitialize", by the layer's own ``reset_parameters`` (where it has none, as the other);
            "statistics", from a Gaussian with the mean and the standard deviation of each trained parameter.
        epochs: How many a run may take.
        patience: After so many epochs without a notable improvement of the held-out loss (a thousandth of it) the run goes back
            to its best weights and on with a tenth of the rate, and after as many again it stops. With ``weight_decay`` the
            decay's part counts here as it does in what is minimised; else the best weights would be some on the way.
        learning_rate: Adam's; None takes it from the size of the layer's weights.
        weight_decay: c, where (c/2)‖w‖² is added to the mean loss; not decoupled, so that the minimum is that of a function.
        execution: "stacked", all runs in one computation; "loop", one after another; "threads", one on each thread; "auto",
            what is fastest on the first minibatch. A run comes to the same weights in all, up to rounding.

    Raises:
        InputError: An option is out of range.
    """

    runs: int = 8
    start: Start = "reinitialize"
    epochs: int = 50
    patience: int = 3
    learning_rate: float | None = None
    weight_decay: float = 0.0
    execution: Execution | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        require_count(runs=self.runs, epochs=self.epochs, patience=self.patience)
        if self.learning_rate is not None:
            require_positive(learning_rate=self.learning_rate)
        if self.weight_decay != 0:
            require_positive(weight_decay=self.weight_decay)
        if self.start not in ("reinitialize", "statistics"):
            raise InputError(f'start must be "reinitialize" or "statistics", but it is {self.start!r}')
        if self.execution not in ("auto", *EXECUTIONS):
            raise InputError(f'execution must be "auto", "stacked", "loop" or "threads", but it is {self.execution!r}')


@dataclass(frozen=True, eq=False)
class Optimum:
    """Weights of the layer at which a run ended, or the trained ones.

    Attributes:
        number: Of the run, from 0; −1 for the trained weights.
        start: "reinitialize", "statistics", or "trained" for the trained weights.
        weights: Those of the lowest held-out loss of all epochs, the decay's part being added, (d,), on the network's device.
        epochs: How many the run took.
        converged: Whether the held-out loss stopped improving; else the run met its limit of epochs, or its loss became NaN.
        train_loss: Mean −log p(y | x, w) of the training examples, nats per example, without the decay's part.
        held_out_loss: The same of the held-out examples.
        train_accuracy: Share of right labels among the training examples; None where the targets are no labels.
        held_out_accuracy: The same of the held-out examples.
        history: The held-out loss after every epoch in which it was finite.
    """

    number: int
    start: str
    weights: Tensor
    epochs: int
    converged: bool
    train_loss: float
    held_out_loss: float
    train_accuracy: float | None
    held_out_accuracy: float | None
    history: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Retraining:
    """What several retrainings of one layer came to.

    Attributes:
        optima: Of the runs, in the order of their draws.
        seconds: Wall time of all epochs, with those before a resume.
        execution: How the runs shared the machine: "stacked", "loop" or "threads".
        learning_rate: Adam's, at the start.
    """

    optima: tuple[Optimum, ...]
    seconds: float
    execution: str
    learning_rate: float


def retrain(
    function: LayerFunction,
    train_loader: Iterable[Any],
    train: Examples,
    held_out: Examples,
    options: RetrainingOptions,
    seed: int,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | None = None,
    target_key: str = TARGET_KEY,
    title: str = "retrain",
) -> Retraining:
    """Draw the layer anew and retrain it by Adam with all other layers frozen, K times.

    All runs see the same minibatches in the same order. Each has its own Adam and stops by itself, so that it comes to the same
    weights whatever runs beside it. Rows of embeddings that are for padding, or that no minibatch used, keep their trained
    values.

    Args:
        function: The network as a function of the layer's weights.
        train_loader: Batches with targets, read once an epoch for all runs; weights of examples are not used.
        train: Training examples on which the optima are scored.
        held_out: Held-out examples, by which every run chooses its weights and stops.
        options: How often and how.
        seed: A non-negative integer. Run k's draw depends on it and on k alone.
        checkpoint: A file that is written after every epoch.
        resume: Go on from it where it is there.
        progress: Show a progress bar; None shows it on a terminal.
        target_key: The target's entry in mappings.
        title: What the progress bar says.

    Raises:
        InputError: The loader gives no batch or can be read only once, a batch is not usable, or the loss of all runs became
            NaN.
        CheckpointError: The checkpoint is damaged, belongs to other settings, or cannot be written.
        ModelChangedError: The model was changed since the function was made.
    """
    bnn = function.bnn
    require_rereadable(train_loader)
    require_gradients(bnn.posterior)
    with bnn.computing_in(None):
        starts = [_draw(bnn, options.start, derive_seed(seed, "run", number)) for number in range(options.runs)]
        rate = options.learning_rate or adam_rate(bnn.layout, starts[0], _RELATIVE_RATE)
        finish = partial(kept_where_unused, bnn) if has_embeddings(bnn.network.get_submodule(bnn.layer_name)) else None

        def begin() -> list[Course]:
            return [Course(start, rate, options.weight_decay, options.patience, finish) for start in starts]

        state = _State(begin())
        signature: dict[str, Any] = {}
        if checkpoint is not None:
            signature = _signature(function, train_loader, held_out, options, seed)
            prepare_checkpoint(checkpoint, signature)
            saved = load_checkpoint(checkpoint, signature) if resume else None
            if saved is not None:
                state.load(saved)
                set_generator_states(train_loader, saved["loader"])
        if state.execution is None:
            with seeded(seed, "timing"), kept_generators(train_loader):
                given = next(iter(train_loader), None)
            if given is None:
                raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
            first = checked_batch(given, target_key).to(bnn.device)
            state.execution = _executable(options.execution, function, first) or fastest(function, begin, first)
        batches = length(train_loader)
        total = None if batches is None else options.epochs * batches
        with progress_bar(title, total, progress) as bar, workers(function, state.execution) as work:
            bar.advance(state.epoch * (batches or 0))
            while state.epoch < options.epochs and state.running():
                began = time.perf_counter()
                bnn.check_unchanged()
                with seeded(seed, "epoch", state.epoch):
                    _one_epoch(function, train_loader, state, work, bar, target_key)
                _score(state, held_out, work, rate)
                state.seconds += time.perf_counter() - began
                if checkpoint is not None:
                    save_checkpoint(checkpoint, state.saved(generator_states(train_loader)), signature)
        optima = _optima(function, state.courses, options.start, train, held_out)
    return Retraining(optima, state.seconds, state.execution, rate)


def trained_optimum(function: LayerFunction, train: Examples, held_out: Examples) -> Optimum:
    """The trained weights, scored as `retrain` scores those that it finds."""
    with function.bnn.computing_in(None):
        return _scored(function, [(-1, "trained", function.trained, 0, True, ())], train, held_out)[0]


class _State:
    """Where a retraining is."""

    def __init__(self, courses: list[Course]) -> None:
        self.courses = courses
        self.epoch = 0
        self.seconds = 0.0
        self.execution: Execution | None = None

    def running(self) -> list[Course]:
        return [course for course in self.courses if course.running]

    def figures(self) -> dict[str, float]:
        """What the progress bar shows."""
        shown = {"running": float(len(self.running()))}
        best = min(course.best_loss for course in self.courses)
        return {"best held-out loss": best, **shown} if self.epoch else shown

    def saved(self, loader: list[Tensor]) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "execution": self.execution,
            "courses": [course.state() for course in self.courses],
            "loader": loader,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        self.epoch, self.seconds, self.execution = saved["epoch"], saved["seconds"], saved["execution"]
        for course, state in zip(self.courses, saved["courses"], strict=True):
            course.load_state(state)


def _executable(asked: Execution | Literal["auto"], function: LayerFunction, first: Batch) -> Execution | None:
    """The way that was asked for, a loop in place of a stack that the network does not allow; None for the fastest."""
    if asked == "auto":
        return None
    return "loop" if asked == "stacked" and not can_stack(function, first) else asked


def _draw(bnn: BayesianNetwork, start: Start, seed: int) -> Tensor:
    """Weights (d,) to start from, on the network's device."""
    trained = bnn.trained_vector()
    if start == "reinitialize":
        return bnn.layout.flatten(reinitialized(bnn, seed)).to(trained)
    random = generator(seed, "statistics")
    parts = bnn.layout.unflatten(trained)
    return bnn.layout.flatten({name: of_its_statistics(value, random) for name, value in parts.items()})


def _one_epoch(
    function: LayerFunction, loader: Iterable[Any], state: _State, work: Workers, bar: Reporter, target_key: str
) -> None:
    courses, figures, batches = state.running(), state.figures(), 0
    for given in loader:
        work.step(courses, checked_batch(given, target_key).to(function.bnn.device))
        bar.advance(1, **figures)
        batches += 1
    if not batches:
        raise InputError("train_loader gave no batch in this epoch; it must give the same data every time it is read")


def _score(state: _State, held_out: Examples, work: Workers, learning_rate: float) -> None:
    courses = state.running()
    weights = [course.finished() for course in courses]
    for course, one, loss in zip(courses, weights, work.losses(weights, held_out), strict=True):
        course.record(one, loss)
    state.epoch += 1
    if all(course.status == "failed" for course in state.courses):
        raise InputError(
            f"the held-out loss of every run became NaN or infinite, the last one's in epoch {state.epoch}: pass a "
            f"learning_rate lower than {learning_rate:.3g}, or check the data for extreme values"
        )


def _optima(
    function: LayerFunction, courses: Sequence[Course], start: str, train: Examples, held_out: Examples
) -> tuple[Optimum, ...]:
    described = [
        (number, start, course.best, course.epochs, course.status == "converged", tuple(course.history))
        for number, course in enumerate(courses)
    ]
    return _scored(function, described, train, held_out)


def _scored(
    function: LayerFunction,
    described: Sequence[tuple[int, str, Tensor, int, bool, tuple[float, ...]]],
    train: Examples,
    held_out: Examples,
) -> tuple[Optimum, ...]:
    weights = torch.stack([one[2] for one in described])
    on_train, on_held_out = train.scores(function, weights), held_out.scores(function, weights)
    return tuple(
        Optimum(
            number=number,
            start=start,
            weights=one,
            epochs=epochs,
            converged=converged,
            train_loss=float(on_train.loss[row]),
            held_out_loss=float(on_held_out.loss[row]),
            train_accuracy=None if on_train.accuracy is None else float(on_train.accuracy[row]),
            held_out_accuracy=None if on_held_out.accuracy is None else float(on_held_out.accuracy[row]),
            history=history,
        )
        for row, (number, start, one, epochs, converged, history) in enumerate(described)
    )


def _signature(
    function: LayerFunction, loader: Iterable[Any], held_out: Examples, options: RetrainingOptions, seed: int
) -> dict[str, Any]:
    """Say what was asked for, on which network and which data: a checkpoint of another retraining is refused."""
    bnn = function.bnn
    recorder = ProvenanceRecorder()
    for batch in held_out.batches:
        recorder.add(batch.inputs)
    return {
        "options": asdict(options),
        "seed": seed,
        "layer": bnn.layer_name,
        "shapes": [list(shape) for shape in bnn.layout.shapes],
        "model": bnn.model_fingerprint,
        "likelihood": [type(function.likelihood).__name__, function.likelihood.config()],
        "batches": length(loader),
        "rows": count_examples(loader, 0),
        "held_out": recorder.finish().digest(),
    }
