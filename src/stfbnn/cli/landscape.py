"""``stfbnn landscape``: the optima of a network's layers, and which layer to make Bayesian."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output, resumable
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from stfbnn.cli.landscape_sources import Studied

HELP = opt.help_text("""
See which optima the first layer has, beside a middle and the last one, and which layer is worth being Bayesian.

RUN is the folder that `stfbnn train` wrote, or the name of a built-in task (digits-mlp needs no download; with STFBNN_DATA
fashion-mlp, fashion-lenet, cifar-resnet20 and the others of `stfbnn benchmark full`). For a network of your own give --model,
--checkpoint, --data and held-out examples, as for `stfbnn fit`.

Each layer is drawn anew --runs times and retrained alone, all others frozen, until the held-out loss no longer falls. The
tables show how good the optima are, how far apart, how high the loss is between them, and how many labels they tell
differently. With --widths each layer is made Bayesian by itself, with the same prior and budget, and the layers are ranked.

Examples:
    stfbnn landscape digits-mlp
    stfbnn landscape run --runs 8 --widths --ood kmnist/
    stfbnn landscape run --layer features.0 --layer classifier
""")

_STUDY = "Study"


def landscape(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Folder of `stfbnn train`, or a task.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results. Default: RUN/landscape.", show_default=False),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A layer's name; may be repeated. Default: first, middle, last.", rich_help_panel=_STUDY),
    ] = None,
    runs: Annotated[int, typer.Option(help="Retrainings of each layer.", rich_help_panel=_STUDY)] = 6,
    start: Annotated[
        str, typer.Option(help="reinitialize or statistics (of the trained weights).", rich_help_panel=_STUDY)
    ] = "reinitialize",
    epochs: Annotated[int, typer.Option(help="Of a retraining, at most.", rich_help_panel=_STUDY)] = 50,
    patience: Annotated[int, typer.Option(help="Epochs without gain.", rich_help_panel=_STUDY)] = 3,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Adam's. Default: by the layer's size.", rich_help_panel=_STUDY, show_default=False),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="c in loss + c/2 |w|².", rich_help_panel=_STUDY)] = 0.0,
    examples: Annotated[int, typer.Option(help="Examples on which paths are computed.", rich_help_panel=_STUDY)] = 2000,
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Fit curves between optima.", rich_help_panel=_STUDY)
    ] = True,
    widths: Annotated[
        bool, typer.Option("--widths", help="Make each layer Bayesian too, and rank them.", rich_help_panel=_STUDY)
    ] = False,
    width_epochs: Annotated[int, typer.Option(help="Of each layer's inference.", rich_help_panel=_STUDY)] = 5,
    temperature: Annotated[float, typer.Option(help="T of each layer's inference.", rich_help_panel=_STUDY)] = 0.1,
    ood: Annotated[
        list[str] | None,
        typer.Option(help="--widths: data unlike the training data; may be repeated.", rich_help_panel=opt.DATA),
    ] = None,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    task: opt.Task = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    val_data: Annotated[
        str | None, typer.Option(help="Held-out data from elsewhere.", rich_help_panel=opt.DATA, show_default=False)
    ] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(help="Share or number of unseen examples.", rich_help_panel=opt.DATA, show_default=False),
    ] = None,
    hold_out_of: Annotated[str, typer.Option(help="train or test.", rich_help_panel=opt.DATA)] = "train",
    batch_size: opt.BatchSize = 128,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    threads: Annotated[int, typer.Option(help="Of the computation.", rich_help_panel=opt.RUN)] = 2,
    resume: opt.Resume = True,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, study, draw, print."""
    from stfbnn.benchmark.suites import built_in_tasks  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.cli import landscape_sources, stage_two  # noqa: PLC0415
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.optima.retraining import RetrainingOptions  # noqa: PLC0415
    from stfbnn.optima.study import landscape as study  # noqa: PLC0415
    from stfbnn.report import save_figure  # noqa: PLC0415
    from stfbnn.report.landscape_plots import landscape_figure  # noqa: PLC0415
    from stfbnn.threads import threads as using_threads  # noqa: PLC0415

    out = Output(as_json)
    built_in = run is not None and run in built_in_tasks() and not Path(run).is_dir()
    folder = output or (
        None if run is None else Path(f"landscape-{run}" if built_in else run) / ("" if built_in else "landscape")
    )
    if folder is None:
        raise InputError("say where to put the results with --output")
    # Of any type, for the library checks what they say.
    chosen: dict[str, Any] = {"runs": runs, "start": start, "epochs": epochs, "patience": patience}
    options = RetrainingOptions(learning_rate=learning_rate, weight_decay=weight_decay, **chosen)
    chosen_device = opt.pick_device(device)
    with using_threads(threads), resumable(folder):
        if built_in:
            assert run is not None  # noqa: S101 - its name was found
            studied = landscape_sources.of_task(run, seed, folder, threads)
        else:
            request = stage_two.Request(
                run=None if run is None else Path(run),
                checkpoint=checkpoint,
                factory=model,
                arguments=opt.parse_object("--model-args", model_args),
                data=opt.data_choice(data, kind, target, task, image_size, split, limit),
                val_data=val_data,
                share=None if hold_out is None else opt.parse_share("--hold-out", hold_out),
                share_of=hold_out_of,
                mean=opt.parse_numbers("--mean", mean),
                std=opt.parse_numbers("--std", std),
                seed=seed,
            )
            ready = stage_two.prepare(request, out.note)
            studied = landscape_sources.of_run(ready, ood or [], batch_size)
        studied.network.to(chosen_device)
        out.note(studied.about)
        found = study(
            studied.network,
            studied.train,
            studied.held_out,
            layers=layer or "auto",
            options=options,
            examples=examples,
            curves=curves,
            seed=seed,
            checkpoint=folder / "retraining",
            resume=resume,
        )
        result: dict[str, Any] = {"output": folder, **plain(found.as_dict())}
        write_json(folder / "landscape.json", plain(found.as_dict()))
        save_figure(landscape_figure(found, studied.about), folder / "landscape.png")
        for table in found.tables():
            out.show(table)
        out.show(found.verdict())
        if widths:
            result["widths"] = _widths(out, studied, folder, width_epochs, temperature, seed)
    out.show(f"Wrote {folder / 'landscape.json'} and {folder / 'landscape.png'}")
    out.finish(result)


def _widths(out: Output, studied: Studied, folder: Path, epochs: int, temperature: float, seed: int) -> Any:
    """Make each layer Bayesian by itself, and rank them."""
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.optima.widths import compare_layers  # noqa: PLC0415

    compared = compare_layers(
        studied.network,
        studied.train,
        studied.held_out,
        test_loader=studied.test,
        outside=studied.outside,
        epochs=epochs,
        temperature=temperature,
        seed=seed,
        checkpoint=folder / "widths",
    )
    content = plain(compared.as_dict())
    write_json(folder / "widths.json", content)
    out.show(compared.table())
    out.show(compared.verdict())
    out.show(f"Wrote {folder / 'widths.json'}")
    return content
