"""``stfbnn privacy``: what a released network tells of who was in its training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output, resumable
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from stfbnn.cli.fitted import FittedRun
    from stfbnn.privacy.result import ReleaseOutcome

HELP = opt.help_text("""
Measure how well an attacker can tell who was in the training data (membership inference).

RUN is the folder that `stfbnn fit` wrote. Without --shadows the trained network and the Bayesian one are attacked by thresholds
on their predictions: training examples against the test part. That bounds the leak from below.

With --shadows M the network is trained M times again, by the options that `stfbnn train` was given, each time on a random half
of a pool of training examples; every release is made from each, and attacked with the others as shadow models (LiRA, RMIA, and
of a posterior the file itself). Everything is kept in the output folder, and the same command goes on after a kill.

Examples:
    stfbnn privacy run
    stfbnn privacy run --shadows 16 --pool 2000
    stfbnn privacy run --shadows 32 --release network --release stf-bnn --release "deep ensemble" --json
""")

_SHADOWS = "Shadow models"
CONTENDERS = ("trained network", "STF-BNN")
RELEASED = ("network", "temperature scaling", "stf-bnn")


def privacy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results. Default: RUN/privacy.", show_default=False),
    ] = None,
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    shadows: Annotated[
        int, typer.Option(help="Shadow models, an even number of at least 6; 0 for none.", rich_help_panel=_SHADOWS)
    ] = 0,
    pool: Annotated[
        int, typer.Option(help="Training examples, half of which each is trained on.", rich_help_panel=_SHADOWS)
    ] = 2000,
    release: Annotated[
        list[str] | None,
        typer.Option(
            help='What is released; may be repeated. Default: network, "temperature scaling", stf-bnn. There are also '
            '"stf-bnn mixture", "mc dropout", "deep ensemble" and "bayesian network".',
            rich_help_panel=_SHADOWS,
        ),
    ] = None,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    samples: opt.Samples = 32,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, attack, draw, print."""
    from stfbnn.cli import fitted  # noqa: PLC0415 - it imports torch, which takes seconds
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.privacy.figures import membership_table  # noqa: PLC0415
    from stfbnn.report import save_figure  # noqa: PLC0415
    from stfbnn.report.privacy_plots import roc_figure  # noqa: PLC0415

    out = Output(as_json)
    choice = opt.data_choice(data, kind, target, None, image_size, split, limit)
    if release and not shadows:
        raise InputError("--release says what is made from shadow models, which --shadows asks for")
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    if found.record.task != "classification":
        raise InputError("membership inference is for classifiers here, and this run is a regression")
    folder = output or run / "privacy"
    result: dict[str, Any] = {"output": folder}
    curves: dict[str, Any] = {}
    if shadows:
        with resumable(folder):
            study = _with_shadows(out, found, folder, shadows, pool, release, seed)
        out.show(study.table())
        out.show(study.class_table())
        out.show(study.verdict())
        result["study"] = study.as_dict()
        curves = {f"{name}, {one.strongest().label}": one.strongest().figures for name, one in study.releases.items()}
    else:
        outcomes = _by_thresholds(out, found, choice, samples, seed)
        for name, outcome in outcomes.items():
            out.show(membership_table({one.label: one.figures for one in outcome.attacks.values()}, title=name))
            out.show(f"{name}: {outcome.verdict()}")
            curves[f"{name}, {outcome.strongest().label}"] = outcome.strongest().figures
        result["thresholds"] = {name: outcome.as_dict() for name, outcome in outcomes.items()}
    write_json(folder / "privacy.json", plain(result))
    save_figure(roc_figure(curves), folder / "privacy.png")
    out.show(f"Wrote {folder / 'privacy.json'} and {folder / 'privacy.png'}")
    out.finish(result)


def _by_thresholds(out: Output, found: FittedRun, choice: Any, samples: int, seed: int) -> dict[str, ReleaseOutcome]:
    """Both networks, on training examples and as many unseen ones."""
    from stfbnn.baselines.networks import PointNetwork  # noqa: PLC0415 - they import torch
    from stfbnn.cli import sources  # noqa: PLC0415
    from stfbnn.data import hold_out  # noqa: PLC0415
    from stfbnn.data.loader import normalise  # noqa: PLC0415
    from stfbnn.privacy.study import threshold_privacy  # noqa: PLC0415

    record = found.record
    parts = sources.divide(sources.read(record.data), record.hold_out)
    sources.require_same(parts, record)
    members = parts.train
    others = sources.test_part(record) if choice is None else sources.read_like(record, choice)
    if others.targets is None:
        raise InputError("the attacker knows the true labels, and --data has none")
    count = min(len(members), len(others))
    if count < len(members):
        members = hold_out(members, count, seed)[1]
    out.note(f"{len(members):,} training examples against {len(others):,} unseen ones")
    inside, outside = (normalise(part.inputs, record.mean, record.std) for part in (members, others))
    assert members.targets is not None  # noqa: S101 - a run of classes has labels
    known: dict[str, Any] = {"samples": samples, "seed": seed}
    network = PointNetwork(found.model, found.bnn.require_fitted())
    return {
        CONTENDERS[0]: threshold_privacy(network, inside, members.targets, outside, others.targets, **known),
        CONTENDERS[1]: threshold_privacy(found.bnn, inside, members.targets, outside, others.targets, **known),
    }


def _with_shadows(
    out: Output, found: FittedRun, folder: Path, shadows: int, count: int, names: list[str] | None, seed: int
) -> Any:
    """A study of networks like the run's."""
    from stfbnn import factories  # noqa: PLC0415 - they import torch
    from stfbnn.cli import sources, stage_one  # noqa: PLC0415
    from stfbnn.data import Split, hold_out, loader  # noqa: PLC0415
    from stfbnn.data.loader import normalise  # noqa: PLC0415
    from stfbnn.privacy.study import privacy_study  # noqa: PLC0415
    from stfbnn.randomness import seeded  # noqa: PLC0415
    from stfbnn.training import train  # noqa: PLC0415

    record = found.record
    options = stage_one.training_options(record)
    held = sources.held_out_part(record)
    if held is None:
        raise InputError("temperatures are chosen on held-out examples, and this run has none: train with --hold-out")
    parts = sources.divide(sources.read(record.data), record.hold_out)
    sources.require_same(parts, record)
    chosen = hold_out(parts.train, count, seed)[1] if count < len(parts.train) else parts.train
    inputs, held_inputs = (normalise(part.inputs, record.mean, record.std) for part in (chosen, held))
    labels = chosen.targets
    assert labels is not None  # noqa: S101 - a run of classes has labels
    assert held.targets is not None  # noqa: S101 - likewise
    batch_size = stage_one.batch_size(record)

    def make_model() -> Any:
        return factories.build(record.model.factory, record.model.arguments, {})[0]

    def train_model(members: Any, model_seed: int) -> Any:
        with seeded(model_seed, "model"):
            network = make_model()
        batches = loader(Split(inputs[members], labels[members]), batch_size, shuffle=True)
        return train(network, batches, seed=model_seed, progress=False, **options).model

    out.note(f"{shadows} shadow models, each trained on {len(labels) // 2:,} of {len(labels):,} examples")
    return privacy_study(
        inputs,
        labels,
        train_model,
        tuple(names or RELEASED),
        make_model=make_model,
        held_out=(held_inputs, held.targets),
        models=shadows,
        seed=seed,
        folder=folder / "shadows",
        settings={"model": record.model.factory, "arguments": record.model.arguments, "training": record.training},
        batch_size=batch_size,
    )
