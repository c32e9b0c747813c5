"""Make the first layer of a trained network Bayesian, and know when not to trust its predictions.

    bnn = stfbnn.bayesianize(model, example_inputs)
    run = stfbnn.fit(bnn, train_loader, val_loader=held_out_loader)
    pred = stfbnn.predict(bnn, test_loader)
    stfbnn.save(bnn, "posterior")
    bnn = stfbnn.load("posterior", model)

A public name's module is imported when the name is first used, so that ``stfbnn --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stfbnn.artifact import load, save
    from stfbnn.errors import (
        ArtifactError,
        CheckpointError,
        DataError,
        InputError,
        LayerError,
        ModelChangedError,
        NotFittedError,
        StfbnnError,
    )
    from stfbnn.inference.fit import fit
    from stfbnn.inference.history import FitRecord, FitRun, TemperatureTrial
    from stfbnn.likelihood import Categorical, Gaussian, Likelihood
    from stfbnn.locate import FirstLayer, locate_first_layer
    from stfbnn.network import BayesianNetwork, bayesianize
    from stfbnn.posterior import MeanField, Posterior
    from stfbnn.prediction import predict
    from stfbnn.predictive import CategoricalPrediction, GaussianPrediction, Prediction
    from stfbnn.prior import GaussianPrior, Normal
    from stfbnn.training import TrainRun, train

__version__ = "0.1.0"

_HOMES = {
    "artifact": ("load", "save"),
    "errors": (
        "ArtifactError",
        "CheckpointError",
        "DataError",
        "InputError",
        "LayerError",
        "ModelChangedError",
        "NotFittedError",
        "StfbnnError",
    ),
    "inference.fit": ("fit",),
    "inference.history": ("FitRecord", "FitRun", "TemperatureTrial"),
    "likelihood": ("Categorical", "Gaussian", "Likelihood"),
    "locate": ("FirstLayer", "locate_first_layer"),
    "network": ("BayesianNetwork", "bayesianize"),
    "posterior": ("MeanField", "Posterior"),
    "prediction": ("predict",),
    "predictive": ("CategoricalPrediction", "GaussianPrediction", "Prediction"),
    "prior": ("GaussianPrior", "Normal"),
    "training": ("TrainRun", "train"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "BayesianNetwork",
    "Categorical",
    "CategoricalPrediction",
    "CheckpointError",
    "DataError",
    "FirstLayer",
    "FitRecord",
    "FitRun",
    "Gaussian",
    "GaussianPrediction",
    "GaussianPrior",
    "InputError",
    "LayerError",
    "Likelihood",
    "MeanField",
    "ModelChangedError",
    "Normal",
    "NotFittedError",
    "Posterior",
    "Prediction",
    "StfbnnError",
    "TemperatureTrial",
    "TrainRun",
    "bayesianize",
    "fit",
    "load",
    "locate_first_layer",
    "predict",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
