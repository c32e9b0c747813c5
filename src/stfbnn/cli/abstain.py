"""``stfbnn abstain``: when not to trust the network, for a stated risk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stfbnn.cli import options as opt
from stfbnn.cli.output import Output
from stfbnn.errors import InputError

HELP = opt.help_text("""
Choose when to abstain, so that of the answers at most a stated share is wrong, with a guarantee.

RUN is the folder that `stfbnn fit` wrote. The threshold is chosen on labelled examples that nothing else has used: those of
--data, or by default a random half of the run's test part; the other half then shows what the rule does. The run's own
held-out part will not do, for it chose the temperatures. The rule's file is for `stfbnn predict --rule`.

With probability --confidence over the choice of these examples, at most --max-risk of the answers to new examples of the same
kind are wrong. The trained network is shown beside it: what it could answer at the same risk.

Examples:
    stfbnn abstain run --max-risk 0.05 -o rule.json
    stfbnn abstain run --max-risk 0.01 --confidence 0.9 --data labelled.csv -o rule.json
    stfbnn predict run --rule rule.json --data new.csv -o predictions.csv
""")


def abstain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `stfbnn fit` wrote.")],
    max_risk: Annotated[float, typer.Option(help="Largest share of wrong answers, above 0 and below 1.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the rule, JSON.")] = Path("rule.json"),
    confidence: Annotated[float, typer.Option(help="How surely, above 0 and below 1.")] = 0.95,
    score: Annotated[str, typer.Option(help="entropy, confidence or epistemic: what is thresholded.")] = "entropy",
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
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Parse, load, choose, try, write, print."""
    from stfbnn.cli import fitted, sources  # noqa: PLC0415 - they import torch, which takes seconds
    from stfbnn.cli.rule_files import RuleFile, posterior_digest  # noqa: PLC0415
    from stfbnn.cli.seen import note_seen  # noqa: PLC0415
    from stfbnn.cli.showing import rules_table  # noqa: PLC0415
    from stfbnn.data import hold_out  # noqa: PLC0415
    from stfbnn.decision import abstention_rule, evaluate_abstention  # noqa: PLC0415
    from stfbnn.evaluation.evaluate import BAYESIAN, contenders  # noqa: PLC0415

    out = Output(as_json)
    choice = opt.data_choice(data, kind, target, None, image_size, split, limit)
    if choice is None and limit is not None:
        raise InputError("--limit says how much of --data to read, which is missing")
    found = fitted.load_run(run, model, model_args, checkpoint, device)
    if found.bnn.require_fitted().name != "categorical":
        raise InputError(
            "the command abstains from classes; for numbers and labels use stfbnn.abstention_rule from Python"
        )
    whole = sources.test_part(found.record) if choice is None else sources.read_like(found.record, choice)
    if whole.targets is None:
        raise InputError("the data have no targets, by which alone the risk can be known")
    # Half to choose, half to look.
    look, choose = hold_out(whole, 0.5, seed=seed)
    held = sources.held_out_part(found.record)
    chosen_on, looked_at = (sources.batches(part, found.record, batch_size) for part in (choose, look))
    note_seen(out, found, chosen_on, None if held is None else sources.batches(held, found.record, batch_size))
    out.note(f"{len(choose):,} examples to choose the rule on, {len(look):,} to try it on")
    assert choose.targets is not None  # noqa: S101 - halves of what has targets
    assert look.targets is not None  # noqa: S101
    rules, figures = {}, {}
    for method in contenders(found.model, found.bnn, None, samples=samples, seed=seed):
        # A network has no epistemic part to threshold.
        if score == "epistemic" and method.name != BAYESIAN:
            continue
        rule = abstention_rule(
            method.predict(chosen_on), choose.targets, max_risk=max_risk, confidence=confidence, score=score
        )
        rules[method.name] = rule
        figures[method.name] = evaluate_abstention(method.predict(looked_at), look.targets, rule)
    RuleFile(rules[BAYESIAN], seed, posterior_digest(found.bnn)).write(output)
    out.show(str(rules[BAYESIAN]))
    out.show(rules_table(figures, f"On {len(look):,} other examples"))
    out.show(f"Wrote {output}; use it with: stfbnn predict {run} --rule {output}")
    out.finish(
        {
            "run": run,
            "rule": rules[BAYESIAN].as_dict(),
            "figures": {name: one.as_dict() for name, one in figures.items()},
            "file": output,
        }
    )
