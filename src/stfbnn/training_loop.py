"""The loop of stage one: epochs of optimizer steps on one or several ranks, and the state that a resume needs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sized
from dataclasses import astuple, dataclass
from functools import reduce
from itertools import islice
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from stfbnn.adversarial_training import AdversarialTraining
from stfbnn.batches import (
    Batch,
    Inputs,
    OutputFunction,
    batch_size,
    call_model,
    output_tensor,
    require_finite,
    to_device,
    training_batch,
)
from stfbnn.errors import InputError
from stfbnn.launching import samplers, set_epoch, sharded
from stfbnn.processes import Processes
from stfbnn.progress import Reporter
from stfbnn.provenance import Provenance, ProvenanceRecorder
from stfbnn.randomness import seeded
from stfbnn.training_choices import Objective, Schedule


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a run.

    Attributes:
        epoch: From 1.
        loss: Mean training loss per example while the parameters moved, in nats for the cross entropy.
        accuracy: Of the same forward passes, or None where the targets are no classes.
        val_loss: Mean loss per validation example after the epoch, or None without a validation loader.
        val_accuracy: Likewise.
        learning_rate: Of the epoch's last step (of the first parameter group).
        seconds: Wall time, validation included.
    """

    epoch: int
    loss: float
    accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    learning_rate: float
    seconds: float


