"""Diagnostics: every trouble made to happen by a real fit and named, and silence where a fit is healthy."""

import functools
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from core_models import classification, loader, mlp, trained
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError, NotFittedError
from stfbnn.inference.diagnostics import Finding, diagnose, findings_table
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.inference.variational_newton import VariationalNewton
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanField, Mixture
from stfbnn.prior import Normal

X, Y = classification(300)
X_VAL, Y_VAL = classification(300, seed=1)
SLOW = {"engine": "bayes-by-backprop", "temperature": 1.0}


@functools.cache
def network(name: str) -> nn.Module:
    """A calm network, or one that is far too sure of its 300 examples."""
    return trained(mlp(hidden=12), X, Y, 60) if name == "calm" else trained(mlp(hidden=32), X, Y, 300)


def fitted(name: str, held_out: bool = False, layer: dict[str, Any] | None = None, **options: Any) -> Any:
    bnn = bayesianize(network(name), X[:2], **(layer or {}))
    if held_out:
        options["val_loader"] = loader(X_VAL, Y_VAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="on the held-out data the Bayesian network")
        return bnn, fit(bnn, loader(X, Y), **options)


def found(bnn: BayesianNetwork, run: FitRun) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(bnn, run)}


def test_a_healthy_run_has_no_findings() -> None:
    assert diagnose(*fitted("calm", held_out=True, epochs=30, temperatures=(1.0, 0.3))) == ()


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 30, "temperature": 0.1},
        {"epochs": 2, "temperature": 0.1, "engine": "laplace"},
        {"epochs": 2, "temperature": 0.1, "engine": "laplace", "layer": {"posterior": "filterwise"}},
    ],
)
def test_healthy_runs_of_other_kinds_have_none(options: dict[str, Any]) -> None:
    assert diagnose(*fitted("sure", **options)) == ()


def test_a_width_that_the_recipe_gave_and_nothing_moved() -> None:
    bnn, run = fitted("sure", layer={"posterior": MeanField(0.05)}, epochs=10, **SLOW)
    finding = found(bnn, run)["widths-stuck"]
    assert finding.severity == "problem"
    assert "0.05" in finding.message
    assert "natural-gradient" in finding.advice
    moved = (bnn.posterior.std_vector() / 0.05).log().abs().mean()
    assert f"{float(moved.detach()):.1%}" in finding.message
    # From a width that the curvature gave, not to move is no trouble; nor is it where the width did move.
    assert "widths-stuck" not in found(*fitted("sure", epochs=10, **SLOW))
    fast = {"engine_options": {"learning_rate": 0.05}, **SLOW}
    assert "widths-stuck" not in found(*fitted("sure", layer={"posterior": MeanField(0.05)}, epochs=10, **fast))


def test_nothing_moved() -> None:
    assert "nothing-moved" in found(*fitted("sure", epochs=5, engine_options={"learning_rate": 1e-4}, **SLOW))


@pytest.mark.parametrize(
    "options",
    [
        # A fast change that more epochs go on with, and a slow one of constant speed.
        {"epochs": 6, "temperature": 1.0},
        {"epochs": 12, **SLOW},
    ],
)
def test_a_run_that_ends_before_it_has_come_to_rest(options: dict[str, Any]) -> None:
    bnn, run = fitted("sure", **options)
    findings = found(bnn, run)
    assert set(findings) == {"not-converged"}
    # It is true: more epochs lower the free energy further.
    more = fitted("sure", **{**options, "epochs": 5 * options["epochs"]})[1]
    assert more.history[-1].free_energy < run.history[-1].free_energy - 0.1


def test_collapse_to_the_prior() -> None:
    """By a temperature that leaves the data no say, and by a prior that leaves the weights none."""
    for options in (
        {"epochs": 5, "temperature": 1e4},
        {"epochs": 5, "temperature": 1.0, "layer": {"prior": Normal(1e-3, "pretrained")}},
    ):
        bnn, run = fitted("sure", **options)
        assert set(found(bnn, run)) == {"collapsed-to-prior"}
        ratio = (bnn.posterior.std_vector() / bnn.prior.std).detach()
        assert 0.9 < float(ratio.median()) < 1.1


def test_collapse_to_a_point() -> None:
    bnn, run = fitted("sure", epochs=5, temperature=1e-4)
    assert "collapsed-to-point" in found(bnn, run)
    draws = torch.stack([bnn(X).softmax(1) for _ in range(16)]).detach()
    # Two draws of a sound posterior differ by some per cent.
    assert float(draws.std(dim=0).mean()) < 2e-3


