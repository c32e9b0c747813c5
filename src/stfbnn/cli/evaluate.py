"""``stfbnn evaluate``: the trained network, its temperature-scaled self and the Bayesian network side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output
from stfbnn.errors import InputError

HELP = opt.help_text("""
Compare the trained network, temperature scaling and the Bayesian network on test data.

RUN is the folder that `stfbnn fit` wrote. Temperature scaling is fitted on the run's held-out data: it is the competitor that
costs nothing, so a Bayesian network should beat it, or give something that it cannot: epistemic uncertainty, which --ood
puts to the test. Each --ood names data of another kind; the AUROC says how well the entropy, and its epistemic part, tell
them from the test data (1 always, 0.5 by chance).

Examples:
    stfbnn evaluate run
    stfbnn evaluate run --ood kmnist-test --ood fashion-mnist --plots figs
    stfbnn evaluate run --data labelled.csv --json
""")


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(help="Data unlike the training data; may be repeated.", rich_help_panel=opt.DATA),
    ] = None,
    batch_size: opt.BatchSize = 256,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    samples: opt.Samples = 32,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for reliability and entropy pictures.", show_default=False)
    ] = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, compare, draw, print."""
    from stfbnn.cli import fitted, showing, sources  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.cli.record import DataChoice  # noqa: PLC0415
    from stfbnn.cli.seen import note_seen  # noqa: PLC0415
    from stfbnn.evaluation.evaluate import contenders, side_by_side  # noqa: PLC0415

    out = Output(as_json)
    choice = opt.data_choice(data, kind, target, None, image_size, split, limit)
    if choice is None and limit is not None:
        raise InputError("--limit says how much of --data to read, which is missing")
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    record = found.record
    if ood and found.bnn.require_fitted().name != "categorical":
        raise InputError(
            "--ood compares entropies of the class, which only a categorical likelihood has; leave it away"
        )
    part = sources.test_part(record) if choice is None else sources.read_like(record, choice)
    if part.targets is None:
        raise InputError("the data have no targets to compare with; for unlabelled data there is `stfbnn predict`")
    strange = {
        Path(name).name: sources.read_like(record, DataChoice(name, limit=limit), classes=False) for name in ood or []
    }
    if len(strange) < len(ood or []):
        raise InputError("two --ood have the same last name; rename one of the folders")
    held = sources.held_out_part(record)
    out.note(f"{len(part):,} test examples, {0 if held is None else len(held):,} held out, {samples} posterior draws")
    held_batches = None if held is None else sources.batches(held, record, batch_size)
    note_seen(out, found, sources.batches(part, record, batch_size), held_batches)
    side = side_by_side(
        contenders(found.model, found.bnn, held_batches, samples=samples, seed=seed),
        sources.batches(part, record, batch_size),
        {name: sources.batches(replace(other, targets=None), record, batch_size) for name, other in strange.items()},
    )
    out.show(showing.figures_table(side, f"{len(part):,} test examples"))
    for name in strange:
        out.show(showing.outside_table(side, name))
    for method, note in side.notes.items():
        out.show(f"{method}: {note}")
    if held is None and record.task == "classification":
        out.show("No temperature scaling: it needs held-out data, and this run has none.")
    drawn = [] if plots is None else showing.pictures(side, plots)
    for path in drawn:
        out.show(f"Wrote {path}")
    bnn = found.bnn
    out.finish(
        {
            "run": run,
            "examples": len(part),
            "temperature": bnn.temperature,
            "predictive_temperature": bnn.predictive_temperature,
            **showing.as_json(side),
            "plots": drawn,
        }
    )
