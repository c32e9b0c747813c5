"""``stfbnn benchmark``: methods side by side on tasks, with their cost, and a page to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Interrupted, Output
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from stfbnn.benchmark.suites import Suite

OWN = "own"

HELP = opt.help_text("""
Compare what a user could pick: the trained network, temperature scaling, label smoothing, dropout, SWAG, a deep ensemble,
Laplace, fully Bayesian networks, a Bayesian last layer, and a Bayesian first layer.

SUITE is `smoke` (seconds), `quick` (under ten minutes on two cores), `full` (a night), or `own` for your --data and --model.
Every method chooses its hyper-parameters on held-out data among the same number of settings; test data are for the figures
alone. Each result is kept when it is done: a run that was stopped goes on when the same command is run again. At the end
report.html (one file, works offline) and report.md are written.

With --jobs, or on the workers of a Dask --scheduler, every task and seed is in a process of its own: what it dies of is told
after --retries more attempts, and costs the others nothing.

Examples:
    stfbnn benchmark quick --jobs 2
    stfbnn benchmark full --scheduler tcp://host:8786
    stfbnn benchmark full --task fashion-mlp --method stf-bnn --method deep-ensemble
    stfbnn benchmark own --data table.csv --model stfbnn.models:mlp --epochs 50
    stfbnn benchmark quick --report
""")


def benchmark(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="smoke, quick, full or own.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results.", show_default="benchmark-SUITE")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side.", rich_help_panel=opt.RUN)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each.", rich_help_panel=opt.RUN)] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Address of a Dask scheduler, such as tcp://host:8786, whose workers run everything in place of this machine.",
            rich_help_panel=opt.RUN,
            show_default=False,
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            help="How often what failed is tried again, with --jobs or --scheduler.",
            rich_help_panel=opt.RUN,
        ),
    ] = 2,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; write the report from what is there.")] = False,
    data: opt.Source = None,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    epochs: Annotated[int, typer.Option(help="own: epochs of stage one.", rich_help_panel=opt.DATA)] = 30,
    fit_epochs: Annotated[int, typer.Option(help="own: epochs of stage two.", rich_help_panel=opt.DATA)] = 10,
    hold_out: Annotated[
        float,
        typer.Option(help="own: share of the training data by which everything is chosen.", rich_help_panel=opt.DATA),
    ] = 0.2,
    as_json: opt.AsJson = False,
) -> None:
    """Run what is missing, write the report, print."""
    out = Output(as_json)
    out.note("Loading torch …")
    from stfbnn.benchmark.records import load_records  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.benchmark.reporting import write_benchmark_report  # noqa: PLC0415
    from stfbnn.benchmark.runner import run_units, units_of  # noqa: PLC0415

    folder = output or Path(f"benchmark-{suite}")
    failures: list[str] = []
    skipped: dict[str, str] = {}
    if not report:
        chosen = _suite(suite, data, model, opt.parse_object("--model-args", model_args), epochs, fit_epochs, hold_out)
        units, skipped = units_of(chosen, folder, task or (), method or (), seed or (), threads)
        for name, reason in skipped.items():
            out.note(f"skipped {name}: {reason}")
        done = sum(unit.done(name) for unit in units for name in unit.methods)
        total = sum(len(unit.methods) for unit in units)
        out.note(f"{total} results to come, {done} of them are there; they are kept in {folder}")
        try:
            failures = run_units(units, jobs, scheduler=scheduler, retries=retries)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; what is done is kept: run the same command again") from error
    for line in failures:
        out.note(f"failed: {line}")
    records = load_records(folder)
    written = write_benchmark_report(folder, records, f"stfbnn benchmark {suite}", f"Benchmark: {suite}")
    for table in written.tables:
        out.show(table)
    for path in written.files:
        out.show(f"Wrote {path}")
    out.finish(
        {
            "suite": suite,
            "records": len(records),
            "failures": failures,
            "skipped": skipped,
            "claims": [claim.__dict__ for claim in written.claims],
            "files": written.files,
        }
    )


def _suite(
    name: str,
    data: str | None,
    model: str | None,
    arguments: dict[str, object],
    epochs: int,
    fit_epochs: int,
    share: float,
) -> Suite:
    """The suite that was named, or one task of the user's own."""
    from stfbnn.benchmark.suites import Suite, suite_named  # noqa: PLC0415
    from stfbnn.benchmark.tasks import Task  # noqa: PLC0415

    if name != OWN:
        if data is not None or model is not None:
            raise InputError(f"--data and --model are for the suite {OWN!r}, but the suite is {name!r}")
        return suite_named(name)
    if data is None or model is None:
        raise InputError(f"the suite {OWN!r} needs --data and --model (package.module:factory)")
    task = Task(
        name=OWN,
        source=data,
        network=model,
        seeds=(0, 1, 2),
        epochs=epochs,
        options={"optimizer": "adam", "lr": 1e-3},
        fit_epochs=fit_epochs,
        held_out=share,
        arguments=arguments,
    )
    return Suite(OWN, "the user's own", 3, (task,))
