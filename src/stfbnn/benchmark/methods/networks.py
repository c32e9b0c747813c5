"""Methods that train ordinary networks: the network itself, label smoothing, dropout, an ensemble, and SWAG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stfbnn.baselines.deep_ensemble import DeepEnsemble
from stfbnn.baselines.mc_dropout import MCDropout, with_dropout
from stfbnn.baselines.networks import PointNetwork
from stfbnn.baselines.predictor import Predictor
from stfbnn.baselines.swag import fit_swag
from stfbnn.benchmark.clock import clock
from stfbnn.benchmark.methods.base import BOTH, CLASSES, Context, Fitted, Method, by_grid, choose, score
from stfbnn.benchmark.parts import targets_of_part
from stfbnn.likelihood import Categorical, Gaussian, Likelihood
from stfbnn.randomness import derive_seed
from stfbnn.training import train
from stfbnn.training_choices import LossChoice

MEMBERS = 4
"""Networks of the deep ensemble, the first one of which is the base network."""

WEIGHT_DECAYS = ({"weight_decay": 0.0}, {"weight_decay": 5e-4}, {"weight_decay": 1e-4}, {"weight_decay": 5e-3})
SMOOTHINGS = ({"smoothing": 0.05}, {"smoothing": 0.1}, {"smoothing": 0.02}, {"smoothing": 0.2})
RATES = ({"rate": 0.1}, {"rate": 0.2}, {"rate": 0.05}, {"rate": 0.4})
SWAG_RATES = ({"lr": 0.01}, {"lr": 0.05}, {"lr": 0.002}, {"lr": 0.1})


def stage_one(context: Context, model: nn.Module, name: str, setting: Mapping[str, Any], member: int = 0) -> nn.Module:
    """Train a network as the task says, but for ``setting``."""
    options = {**context.task.options, **setting}
    run = train(
        model,
        context.train_loader,
        epochs=context.task.epochs,
        seed=derive_seed(context.seed, name, member),
        loss=loss_of(context),
        precision=context.task.precision,
        checkpoint=None if context.folder is None else context.folder / f"{name}-{member}.ckpt",
        accelerator="auto",
        progress=False,
        **options,
    )
    return run.model


def loss_of(context: Context) -> LossChoice:
    """The loss of training: for a regression in units of the training targets' variance, whatever those are measured in."""
    if context.data.kind == "classification":
        return "auto"
    variance = float(targets_of_part(context.data.train).double().var(correction=0)) or 1.0

    def scaled(outputs: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(Gaussian.match(outputs, target), target) / variance

    return scaled


def likelihood_of(context: Context) -> Likelihood:
    """What the outputs mean; a regression's noise is replaced by the one that is chosen on held-out examples."""
    return Categorical() if context.data.kind == "classification" else Gaussian(noise_std=1.0)


def chosen_decay(context: Context) -> dict[str, Any]:
    """The weight decay of the base network, for methods that train networks of their own."""
    assert context.base is not None  # noqa: S101 - the runner trains it first
    return {"weight_decay": context.base.setting["weight_decay"]}


def _network(context: Context, setting: Mapping[str, Any]) -> Predictor:
    name = f"network-{setting['weight_decay']:g}"
    return PointNetwork(stage_one(context, context.fresh("member", 0), name, setting), likelihood_of(context))


def _smoothed(context: Context, setting: Mapping[str, Any]) -> Predictor:
    options = {"label_smoothing": setting["smoothing"], **chosen_decay(context)}
    name = f"label-smoothing-{setting['smoothing']:g}"
    model = stage_one(context, context.fresh("member", 0), name, options)
    return PointNetwork(model, likelihood_of(context), users_network=False)


def _dropout(context: Context, setting: Mapping[str, Any]) -> Predictor:
    model = with_dropout(context.fresh("member", 0), setting["rate"])
    model = stage_one(context, model, f"mc-dropout-{setting['rate']:g}", chosen_decay(context))
    return MCDropout(
        model, likelihood_of(context), samples=context.task.samples, seed=context.seed, users_network=False
    )


def _ensemble(context: Context) -> Fitted:
    """The settings are the base network's: those were chosen for it already."""
    began = clock()
    others = [
        stage_one(context, context.fresh("member", member), "ensemble", chosen_decay(context), member)
        for member in range(1, MEMBERS)
    ]
    seconds = clock() - began
    predictor = DeepEnsemble([context.model, *others], likelihood_of(context))
    setting = {"members": MEMBERS, **chosen_decay(context)}
    return choose([score(context, predictor, setting, seconds)], [predictor])


def _swag(context: Context, setting: Mapping[str, Any]) -> Predictor:
    return fit_swag(
        context.model,
        context.train_loader,
        likelihood_of(context),
        epochs=max(1, context.task.epochs // 4),
        lr=setting["lr"],
        # Enough iterates for the deviations also where epochs are few.
        collect_every=max(1, len(context.data.train) // (4 * context.task.batch)),
        samples=context.task.samples,
        weight_decay=chosen_decay(context)["weight_decay"],
        loss=loss_of(context),
        seed=context.seed,
        progress=False,
    )


def _step(context: Context) -> Any:
    return _network(context, {"weight_decay": 0.0})


NETWORKS = (
    Method(
        "network", "trained network", BOTH, by_grid(_network, WEIGHT_DECAYS), _step, trains_base=True, holds_base=False
    ),
    Method("label-smoothing", "label smoothing", CLASSES, by_grid(_smoothed, SMOOTHINGS)),
    Method("mc-dropout", "MC dropout", BOTH, by_grid(_dropout, RATES)),
    Method("swag", "SWAG", BOTH, by_grid(_swag, SWAG_RATES)),
    Method("deep-ensemble", f"deep ensemble of {MEMBERS}", BOTH, _ensemble),
)
