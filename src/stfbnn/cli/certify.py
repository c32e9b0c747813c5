"""``stfbnn certify``: a bound of the error on unseen examples, and what the confidence tends to far from the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output, resumable
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from stfbnn.cli.fitted import FittedRun
    from stfbnn.data import Split
    from stfbnn.guarantees.certificate import RiskCertificate

HELP = opt.help_text("""
Certify an upper bound of the error on unseen examples (PAC-Bayes), and see what the confidence tends to far from the data.

RUN is the folder that `stfbnn fit` wrote. The bound is on the run's held-out part, or on --data: examples that neither stage
one nor the prior saw, which is checked. A posterior that was inferred for prediction is often far from its prior, and then
its bound says nothing; with --fit another one is fitted on the certified examples, with the bound itself as its objective and
a prior around the trained weights. Several --prior-std are tried, and the bound pays for the choice.

Examples:
    stfbnn certify run
    stfbnn certify run --fit --prior-std 0.01 --prior-std 0.03 --epochs 10
    stfbnn certify run --data labelled.npz --far-field 100
""")

_BOUND = "Bound"


def certify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results. Default: RUN/certificate.", show_default=False),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit a posterior with the bound as its objective.", rich_help_panel=_BOUND)
    ] = False,
    prior_std: Annotated[
        list[float] | None,
        typer.Option(help="--fit: of the prior; may be repeated. Default: 0.01 and 0.03.", rich_help_panel=_BOUND),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="--fit: passes over the certified examples.", rich_help_panel=_BOUND)
    ] = 10,
    delta: Annotated[float, typer.Option(help="Probability that the bound fails.", rich_help_panel=_BOUND)] = 0.025,
    delta_monte_carlo: Annotated[
        float, typer.Option(help="And that its estimate does.", rich_help_panel=_BOUND)
    ] = 0.025,
    passes: Annotated[int, typer.Option(help="Weight draws for each example.", rich_help_panel=_BOUND)] = 1,
    allow_invalid: Annotated[
        bool,
        typer.Option(
            "--allow-invalid", help="Show the number where it is no certificate, too.", rich_help_panel=_BOUND
        ),
    ] = False,
    far_field: Annotated[
        int, typer.Option(help="Directions of test examples, and as many random ones; 0 for none.")
    ] = 0,
    draws: Annotated[int, typer.Option(help="--far-field: of the weights.")] = 1000,
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    batch_size: opt.BatchSize = 128,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    resume: opt.Resume = True,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, certify, print."""
    from stfbnn.cli import fitted, sources  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.guarantees.risk_certificate import risk_certificate  # noqa: PLC0415

    out = Output(as_json)
    choice = opt.data_choice(data, kind, target, None, image_size, split, limit)
    if prior_std and not fit:
        raise InputError("--prior-std belongs to --fit")
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    part = sources.held_out_part(found.record) if choice is None else sources.read_like(found.record, choice)
    if part is None or part.targets is None:
        raise InputError("there are no labelled examples to certify on: give --data, or train with --hold-out")
    folder = output or run / "certificate"
    options: dict[str, Any] = {"delta": delta, "delta_monte_carlo": delta_monte_carlo, "passes": passes, "seed": seed}
    options["allow_invalid"] = allow_invalid
    out.note(f"{len(part):,} examples to certify on")
    result: dict[str, Any] = {"output": folder}
    if fit:
        with resumable(folder):
            certificate, result["fits"] = _fitted(
                out, found, part, folder, prior_std or [0.01, 0.03], epochs, batch_size, resume, options
            )
    else:
        certificate = risk_certificate(found.bnn, sources.batches(part, found.record, batch_size), **options)
    out.show(certificate.table())
    out.show(certificate.verdict())
    result["certificate"] = certificate.as_dict()
    if far_field:
        result["far_field"] = _far_field(out, found, folder, far_field, draws, seed)
    write_json(folder / "certificate.json", plain(result))
    out.show(f"Wrote {folder / 'certificate.json'}")
    out.finish(result)


def _fitted(
    out: Output,
    found: FittedRun,
    part: Split,
    folder: Path,
    scales: list[float],
    epochs: int,
    batch_size: int,
    resume: bool,
    options: dict[str, Any],
) -> tuple[RiskCertificate, list[dict[str, Any]]]:
    """The best certificate over the prior's scales, each paying for the choice, and what was tried."""
    from stfbnn.artifact import save  # noqa: PLC0415 - they import torch
    from stfbnn.cli import sources  # noqa: PLC0415
    from stfbnn.conversion import bayesianize  # noqa: PLC0415
    from stfbnn.data.loader import normalise  # noqa: PLC0415
    from stfbnn.guarantees.fit_bound import fit_bound  # noqa: PLC0415
    from stfbnn.guarantees.risk_certificate import risk_certificate  # noqa: PLC0415
    from stfbnn.prior import Normal  # noqa: PLC0415

    record, tried = found.record, []
    example = normalise(part.inputs[:2], record.mean, record.std)
    best: RiskCertificate | None = None
    for scale in scales:
        prior = Normal(std=scale, center="pretrained")
        bnn = bayesianize(found.model, example, layer=found.bnn.layer_name, prior=prior)
        run = fit_bound(
            bnn,
            sources.batches(part, record, batch_size, shuffle=True),
            epochs=epochs,
            delta=options["delta"],
            priors=len(scales),
            seed=options["seed"],
            checkpoint=folder / f"bound-{scale:g}.checkpoint",
            resume=resume,
        )
        batches = sources.batches(part, record, batch_size)
        one = risk_certificate(bnn, batches, priors_considered=len(scales), **options)
        out.note(f"prior std {scale:g}: at most {100 * one.bound:.2f} %")
        tried.append({"prior_std": scale, "run": run.as_dict(), "certificate": one.as_dict()})
        if best is None or one.bound < best.bound:
            best = one
            save(bnn, folder / "posterior", overwrite=True)
    assert best is not None  # noqa: S101 - there is a scale
    return best, tried


def _far_field(out: Output, found: FittedRun, folder: Path, count: int, draws: int, seed: int) -> dict[str, Any]:
    """Limits of the confidence along some test examples and random directions, and the confidence on the way."""
    from stfbnn.cli import sources  # noqa: PLC0415 - they import torch
    from stfbnn.data.loader import normalise  # noqa: PLC0415
    from stfbnn.guarantees.far_field import confidence_along, far_field  # noqa: PLC0415
    from stfbnn.report import save_figure  # noqa: PLC0415
    from stfbnn.report.far_field_plots import far_field_figure  # noqa: PLC0415

    record = found.record
    part = sources.test_part(record)
    directions = normalise(part.inputs[:count], record.mean, record.std)
    limits = far_field(found.bnn, directions, draws=draws, random_directions=len(directions), seed=seed)
    out.show(limits.table())
    out.show(limits.verdict())
    length = float(directions.flatten(1).norm(dim=1).median())
    distances = [length * factor for factor in (0.3, 1.0, 3.0, 10.0, 100.0, 1e3, 1e4)]
    along = confidence_along(found.bnn, directions, distances, samples=min(draws, 200), seed=seed)
    save_figure(far_field_figure(along, limits), folder / "far_field.png")
    out.show(f"Wrote {folder / 'far_field.png'}")
    return {"limits": limits.as_dict(), "along": along.as_dict()}
