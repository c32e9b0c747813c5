"""``stfbnn demo``: the whole way on scikit-learn's digits, in less than a minute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output

if TYPE_CHECKING:
    from stfbnn.demo import DemoResult

HELP = opt.help_text("""
See it work: train a network on scikit-learn's handwritten digits, make its first layer Bayesian, compare.

The digits are seen through a noisy sensor, and the network is trained until it is sure of everything, also of what it gets
wrong. Three repairs are shown beside it: temperature scaling, the Bayesian first layer (STF-BNN), and both. Strange examples
are patches of photographs. Nothing is downloaded, and nothing is chosen by the test digits.

Examples:
    stfbnn demo
    stfbnn demo --seed 1 --output /tmp/demo
    stfbnn demo --quick --json
""")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("stfbnn-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds of work: shows the way, not what the method can do.")
    ] = False,
    seed: opt.Seed = 0,
    as_json: opt.AsJson = False,
) -> None:
    """Run, print, draw."""
    out = Output(as_json)
    out.note("Loading torch …")
    from stfbnn.cli import showing  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.demo import OUTSIDE, DemoSettings, run_demo  # noqa: PLC0415

    settings = DemoSettings(seed=seed)
    if quick:
        settings = DemoSettings(seed, train_epochs=10, fit_epochs=2, temperatures=(0.3, 0.1), samples=8, patches=60)
    result = run_demo(settings, tell=out.note)
    drawn = showing.pictures(result.side, output)
    out.show(showing.figures_table(result.side, f"{result.counts['test']} test digits", result.parameters))
    out.show(showing.outside_table(result.side, OUTSIDE))
    out.show(_reading(result))
    out.show("\nPictures:")
    for path in drawn:
        out.show(f"  {path}")
    out.finish(
        {
            **showing.as_json(result.side),
            "parameters": result.parameters,
            "temperature": result.fit_run.temperature,
            "examples": result.counts,
            "seconds": result.seconds,
            "plots": drawn,
        }
    )


def _reading(result: DemoResult) -> str:
    """What the table says, in words: also what got worse, and what these few digits cannot tell."""
    from stfbnn.demo import OUTSIDE, log_density_gain  # noqa: PLC0415 - it imports torch
    from stfbnn.evaluation.evaluate import BAYESIAN, SCALED, TRAINED  # noqa: PLC0415

    metrics: Any = result.side.metrics
    before, after, scaled = metrics[TRAINED], metrics[BAYESIAN], metrics[SCALED]
    outside = result.side.outside[OUTSIDE]
    moved = 100 * (after.accuracy - before.accuracy)
    lines = [
        f"{BAYESIAN} against the trained network: NLL {_change(before.nll, after.nll)}, "
        f"ECE {_change(before.ece, after.ece)}, Brier {_change(before.brier, after.brier)}, accuracy "
        f"{moved:+.1f} points.",
    ]
    for name, other in (("the trained network", TRAINED), ("temperature scaling", SCALED)):
        gain, error = log_density_gain(result.side, BAYESIAN, other)
        verdict = "better" if gain > 0 else "worse"
        certain = "" if abs(gain) > 2 * error else f": within the noise of {len(result.side.targets)} digits"
        lines.append(f"  NLL {verdict} than {name} by {abs(gain):.3f} ± {error:.3f} (standard error){certain}.")
    lines.append(
        f"  ECE {'below' if after.ece < scaled.ece else 'above'} and Brier "
        f"{'below' if after.brier < scaled.brier else 'above'} temperature scaling's (lower is better)."
    )
    than = [
        f"{'better' if outside[BAYESIAN].auroc_entropy > outside[other].auroc_entropy else 'less well'} than by {name}"
        for name, other in (("the trained network", TRAINED), ("temperature scaling", SCALED))
    ]
    lines.append(
        f"  {OUTSIDE.capitalize()} are told from digits {than[0]} and {than[1]} (AUROC by entropy); mean confidence in "
        f"them {outside[TRAINED].confidence:.2f} → {outside[BAYESIAN].confidence:.2f}."
    )
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    lines.append(f"T = {result.fit_run.temperature:g}. {'; '.join(f'{k}: {v}' for k, v in result.side.notes.items())}.")
    lines.append(f"Time: {times}.")
    return "\n".join(lines)


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %"
