"""What a checkpoint holds of a run of stage two, and what tells that it belongs to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stfbnn.inference.history import FitRecord, StageStart, TemperatureTrial
from stfbnn.inference.loaders import count_examples, generator_states, length, set_generator_states

if TYPE_CHECKING:
    from stfbnn.inference.run import Run


def signature(run: Run, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a run was asked for, on which network and which data: a checkpoint of another one is refused."""
    bnn = run.bnn
    return {
        **choices,
        "layer": bnn.layer_name,
        "shapes": [list(shape) for shape in bnn.layout.shapes],
        "model": bnn.model_fingerprint,
        "family": repr(bnn.family),
        "prior": bnn.prior_recipe.config(),
        "likelihood": [type(run.likelihood).__name__, run.given_likelihood],
        "temperatures": list(run.schedule),
        "seed": run.seed,
        "batches": length(run.loader),
        "rows": count_examples(run.source, 0),
        "held_out": None if run.held_out is None else run.held_out.provenance.digest(),
        # Only where there are several, so that earlier checkpoints still fit.
        **({"processes": run.processes.count} if run.processes.several else {}),
    }


def state_of(run: Run) -> dict[str, Any]:
    """Collect all that a run needs to go on from here."""
    return {
        "current": run.snapshot(),
        "engine": run.engine.state(),
        "origin": run.origin,
        "best": run.best,
        "stage_best": run.stage_best,
        "stage": run.stage,
        "epoch": run.epoch,
        "waited": run.waited,
        "worse_stages": run.worse_stages,
        "seconds": run.seconds,
        "history": [asdict(record) for record in run.history],
        "trials": [asdict(trial) for trial in run.trials],
        "starts": [asdict(start) for start in run.starts],
        "network_nll": run.network_nll,
        "survey": {
            "num_examples": run.num_examples,
            "batches": run.batches,
            "rows": run.rows,
            "total_weight": run.total_weight,
            "provenance": run.provenance.to_tensor(),
        },
        "loader": generator_states(run.source),
    }


def take_state(run: Run, state: Mapping[str, Any]) -> None:
    """Put a run, whose engine is made, where `state_of` was called."""
    run.best, run.stage_best, run.origin = state["best"], state["stage_best"], state["origin"]
    run.stage, run.epoch, run.waited = state["stage"], state["epoch"], state["waited"]
    run.worse_stages, run.seconds = state["worse_stages"], state["seconds"]
    run.history = [FitRecord(**record) for record in state["history"]]
    run.trials = [TemperatureTrial(**trial) for trial in state["trials"]]
    run.starts = [StageStart(**start) for start in state["starts"]]
    if run.epoch > 0:
        run.engine.begin(run.schedule[run.stage], run.epochs * run.batches)
    run.engine.load_state(state["engine"])
    run.restore(state["current"])
    set_generator_states(run.source, state["loader"])
