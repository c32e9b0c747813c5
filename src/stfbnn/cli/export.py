"""``stfbnn export``: a run's averaged predictions as one file for another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output

HELP = opt.help_text("""
Write a network's averaged predictions to one file that runs without this library.

RUN is the folder that `stfbnn fit` wrote. The file holds the network once and its first layer under each posterior draw. It
takes batches of any size, and returns what `stfbnn predict` computes from the same draws: for classes probs, entropy,
aleatoric and epistemic (these three in nats); for numbers mean, std and the variances aleatoric and epistemic. It is run and
compared with PyTorch before it appears.

Inputs are to be normalised as in training: the file's metadata hold input_mean and input_std, and the names of the classes.

Examples:
    stfbnn export run -o model.onnx
    stfbnn export run -o model.onnx --samples 64 --layout loop
    stfbnn export run -o model.pt2 --format torch     (for torch.export.load)
""")

# Rows of the example by which the file is tried.
_ROWS = 4


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, or .pt2 for torch.")],
    format: Annotated[  # noqa: A002 - the option's name
        str, typer.Option(help="onnx, or torch.", rich_help_panel=opt.RUN)
    ] = "onnx",
    samples: opt.Samples = 32,
    layout: Annotated[
        str,
        typer.Option(
            help="stacked: the network once, on all draws side by side. loop: once a draw, more operations, less "
            "memory. auto: stacked where the network allows it.",
            rich_help_panel=opt.RUN,
        ),
    ] = "auto",
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    seed: opt.Seed = 0,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, export, print."""
    import torch  # noqa: PLC0415 - takes seconds

    from stfbnn.cli import fitted  # noqa: PLC0415 - imports torch
    from stfbnn.deployment import export as export_to  # noqa: PLC0415
    from stfbnn.randomness import generator  # noqa: PLC0415

    out = Output(as_json)
    found = fitted.load_run(run, model, model_args, checkpoint, "cpu")
    record = found.record
    # Inputs are normalised, so these are like them; the data themselves need not be here.
    example = torch.randn(_ROWS, *record.input_shape, generator=generator(0, "example"))
    metadata = {"input_mean": json.dumps(record.mean), "input_std": json.dumps(record.std)}
    if record.classes is not None:
        metadata["classes"] = json.dumps(record.classes)
    kind: Any = format
    how: Any = layout
    done = export_to(found.bnn, output, example, samples=samples, seed=seed, format=kind, layout=how, metadata=metadata)
    tried = "onnxruntime is not installed: not run" if done.difference is None else f"differs by {done.difference:.1e}"
    out.show(
        f"{output}: {done.size:,} bytes, {done.samples} draws ({done.layout}); takes {', '.join(done.inputs)}, gives "
        f"{', '.join(done.outputs)}; against PyTorch: {tried}"
    )
    out.finish(
        {
            "output": output,
            "format": done.format,
            "samples": done.samples,
            "layout": done.layout,
            "inputs": done.inputs,
            "outputs": done.outputs,
            "size": done.size,
            "difference": done.difference,
        }
    )
