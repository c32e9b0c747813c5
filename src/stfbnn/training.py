"""Stage one: train a network the ordinary way, exactly resumable, noting which examples it saw.

All random numbers of epoch e follow from (seed, e): shuffling, augmentation and dropout need no saved state, so a run
that was killed and resumed equals one that was not, bit for bit on the CPU.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from lightning_fabric.strategies.strategy import Strategy
from rich.table import Table
from torch import Tensor, nn

from stfbnn.adversarial_training import AdversarialTraining
from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, OutputFunction, module_device
from stfbnn.checkpoint import load_checkpoint, prepare_checkpoint, save_checkpoint
from stfbnn.errors import InputError
from stfbnn.launching import launched_fabric
from stfbnn.processes import Processes, naming_lost_ranks
from stfbnn.progress import progress_bar
from stfbnn.provenance import Provenance, attach
from stfbnn.randomness import derive_seed
from stfbnn.training_choices import LossChoice, Objective, OptimizerChoice, Schedule, ScheduleChoice, build_optimizer
from stfbnn.training_loop import EpochRecord, TrainingLoop

__all__ = ["EpochRecord", "TrainRun", "train"]


@dataclass(frozen=True)
class TrainRun:
    """What ``train`` returns.

    Attributes:
        model: The user's model, trained, in eval mode, on the device where it was.
        history: One record an epoch.
        provenance: The examples that shaped the parameters.
        seconds: Of all epochs, those before a resume included.
        chosen_epoch: The epoch whose parameters the model holds: the last, or with ``keep_best`` the best.
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    provenance: Provenance
    seconds: float
    chosen_epoch: int

    def table(self) -> Table:
        """The history, for a terminal."""
        names = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")
        table = Table(*(name.replace("_", " ") for name in names))
        for record in self.history:
            table.add_row(*("–" if value is None else f"{value:.4g}" for value in astuple(record)))
        return table


