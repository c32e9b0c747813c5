"""``stfbnn train``: stage one, an ordinary network, with some data held out for stage two before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli import ranks
from stfbnn.cli import record as rec
from stfbnn.cli.output import Output, resumable
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from torch import nn

HELP = opt.help_text("""
Train an ordinary network (stage one), for those who have none yet.

A part of the training data is held out before training starts; `stfbnn fit` chooses by it, and it is only worth something
because the network has never seen it. What was done is written to run.json in the output folder, where `fit` picks it up.
Run again after a kill, the same command goes on from the last epoch, with the same result.

Started by torchrun, each process learns from its share of the data, with batches of --batch-size of its own; the output
folder is one that all of them see.

Examples:
    stfbnn train --data digits -o run
    stfbnn train --data photos/ --image-size 64 --model my_nets:cnn -o run
    stfbnn train --data table.csv --target price -o run
    stfbnn train --data cifar10/ --model stfbnn.models:resnet20 \\
        --optimizer sgd --lr 0.1 --epochs 100 -o run
    torchrun --nproc-per-node 4 --no-python stfbnn train --data photos/ -o run

Built in are stfbnn.models:mlp (also for tables and numbers to predict), :lenet and :resnet20.
""")


def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the weights, the record and the checkpoint.")
    ],
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    task: opt.Task = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    hold_out: Annotated[
        str,
        typer.Option(
            help="Share or number of training examples to hold out for stage two; 0 for none.",
            rich_help_panel=opt.DATA,
        ),
    ] = "0.1",
    batch_size: opt.BatchSize = 128,
    model: opt.Factory = "stfbnn.models:mlp",
    model_args: opt.FactoryArguments = "{}",
    epochs: Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel="Training")] = 20,
    optimizer: Annotated[str, typer.Option(help="adamw, adam or sgd.", rich_help_panel="Training")] = "adamw",
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate. Default: 0.001, for sgd 0.05.", rich_help_panel="Training"),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", rich_help_panel="Training")] = 0.0,
    schedule: Annotated[str, typer.Option(help="cosine or constant.", rich_help_panel="Training")] = "cosine",
    warmup: Annotated[
        float, typer.Option(help="Share of the run in which the rate rises.", rich_help_panel="Training")
    ] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(help="Of the cross entropy, in [0, 1).", rich_help_panel="Training")
    ] = 0.0,
    accumulate: Annotated[int, typer.Option(help="Batches a step.", rich_help_panel="Training")] = 1,
    clip_norm: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient.", rich_help_panel="Training")
    ] = None,
    adversarial: Annotated[
        float | None,
        typer.Option(
            help="Learn from images attacked within this distance of every pixel, such as 0.03; pixels lie in 0 to 1.",
            rich_help_panel="Training",
            show_default=False,
        ),
    ] = None,
    adversarial_steps: Annotated[int, typer.Option(help="Of each such attack.", rich_help_panel="Training")] = 7,
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, 16-mixed, ….", rich_help_panel="Training")
    ] = "32-true",
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    devices: opt.Devices = "auto",
    num_nodes: opt.NumNodes = 1,
    strategy: opt.Strategy = "auto",
    resume: opt.Resume = True,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, train, write the run's folder, print."""
    from stfbnn import factories  # noqa: PLC0415 - it imports torch, which takes seconds
    from stfbnn.cli import networks, sources, stage_one  # noqa: PLC0415
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.randomness import seeded  # noqa: PLC0415
    from stfbnn.training import train as run_training  # noqa: PLC0415
    from stfbnn.weights_file import save_weights  # noqa: PLC0415

    choice = opt.data_choice(data, kind, target, task, image_size, split, limit)
    if choice is None or model is None:
        raise InputError("say what to train on with --data: a file, a folder, or 'digits'")
    share = opt.parse_share("--hold-out", hold_out)
    held = rec.HoldOut(share, seed) if share else None
    arguments = opt.parse_object("--model-args", model_args)
    numbers = opt.parse_numbers("--mean", mean), opt.parse_numbers("--std", std)
    training: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "label_smoothing": label_smoothing,
        "accumulate": accumulate,
        "clip_norm": clip_norm,
        "precision": precision,
        "adversarial": adversarial,
        "adversarial_steps": adversarial_steps,
    }
    group = ranks.join(device, devices, num_nodes, strategy, precision)
    if group.count > 1:
        training["ranks"] = group.count
    out = Output(as_json, silent=not group.first)

    def prepared() -> tuple[sources.Sources, nn.Module, rec.Record]:
        parts = sources.divide(sources.read(choice), held)
        with seeded(seed, "model"):
            network, given = factories.build(model, arguments, sources.offered(parts))
        weights = rec.ModelChoice(model, given, str(output / rec.WEIGHTS))
        record = sources.record_of(choice, held, parts, numbers, weights)
        return parts, network, replace(record, training=training)

    parts, network, record = group.by_each(prepared)
    group.require_same("data", (record.train_digest, record.held_out_digest))
    out.note(parts.summary())

    def recorded() -> None:
        if resume:
            record.refuse_other(output / rec.TRAIN_RECORD)
        record.write(output / rec.TRAIN_RECORD)

    group.by_first(recorded)
    checkpoint = output / rec.TRAIN_CHECKPOINT
    options = stage_one.training_options(record)
    with resumable(checkpoint):
        run = run_training(
            network,
            sources.batches(parts.train, record, batch_size, shuffle=True),
            val_loader=None if parts.held_out is None else sources.batches(parts.held_out, record, batch_size),
            seed=seed,
            checkpoint=checkpoint,
            resume=resume,
            **group.settings,
            **options,
        )
    epochs_done = [vars(one) for one in run.history]

    def saved() -> None:
        save_weights(network, output / rec.WEIGHTS)
        networks.save_seen(run.provenance, output / rec.SEEN)
        write_json(output / rec.HISTORY, plain({"seconds": run.seconds, "epochs": epochs_done}))

    group.by_first(saved)
    out.show(run.table())
    out.show(f"\nThe network is in {output / rec.WEIGHTS}; go on with: stfbnn fit {output}")
    out.finish(
        {
            "output": output,
            "weights": output / rec.WEIGHTS,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "examples": len(parts.train),
            "held_out": 0 if parts.held_out is None else len(parts.held_out),
            "last_epoch": epochs_done[-1],
            "seconds": run.seconds,
        }
    )
    group.leave()
