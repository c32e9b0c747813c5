"""``stfbnn predict``: classes, probabilities and uncertainties for new data, into a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output
from stfbnn.errors import InputError

HELP = opt.help_text("""
Predict for new data, and write one row an example, in the order of the data.

RUN is the folder that `stfbnn fit` wrote. Targets may be there or not; they are not looked at. The file's kind follows
from its suffix: .csv, .jsonl, .parquet or .npz. It appears whole or not at all.

For classes the columns are class, confidence, entropy, aleatoric, epistemic (these three in nats), and probability_NAME for
each class; for numbers and counts mean, std, aleatoric_std and epistemic_std, in the target's unit; for labels that are 0
or 1 label, probability, entropy, aleatoric and epistemic.

Examples:
    stfbnn predict run --data new.csv -o predictions.csv
    stfbnn predict run --data photos/ -o predictions.parquet --samples 128
    stfbnn predict run -o predictions.jsonl      (the run's own test part)
""")


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .csv, .jsonl, .parquet or .npz.")],
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    batch_size: opt.BatchSize = 256,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    samples: opt.Samples = 32,
    at_mean: Annotated[
        bool,
        typer.Option(
            "--at-mean",
            help="One pass at the posterior's mean instead: deterministic, without epistemic uncertainty.",
            rich_help_panel=opt.INFERENCE,
        ),
    ] = False,
    rule: Annotated[
        Path | None,
        typer.Option(
            help="Rule that `stfbnn abstain` wrote: adds the column abstain, 1 where no answer is to be trusted. --samples and "
            "--seed are then the rule's.",
            show_default=False,
        ),
    ] = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, predict, write, print."""
    from stfbnn.cli import fitted, prediction_files, sources  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.cli.rule_files import RuleFile  # noqa: PLC0415
    from stfbnn.prediction import predict as run_prediction  # noqa: PLC0415

    out = Output(as_json)
    prediction_files.check_suffix(output)
    choice = opt.data_choice(data, kind, target, None, image_size, split, limit)
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    part = sources.test_part(found.record) if choice is None else sources.read_like(found.record, choice)
    if choice is None and limit is not None:
        raise InputError("--limit says how much of --data to read, which is missing")
    part = replace(part, targets=None)
    decided = None if rule is None else RuleFile.read(rule, found.bnn)
    if decided is not None:
        if at_mean:
            raise InputError(
                "--rule and --at-mean exclude each other: the rule is for the average over posterior draws"
            )
        samples, seed = decided.rule.samples, decided.seed
    loader = sources.batches(part, found.record, batch_size)
    prediction = run_prediction(
        found.bnn, loader, samples=samples, seed=seed, weights="mean" if at_mean else "sample", has_targets=False
    )
    columns = prediction_files.columns_of(prediction, found.record.classes)
    if decided is not None:
        columns["abstain"] = prediction.abstain(decided.rule).long().numpy()
    prediction_files.write(columns, output)
    means = {name: float(columns[name].mean()) for name in prediction_files.SUMMARISED if name in columns}
    out.show(
        f"{len(prediction):,} predictions are in {output} ("
        + ", ".join(f"mean {name} {value:.4g}" for name, value in means.items())
        + ")"
    )
    abstained = None if decided is None else int(columns["abstain"].sum())
    if abstained is not None:
        out.show(f"{abstained:,} of them abstain")
    out.finish(
        {"output": output, "count": len(prediction), "columns": list(columns), "means": means, "abstained": abstained}
    )