class Totals:
    """Sums over the examples of an epoch."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._examples = self._correct = self._classified = 0

    def add(self, loss: float, examples: int, correct: tuple[int, int] | None) -> None:
        """Take in a batch: its mean loss, its size, and its right and all predictions of classes."""
        self._loss += loss * examples
        self._examples += examples
        if correct is not None:
            self._correct += correct[0]
            self._classified += correct[1]

    def figures(self) -> dict[str, float]:
        """The means so far on this rank, for the progress bar."""
        shown = {"loss": self._loss / max(self._examples, 1)}
        return shown | {"accuracy": self._correct / self._classified} if self._classified else shown

    def means(self, processes: Processes) -> tuple[float, float | None]:
        """Mean loss per example and accuracy, over all ranks of ``processes``."""
        # Doubles, for a sum over a large data set exceeds what a float counts exactly.
        sums = torch.tensor([self._loss, self._examples, self._correct, self._classified], dtype=torch.float64)
        loss, examples, correct, classified = processes.sum(sums).tolist()
        if examples == 0:
            raise InputError("a loader gave no batch in a later pass; it must give its batches anew at each pass")
        return loss / examples, correct / classified if classified else None


class SeenExamples:
    """The provenance of a loader, over all epochs and ranks.

    One epoch is not enough: ``drop_last`` leaves out other examples in each. It stops when there are as many distinct
    inputs as the data set has examples: then all were seen, or an augmentation makes new ones that match nothing.
    """

    def __init__(self, loader: Iterable[Any] | None) -> None:
        dataset = getattr(loader, "dataset", None)
        countable = isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)
        self._limit = len(dataset) if countable and isinstance(dataset, Sized) else None
        self.restore(ProvenanceRecorder().finish())

    def restore(self, provenance: Provenance) -> None:
        """Go on from what was seen before."""
        self.provenance = provenance
        self._recorder = ProvenanceRecorder(provenance)
        self._recording = self._limit is None or provenance.count < self._limit

    def add(self, inputs: Inputs) -> None:
        """Record a batch as the loader gave it."""
        if self._recording:
            self._recorder.add(inputs)

    def merge(self, processes: Processes) -> None:
        """Take in what was added since, on all ranks; called by all of them, at the end of an epoch."""
        if not self._recording:
            return
        parts = processes.gather(self._recorder.finish().to_tensor())
        self.restore(reduce(Provenance.union, map(Provenance.from_tensor, parts)))


class TrainingLoop:
    """The state of a run between epochs, and one epoch of it."""

    optimizer: Optimizer

    def __init__(
        self,
        *,
        fabric: Fabric,
        model: nn.Module,
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        objective: Objective,
        schedule: Schedule,
        seed: int,
        epochs: int,
        accumulate: int,
        output: OutputFunction | None,
        target_key: str,
        weight_key: str,
        adversarial: AdversarialTraining | None = None,
    ) -> None:
        self.fabric, self.model, self.objective, self.schedule = fabric, model, objective, schedule
        self.seed, self.epochs, self.accumulate = seed, epochs, accumulate
        self._output, self._target_key, self._weight_key = output, target_key, weight_key
        self._adversarial = adversarial
        self._generators = _generators(loader) + _generators(val_loader)
        self.loader, self.val_loader = sharded(fabric, loader, seed), val_loader
        self.batches = _length(self.loader)
        self.module = fabric.setup_module(model)
        self.history: list[EpochRecord] = []
        self.seen, self.selected_on = SeenExamples(loader), SeenExamples(val_loader)
        self.best: dict[str, Any] | None = None

    def set_optimizer(self, optimizer: Optimizer, clip_norm: float | None) -> None:
        """Say what steps; after the first look, which may be what creates a lazy model's parameters."""
        self.optimizer, self._clip_norm = optimizer, clip_norm
        self._stepper: Any = self.fabric.setup_optimizers(optimizer)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]

    def first_look(self) -> None:
        """Try the first batch of each loader, leaving no trace in parameters, buffers or generators."""
        states = [generator.get_state() for generator in self._generators]
        self.module.eval()
        try:
            self._settle_sums(self._look("training", self.loader))
            if self.val_loader is not None:
                self._look("validation", self.val_loader)
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def _look(self, what: str, loader: Iterable[Any]) -> Batch:
        with seeded(self.seed, "first look"), torch.no_grad():
            batch = next(iter(loader), None)
            if batch is None:
                raise InputError(
                    f"the {what} loader gives no batch; check its data set, and drop_last=True with a batch size "
                    f"larger than the data set"
                )
            first = self._split(batch)
            require_finite(first.inputs, f"the inputs of the first {what} batch")
            if self._adversarial is not None:
                self._adversarial.check(first.inputs)
            self.objective.check(self._outputs(first.inputs), first.target, first.weight)
        return first

    def _settle_sums(self, batch: Batch) -> None:
        """Go once through the network and back, of which nothing stays but the order in which gradients are summed.

        DDP settles that order after its first pass. A run that goes on from a checkpoint would take its first step in another
        order than one that was never stopped, and with three ranks or more the last digits of their sums would differ.
        """
        if self.fabric.world_size == 1:
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.module.train()
        try:
            with seeded(self.seed, "first look"):
                self.fabric.backward(self.objective(self._outputs(batch.inputs), batch.target, batch.weight))
        finally:
            self.module.eval()
            self.model.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.data.copy_(before)

    def epoch(self, epoch: int, reporter: Reporter, keep_best: bool) -> None:
        """Train for one epoch, validate, and add to the history.

        Raises:
            InputError: A batch is wrong, or the training diverged.
        """
        start = time.perf_counter()
        self.module.train()
        totals = Totals()
        with seeded(self.seed, "train", epoch):
            set_epoch(self.loader, epoch)
            batches = iter(self.loader)
            step = 0
            while group := [self._split(batch) for batch in islice(batches, self.accumulate)]:
                self._step(epoch, step, group, totals)
                step += 1
                reporter.advance(len(group), **totals.figures())
        if step == 0:
            raise InputError(f"the training loader gave no batch in epoch {epoch}; it must give them anew at each pass")
        self.optimizer.zero_grad(set_to_none=True)
        self._agree_on_buffers()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise InputError(_diverged("a parameter is NaN or infinite", epoch, step - 1, self.optimizer))
        processes = Processes(self.fabric)
        self.seen.merge(processes)
        loss, accuracy = totals.means(processes)
        val_loss, val_accuracy = self._validate(epoch, keep_best)
        if keep_best and val_loss is not None and (self.best is None or val_loss < self.best["val_loss"]):
            parameters = {name: _copy(value) for name, value in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "val_loss": val_loss, "model": parameters}
        rate = float(self.optimizer.param_groups[0]["lr"])
        seconds = time.perf_counter() - start
        self.history.append(EpochRecord(epoch, loss, accuracy, val_loss, val_accuracy, rate, seconds))

    def _step(self, epoch: int, step: int, group: list[Batch], totals: Totals) -> None:
        """One optimizer step on the mean over all examples of the group's batches."""
        within = 0.0 if self.batches is None else (step + 0.5) * self.accumulate / self.batches
        factor = self.schedule.factor((epoch - 1 + min(within, 1.0)) / self.epochs)
        for settings, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            settings["lr"] = rate * factor
        sizes = [batch_size(batch.inputs) for batch in group]
        for index, (batch, size) in enumerate(zip(group, sizes, strict=True)):
            self.seen.add(batch.inputs)
            with self.fabric.no_backward_sync(self.module, enabled=index < len(group) - 1):
                outputs = self._outputs(self._attacked(batch))
                loss = self.objective(outputs, batch.target, batch.weight)
                value = float(loss.detach())
                if not math.isfinite(value):
                    require_finite(batch.inputs, f"the inputs of epoch {epoch}, step {step}")
                    raise InputError(_diverged(f"the loss is {value}", epoch, step, self.optimizer))
                self.fabric.backward(loss * (size / sum(sizes)))
            totals.add(value, size, self.objective.correct(outputs, batch.target))
        if self._clip_norm is not None:
            self.fabric.clip_gradients(self.module, self._stepper, max_norm=self._clip_norm, error_if_nonfinite=False)
        self._stepper.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _validate(self, epoch: int, record: bool) -> tuple[float | None, float | None]:
        if self.val_loader is None:
            return None, None
        self.module.eval()
        totals = Totals()
        with seeded(self.seed, "validate", epoch):
            for given in self.val_loader:
                batch = self._split(given)
                if record:
                    self.selected_on.add(batch.inputs)
                outputs = self._outputs(batch.inputs)
                value = float(self.objective(outputs, batch.target, batch.weight))
                totals.add(value, batch_size(batch.inputs), self.objective.correct(outputs, batch.target))
        self.selected_on.merge(Processes(self.fabric))
        loss, accuracy = totals.means(Processes())
        if not math.isfinite(loss):
            raise InputError(f"the validation loss is {loss} after epoch {epoch}; look for NaN in the validation data")
        return loss, accuracy

    def state(self) -> dict[str, Any]:
        """All that the epochs to come depend on."""
        return {
            "history": [astuple(record) for record in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "generators": [generator.get_state() for generator in self._generators],
            "seen": self.seen.provenance.to_tensor(),
            "selected on": self.selected_on.provenance.to_tensor(),
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a run with the same settings.

        Raises:
            InputError: The loaders have another number of generators of their own.
        """
        if len(state["generators"]) != len(self._generators):
            raise InputError(
                f"the checkpoint was written with {len(state['generators'])} generators in the loaders, but there are "
                f"{len(self._generators)} now; build the loaders as they were, or start anew with resume=False"
            )
        self.history = [EpochRecord(*row) for row in state["history"]]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        for generator, generator_state in zip(self._generators, state["generators"], strict=True):
            generator.set_state(generator_state)
        self.seen.restore(Provenance.from_tensor(state["seen"]))
        self.selected_on.restore(Provenance.from_tensor(state["selected on"]))
        self.best = state["best"]

    def finish(self) -> int:
        """Put the chosen parameters into the model and say of which epoch they are."""
        if self.best is None:
            return len(self.history)
        self.model.load_state_dict(self.best["model"])
        return int(self.best["epoch"])

    def _split(self, batch: Any) -> Batch:
        return training_batch(batch, self._target_key, self._weight_key)

    def _outputs(self, inputs: Inputs) -> Tensor:
        return output_tensor(call_model(self.module, to_device(inputs, self.fabric.device)), self._output)

    def _attacked(self, batch: Batch) -> Inputs:
        """The inputs to learn from: the batch's own, or as an attacker changes them."""
        if self._adversarial is None:
            return batch.inputs
        inputs = to_device(batch.inputs, self.fabric.device)
        assert isinstance(inputs, Tensor)  # noqa: S101 - checked at the first look
        # The plain model, for what wraps it on several ranks expects every pass to end in a step.
        return self._adversarial.attack(
            self.model,
            inputs,
            lambda outputs: self.objective(outputs, batch.target, batch.weight),
            self._output,
            self.fabric.autocast,
        )

    def _agree_on_buffers(self) -> None:
        """Give every rank the buffers of rank 0; running statistics differ after each rank's own last batch."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader was given, each once; their state goes on from pass to pass."""
    owners = [loader, *samplers(loader)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(entry): entry for entry in found if isinstance(entry, torch.Generator)}.values())


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        # A DataLoader has the method even where its data set has no length.
        return None


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _diverged(what: str, epoch: int, step: int, optimizer: Optimizer) -> str:
    return (
        f"{what} at epoch {epoch}, step {step} (counted from 0): training diverged; lower lr (it is "
        f'{optimizer.param_groups[0]["lr"]:.3g}), set warmup=0.05 or clip_norm=1.0, or use precision="32-true"'
    )
