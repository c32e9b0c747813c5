"""``stfbnn merge``: the plain network with the posterior's mean in its first layer, as a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output
from stfbnn.errors import InputError

HELP = opt.help_text("""
Write the weights of a plain network that computes what the posterior computes at its mean.

RUN is the folder that `stfbnn fit` wrote. The file is a state dict for the network's own class: it needs no stfbnn and costs
no more than the trained network, and knows nothing of its uncertainty. The posterior still belongs to the trained network's
own weights, so keep those. A predictive temperature is not a part of the file: where one was chosen, divide the logits by it.

Example:
    stfbnn merge run -o merged.safetensors
""")


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .safetensors, not there yet.")],
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, merge, write, print."""
    from stfbnn.cli import fitted  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.merging import merge as run_merge  # noqa: PLC0415
    from stfbnn.weights_file import save_weights  # noqa: PLC0415

    out = Output(as_json)
    if output.suffix != ".safetensors":
        raise InputError(f"the weights are written as safetensors, so {output} must end in .safetensors")
    if output.exists():
        # It may be the trained network's own weights, without which the posterior is lost.
        raise InputError(f"{output} exists; choose another name, or delete it first")
    found = fitted.load_run(run, model, model_args, checkpoint, "cpu")
    save_weights(run_merge(found.bnn), output)
    tau = found.bnn.predictive_temperature
    out.show(f"the weights of the merged {type(found.model).__name__} are in {output}")
    if tau != 1:
        out.show(f"divide its logits by the predictive temperature, {tau:.6g}")
    out.finish({"output": output, "layer": found.bnn.layer_name, "predictive_temperature": tau})