@pytest.mark.parametrize(
    "options", [{"engine_options": {"learning_rate": 0.9}}, {**SLOW, "engine_options": {"learning_rate": 1.0}}]
)
def test_a_free_energy_that_ends_above_its_start(options: dict[str, Any]) -> None:
    bnn, run = fitted("sure", epochs=8, **{**options, "temperature": 0.1})
    assert "free-energy-rises" in found(bnn, run)
    calm = fitted("sure", epochs=8, temperature=0.1)[1]
    assert run.history[-1].free_energy > calm.history[-1].free_energy + 0.5


def test_worse_than_the_network_on_held_out_data() -> None:
    bnn, run = fitted("calm", held_out=True, epochs=2, temperature=1e3)
    finding = found(bnn, run)["no-better-than-network"]
    assert f"{run.network_held_out_nll:.4f}" in finding.message
    assert run.trials[0].held_out_nll > run.network_held_out_nll


@pytest.mark.parametrize(("tried", "end"), [((100.0, 10.0), "lowest"), ((0.1, 0.01, 0.001), "highest")])
def test_the_temperature_at_the_edge_of_what_was_tried(tried: tuple[float, ...], end: str) -> None:
    bnn, run = fitted("sure", held_out=True, epochs=8, temperatures=tried)
    finding = found(bnn, run)["temperature-at-edge"]
    assert finding.severity == "note"
    assert f"T={run.temperature:g} is the {end}" in finding.message


def test_a_predictive_temperature_far_from_1() -> None:
    bnn, run = fitted("sure", held_out=True, epochs=3, temperature=0.001, predictive_temperature="held-out")
    finding = found(bnn, run)["predictive-temperature-far-from-1"]
    assert run.predictive_temperature > 1.5
    assert "too sure" in finding.message
    assert "wider" in finding.advice


def test_a_mixture_of_one_component_in_effect() -> None:
    recipe = Mixture(2, weighting="equal", start="perturb", perturbation=0.1)
    bnn, run = fitted("calm", layer={"posterior": recipe}, epochs=4, temperature=0.1)
    assert len(bnn.posterior.weights) == 2
    assert "one-component" not in found(bnn, run)
    # As stacking leaves them where the second component adds nearly nothing.
    bnn.posterior.set_weights(torch.tensor([0.97, 0.03]))
    finding = found(bnn, run)["one-component"]
    assert finding.severity == "note"
    assert f"{1 / (0.97**2 + 0.03**2):.2f} components" in finding.message


def test_stopping_early_is_no_lack_of_convergence() -> None:
    options = {"epochs": 60, "temperature": 0.02, "engine": "bayes-by-backprop", "early_stop": "nll", "patience": 2}
    bnn, run = fitted("sure", held_out=True, engine_options={"learning_rate": 0.03}, **options)
    assert len(run.history) < 60
    assert not set(found(bnn, run)) & {"not-converged", "nothing-moved", "free-energy-rises"}


def test_a_resumed_run_is_diagnosed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"epochs": 6, "temperature": 1.0, "checkpoint": tmp_path / "fit.pt"}
    whole = fitted("sure", **{**options, "checkpoint": None})

    step, calls = VariationalNewton.step, iter(range(35))

    def stopped(*arguments: Any) -> float:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(VariationalNewton, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            fitted("sure", **options)
    resumed = fitted("sure", **options)
    assert resumed[1].starts == whole[1].starts
    assert diagnose(*resumed) == diagnose(*whole)


def test_what_belongs_together() -> None:
    run = fitted("calm", epochs=1, temperature=0.1)[1]
    other = bayesianize(network("calm"), X[:2])
    with pytest.raises(NotFittedError):
        diagnose(other, run)
    fit(other, loader(X, Y), epochs=1, temperature=0.3)
    with pytest.raises(InputError, match="not of this network"):
        diagnose(other, run)


def test_the_table_tells_problems_first() -> None:
    bnn, run = fitted("sure", held_out=True, epochs=3, temperature=0.001, predictive_temperature="held-out")
    findings = diagnose(bnn, run)
    assert [finding.severity for finding in findings] == sorted((f.severity for f in findings), reverse=True)
    console = Console(file=io.StringIO(), width=200)
    console.print(findings_table(findings))
    text = console.file.getvalue()
    assert all(finding.name in text for finding in findings)


@pytest.mark.parametrize("components", [1, 2])
def test_an_ensemble_of_points_can_be_diagnosed(components: int) -> None:
    recipe = Mixture(components=components, family="point", weighting="equal", max_excess=50.0)
    bnn, run = fitted("calm", held_out=True, temperature=0.1, layer={"posterior": recipe})
    # Its component 0 is the trained layer as it is, so nothing is on record for it.
    assert run.history == ()
    assert found(bnn, run).keys() <= {"no-better-than-network", "one-component"}
