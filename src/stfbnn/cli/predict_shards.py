"""``stfbnn predict-shards``: predictions for data of any size, into a folder that survives any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output
from stfbnn.errors import InputError

HELP = opt.help_text("""
Predict for data that are too many for one file or one sitting.

RUN is the folder that `stfbnn fit` wrote. DATA is a folder (or one file) of parquet files, or of WebDataset tar files, whose
rows are inputs as the run's own are, and are normalised as they were: columns of numbers, a column of lists of numbers or of
images; members .npy or images. They are read as the network asks for them, so memory does not grow with the data.

The output folder gets one parquet file for each file of DATA, or several of --rows-per-file rows; sorted by name they hold
the rows in the order of DATA. After a kill, run the same command again: what is finished stays, and every row is there exactly
once. Under torchrun each process takes its share of the files.

The columns are row (its number in the file of DATA) and what is kept; for classes and labels label (the class's number), probs,
confidence, entropy, aleatoric and epistemic (these three in nats); for numbers and counts mean, std, aleatoric_std and
epistemic_std, in the target's unit.

Examples:
    stfbnn predict-shards run --data shards/ -o predictions/ --keep id
    stfbnn predict-shards run --data photos/ -o predictions/ --keep __key__ --samples 128 --on-error skip
    torchrun --no-python --nproc-per-node 4 stfbnn predict-shards run --data shards/ -o predictions/
""")


def predict_shards(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    data: Annotated[Path, typer.Option(help="Folder or file of parquet or WebDataset tar.", rich_help_panel=opt.DATA)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Column to pass through, such as an identifier (repeatable); ID=NEW renames it. Of tar files: __key__, or "
            "an extension (cls, txt, json).",
            rich_help_panel=opt.DATA,
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Column of parquet files that is no input. Default: the run's own target, where the files have it.",
            rich_help_panel=opt.DATA,
            show_default=False,
        ),
    ] = None,
    rows_per_file: Annotated[
        int, typer.Option(help="Rows of an output file, at most.", rich_help_panel=opt.RUN)
    ] = 10_000,
    on_error: Annotated[
        str,
        typer.Option(help="raise, or skip to leave damaged files out and list them.", rich_help_panel=opt.RUN),
    ] = "raise",
    workers: Annotated[int, typer.Option(help="Files that are read at once.", rich_help_panel=opt.RUN)] = 1,
    batch_size: opt.BatchSize = 256,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    samples: opt.Samples = 32,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Keep what is finished already.", rich_help_panel=opt.RUN),
    ] = True,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, predict, print."""
    from stfbnn import bulk  # noqa: PLC0415 - it imports torch, which takes seconds
    from stfbnn.bulk.recognise import file_source  # noqa: PLC0415
    from stfbnn.cli import fitted  # noqa: PLC0415

    out = Output(as_json)
    if on_error not in ("raise", "skip"):
        raise InputError(f"--on-error must be raise or skip, but it is {on_error!r}")
    names = dict(_renamed(text) for text in keep or ())
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    shape = found.record.input_shape
    source = file_source(
        data,
        inputs=found.record.columns,
        target=target or found.record.data.target,
        shape=shape if len(shape) != 1 else None,
        image_size=(shape[1], shape[2]) if len(shape) == 3 else None,
        transform=bulk.Normalise(found.record.mean, found.record.std),
    )
    done = bulk.predict_shards(
        found.bnn,
        source,
        output,
        samples=samples,
        seed=seed,
        rows_per_shard=rows_per_file,
        batch_size=batch_size,
        keep=names,
        workers=workers,
        on_error="skip" if on_error == "skip" else "raise",
        resume=resume,
    )
    missing = done.missing()
    before = f" ({done.rows_before:,} were there already)" if done.rows_before else ""
    out.show(f"{done.rows:,} rows were predicted in {done.seconds:.1f} s{before}; they are in {output}")
    for one in done.skipped:
        out.note(f"warning: {one.shard} was left out: {one.reason}")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        out.show(f"not finished yet: {', '.join(missing[:5])}{more}")
    out.finish(
        {
            "output": output,
            "rows": done.rows,
            "rows_before": done.rows_before,
            "files": [path.name for path in done.files()],
            "skipped": [{"file": one.shard, "reason": one.reason} for one in done.skipped],
            "missing": missing,
            "seconds": done.seconds,
            "rank": done.rank,
            "world_size": done.world_size,
        }
    )


def _renamed(text: str) -> tuple[str, str]:
    name, equals, called = text.partition("=")
    if not name or (equals and not called):
        raise InputError(f"--keep takes COLUMN or COLUMN=NEW-NAME, but it is {text!r}")
    return name, called or name
