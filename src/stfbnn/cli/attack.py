"""``stfbnn attack``: how often the trained network, and the Bayesian one, are fooled by someone who tries."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output, resumable
from stfbnn.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from stfbnn.cli.fitted import FittedRun
    from stfbnn.cli.record import DataChoice
    from stfbnn.robustness.result import Robustness
    from stfbnn.robustness.victim import Victim
    from stfbnn.threat import InputSpace, Norm, Threat

HELP = opt.help_text("""
Attack the trained network and the Bayesian one, and check the attacks themselves.

RUN is the folder that `stfbnn fit` wrote. Test images are changed by at most --epsilon (pixels lie in 0 to 1), by attacks with
one and with many gradient steps, with the gradient averaged over posterior draws, with AutoAttack's, without gradients, and
carried over from the trained network. An example counts as robust only if none of them fools the network. Where the checks
find that the attacks are too weak to be believed, a warning says so.

With --detect: does the uncertainty tell attacked inputs from clean ones, also if the attacker knows of it? With --certify: how
far each image may be moved for sure without changing the vote of posterior draws (dense first layers alone).

Examples:
    stfbnn attack run
    stfbnn attack run --epsilon 0.03 --epsilon 0.1 --examples 500 --detect
    stfbnn attack run --norm l2 --epsilon 0.5 --certify --json
""")

_EPSILONS = {"linf": (2 / 255, 4 / 255, 8 / 255), "l2": (0.25, 0.5, 1.0)}
_ATTACK = "Attack"
CONTENDERS = ("trained network", "STF-BNN")


def attack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results. Default: RUN/attack.", show_default=False),
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(
            help="The largest change; may be repeated. Default: 2, 4 and 8 of 255; for l2 0.25, 0.5 and 1.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.", rich_help_panel=_ATTACK)] = "linf",
    examples: Annotated[int, typer.Option(help="Test examples to attack.", rich_help_panel=_ATTACK)] = 200,
    detect: Annotated[
        bool, typer.Option("--detect", help="Also: does the uncertainty show attacks?", rich_help_panel=_ATTACK)
    ] = False,
    certify: Annotated[
        bool, typer.Option("--certify", help="Also: radii that are certain.", rich_help_panel=_ATTACK)
    ] = False,
    lower: Annotated[float, typer.Option(help="The smallest valid value.", rich_help_panel=_ATTACK)] = 0.0,
    upper: Annotated[float, typer.Option(help="The largest.", rich_help_panel=_ATTACK)] = 1.0,
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    samples: opt.Samples = 32,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    resume: opt.Resume = True,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, attack, draw, print."""
    from stfbnn.cli import fitted, stage_one  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.report import save_figure  # noqa: PLC0415
    from stfbnn.report.robustness_plots import robustness_figure  # noqa: PLC0415
    from stfbnn.robustness.result import robustness_table  # noqa: PLC0415
    from stfbnn.robustness.study import evaluate_robustness  # noqa: PLC0415
    from stfbnn.robustness.victim import victim  # noqa: PLC0415
    from stfbnn.threat import Threat  # noqa: PLC0415

    out = Output(as_json)
    if norm not in _EPSILONS:
        raise InputError(f"--norm must be linf or l2, but it is {norm!r}")
    measured: Norm = "linf" if norm == "linf" else "l2"
    choice = opt.data_choice(data, kind, target, None, image_size, split, limit)
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    inputs, targets = _attacked(found, choice, examples, seed)
    space = stage_one.input_space(found.record, lower, upper)
    network = victim(found.model, space=space)
    victims = {CONTENDERS[0]: network, CONTENDERS[1]: victim(found.bnn, space=space, samples=samples, seed=seed)}
    epsilons = tuple(epsilon) if epsilon else _EPSILONS[norm]
    folder = output or run / "attack"
    out.note(f"{len(inputs):,} test examples, {norm} up to {', '.join(f'{one:.4g}' for one in epsilons)}")
    studies = {}
    with resumable(folder):
        for name, one in victims.items():
            out.note(f"attacking: {name}")
            kept = folder / name.replace(" ", "-").lower()
            if not resume:
                shutil.rmtree(kept, ignore_errors=True)
            studies[name] = evaluate_robustness(
                one,
                inputs,
                targets,
                epsilons,
                norm=measured,
                source=None if one is network else network,
                seed=seed,
                checkpoint=kept,
            )
    for name, study in studies.items():
        _show(out, name, study)
    out.show(robustness_table(studies))
    if detect:
        threat = Threat(max(epsilons), measured)
        for name, one in victims.items():
            studies[name] = replace(studies[name], detection=_detect(out, name, one, inputs, targets, threat, seed))
    if certify:
        certified = _certify(out, found, space, inputs, targets, seed)
        studies[CONTENDERS[1]] = replace(studies[CONTENDERS[1]], smoothing=certified)
    result = {
        "output": folder,
        "examples": len(inputs),
        "methods": {name: one.as_dict() for name, one in studies.items()},
    }
    write_json(folder / "attack.json", plain(result))
    save_figure(robustness_figure(studies), folder / "attack.png")
    out.show(f"Wrote {folder / 'attack.json'} and {folder / 'attack.png'}")
    out.finish(result)


def _attacked(found: FittedRun, choice: DataChoice | None, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The examples to attack, at random from the test part, before normalisation, and their labels."""
    from stfbnn.cli import sources  # noqa: PLC0415 - imports torch
    from stfbnn.data.split import hold_out  # noqa: PLC0415

    if count < 1:
        raise InputError(f"--examples must be positive, but it is {count}")
    if found.record.task != "classification":
        raise InputError("attacks are for classifiers, and this run is a regression")
    part = sources.test_part(found.record) if choice is None else sources.read_like(found.record, choice)
    if part.targets is None:
        raise InputError("the data have no targets, by which an attack is judged; give labelled ones with --data")
    chosen = hold_out(part, count, seed)[1] if count < len(part) else part
    assert chosen.targets is not None  # noqa: S101 - a part of what has some
    return chosen.inputs, chosen.targets


def _show(out: Output, name: str, study: Robustness) -> None:
    """One method's tables."""
    out.show(f"\n{name}")
    out.show(study.table())
    if study.draws is not None:
        out.show(study.draws_table())
    out.show(study.findings_table())
    out.show(study.verdict())


def _detect(
    out: Output, name: str, one: Victim, inputs: Tensor, targets: Tensor, threat: Threat, seed: int
) -> dict[str, Any]:
    """Attacked against clean inputs."""
    from stfbnn.robustness.detection import detection  # noqa: PLC0415 - imports torch
    from stfbnn.robustness.gradient import pgd  # noqa: PLC0415

    result = detection(one, inputs, targets, threat, attack=pgd(), seed=seed)
    out.show(result.table())
    out.show(f"{name}: {result.verdict()}")
    content: dict[str, Any] = result.as_dict()
    return content


def _certify(
    out: Output, found: FittedRun, space: InputSpace, inputs: Tensor, targets: Tensor, seed: int
) -> dict[str, Any]:
    """Radii of the vote of posterior draws."""
    from stfbnn.robustness.smoothing import certified_radius  # noqa: PLC0415 - imports torch

    radii = certified_radius(found.bnn, inputs, targets, space=space, seed=seed)
    out.show(radii.table())
    return radii.as_dict()