def train(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    optimizer: OptimizerChoice = "adamw",
    lr: float | None = None,
    weight_decay: float | None = None,
    momentum: float | None = None,
    schedule: ScheduleChoice = "cosine",
    warmup: float = 0.0,
    loss: LossChoice = "auto",
    label_smoothing: float = 0.0,
    val_loader: Iterable[Any] | None = None,
    keep_best: bool = False,
    precision: Any = "32-true",
    accumulate: int = 1,
    clip_norm: float | None = None,
    adversarial: AdversarialTraining | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    strategy: str | Strategy = "auto",
    num_nodes: int = 1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    output: OutputFunction | None = None,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    progress: bool | None = None,
) -> TrainRun:
    """Train a model in place.

    Several processes: started by ``torchrun`` or ``fabric run``, the call takes part as one rank; every rank returns
    the same trained parameters. ``devices=2`` from an ordinary script makes Fabric start the same script again for the
    other rank, so everything before and after the call runs twice. Strategies that fork or spawn a function are
    refused, for they train a copy that is lost. The loader's batch size is per rank; a shard is filled up to equal
    length by repeating examples; validation runs whole on every rank; rank 0 alone writes and reads the checkpoint.
    All ranks draw from the same seed.

    Args:
        model: Called by the rule of ``stfbnn.batches``. A "…-true" precision other than 32 converts it for good.
        loader: Gives batches (inputs, target), or three with the examples' weights, anew at each pass; a sampler's
            ``set_epoch`` is called. The loss of a batch is Σ_n a_n loss_n / B, B its rows.
        epochs: Passes over the loader.
        optimizer: "sgd", "adam", "adamw" or a function from the list of trainable parameters to an optimizer.
        lr: Learning rate; None for the optimizer's default (``build_optimizer``).
        weight_decay: None is 0.
        momentum: For "sgd"; None is 0.9.
        schedule: "cosine" (to 0), "constant" or a function from the fraction of the run to a factor. It moves with
            every step, or with every epoch where the loader has no length.
        warmup: Fraction of the run over which the learning rate rises linearly from 0.
        loss: "auto" (integer targets: cross entropy; float: mean squared error) or a function of (outputs, target), and
            of the weights as the third where the batches have any.
        label_smoothing: Of the cross entropy, in [0, 1).
        val_loader: Loss and accuracy on it are reported after every epoch.
        keep_best: End with the parameters of the lowest validation loss. The validation examples then count as seen,
            for they chose the parameters, and stage two refuses them as held-out data.
        precision: One of Fabric's names, such as "32-true" or "bf16-mixed".
        accumulate: Batches a step. The gradient is that of the mean over all their examples, whatever their sizes.
        clip_norm: Largest Euclidean norm of the gradient; None does not clip.
        adversarial: Learn from every batch as an attacker changes it; loss and accuracy of training are then those under
            attack, of validation those of clean examples. None learns from the batches as they are.
        accelerator: Fabric's name; "auto" takes a GPU where there is one.
        devices: "auto" is 1, or what the launcher says.
        strategy: "auto", "ddp", "ddp_find_unused_parameters_true" or one of Fabric's objects for these.
        num_nodes: Machines; taken from the launcher where that is ``torchrun``.
        seed: Everything random follows from it, but not the model's initial parameters, which are the user's. A
            generator of the loader's own goes on from where it is and is saved with the checkpoint.
        checkpoint: File from which a killed run goes on; written at the start and after epochs. None writes none.
        resume: Go on from the checkpoint where there is one; a finished one gives its result at once.
            False starts anew.
        checkpoint_every: Epochs between checkpoints.
        output: How to get the tensor of predictions from what the model returns, where that is neither a tensor nor
            has ``.logits``.
        target_key: The entry of a mapping that is the target.
        weight_key: The entry of a mapping that holds the examples' weights.
        progress: Show a bar; None shows it on a terminal.

    Returns:
        The run; its provenance is also attached to the model (``stfbnn.provenance.attached``).

    Raises:
        InputError: A setting or a batch is wrong (the first batch of both loaders is tried before training starts), or
            the loss became NaN or infinite.
        CheckpointError: The checkpoint is damaged, belongs to a run with other settings, or cannot be written at all.
        StorageError: A later one cannot be written, such as on a full disk; the one before it is whole.
        LostRankError: Another rank has ended, or cannot be reached.
    """
    _check_settings(
        model,
        loader,
        val_loader,
        keep_best,
        clip_norm,
        adversarial,
        epochs=epochs,
        accumulate=accumulate,
        checkpoint_every=checkpoint_every,
        num_nodes=num_nodes,
    )
    objective, plan = Objective(loss, label_smoothing), Schedule(schedule, warmup)
    derive_seed(seed)
    if checkpoint is not None and getattr(loader, "persistent_workers", False):
        warnings.warn(
            "the loader has persistent_workers=True: its workers keep their random state from epoch to epoch, so a "
            "resumed run does not repeat random augmentations exactly; use persistent_workers=False",
            UserWarning,
            stacklevel=2,
        )
    fabric = launched_fabric(accelerator, devices, strategy, num_nodes, precision)
    processes = Processes(fabric)
    with naming_lost_ranks(processes), _taken_back(model, module_device(model)):
        run = TrainingLoop(
            fabric=fabric,
            model=model,
            loader=loader,
            val_loader=val_loader,
            objective=objective,
            schedule=plan,
            seed=seed,
            epochs=epochs,
            accumulate=accumulate,
            output=output,
            target_key=target_key,
            weight_key=weight_key,
            adversarial=adversarial,
        )
        run.first_look()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise InputError("the model has no parameter with requires_grad=True; there is nothing to train")
        run.set_optimizer(build_optimizer(optimizer, parameters, lr, weight_decay, momentum), clip_norm)
        signature = {
            "stage": "train",
            "seed": seed,
            "epochs": epochs,
            "batches per epoch": run.batches,
            "batch size": getattr(loader, "batch_size", None),
            "optimizer": _name(optimizer),
            "optimizer settings": [_plain(group) for group in run.optimizer.param_groups],
            "schedule": _name(schedule),
            "warmup": warmup,
            "loss": _name(loss),
            "label_smoothing": label_smoothing,
            "keep_best": keep_best,
            "validation": val_loader is not None,
            "precision": str(precision),
            "accumulate": accumulate,
            "clip_norm": clip_norm,
            "processes": fabric.world_size,
            # Only where there is one, so that earlier checkpoints still fit.
            **({} if adversarial is None else {"adversarial": adversarial.describe()}),
            "parameter shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        }
        stored = None
        if checkpoint is not None:
            processes.from_first(lambda: prepare_checkpoint(checkpoint, signature))
        if resume and checkpoint is not None:
            stored = processes.from_first(lambda: load_checkpoint(checkpoint, signature))
        if stored is not None:
            run.restore(stored)

        def save() -> None:
            if checkpoint is not None:
                processes.from_first(lambda: save_checkpoint(checkpoint, run.state(), signature))

        if stored is None:
            save()
        total = None if run.batches is None else epochs * run.batches
        with progress_bar("training", total, progress if fabric.is_global_zero else False) as reporter:
            reporter.advance(len(run.history) * (run.batches or 0))
            for epoch in range(len(run.history) + 1, epochs + 1):
                reporter.describe(f"training, epoch {epoch} of {epochs}")
                run.epoch(epoch, reporter, keep_best)
                if epoch % checkpoint_every == 0 or epoch == epochs:
                    save()
        chosen = run.finish()
    provenance = run.seen.provenance.union(run.selected_on.provenance)
    attach(model, provenance)
    seconds = sum(record.seconds for record in run.history)
    return TrainRun(model, tuple(run.history), provenance, seconds, chosen)


@contextmanager
def _taken_back(model: nn.Module, home: torch.device) -> Iterator[None]:
    """The model at the end where it was, in eval mode."""
    try:
        yield
    finally:
        model.to(home)
        model.eval()


def _check_settings(
    model: Any,
    loader: Any,
    val_loader: Any,
    keep_best: bool,
    clip_norm: float | None,
    adversarial: Any,
    **counts: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, but it is {value!r}")
    if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise InputError(f"clip_norm must be positive, or None for no clipping, but it is {clip_norm}")
    if adversarial is not None and not isinstance(adversarial, AdversarialTraining):
        raise InputError(
            f"adversarial must be an stfbnn.AdversarialTraining, or None, but it is a {type(adversarial).__name__}"
        )
    if keep_best and val_loader is None:
        raise InputError("keep_best=True chooses by the validation loss, so it needs val_loader=")
    for name, value in (("loader", loader), ("val_loader", val_loader)):
        if value is None and name == "val_loader":
            continue
        if isinstance(value, Iterator) or not isinstance(value, Iterable):
            raise InputError(
                f"{name} must give its batches anew at each pass, such as a torch DataLoader or a list of batches, but "
                f"it is a {type(value).__name__}"
            )


def _name(choice: Any) -> str:
    """A choice by name, a function by where it is defined: what a resumed run can compare."""
    if isinstance(choice, str):
        return choice
    owner = choice if hasattr(choice, "__qualname__") else type(choice)
    return f"{owner.__module__}.{owner.__qualname__}"


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer's parameter group as JSON values."""
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params" and isinstance(value, Tensor | float | int | str | bool | tuple | list | None)
    }
