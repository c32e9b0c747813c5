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
    from stfbnn.adapters import Adapters
    from stfbnn.adversarial_training import AdversarialTraining
    from stfbnn.artifact import load, save
    from stfbnn.bulk import PredictedShards, predict_shards
    from stfbnn.conversion import bayesianize
    from stfbnn.decision import AbstentionFigures, AbstentionRule, abstention_rule, evaluate_abstention
    from stfbnn.deployment import Exported, ExportError, PredictiveModule, export, predictive_module
    from stfbnn.errors import (
        ArtifactError,
        CertificateError,
        CheckpointError,
        DataError,
        InputError,
        LayerError,
        LostRankError,
        ModelChangedError,
        NotFittedError,
        StfbnnError,
        StorageError,
    )
    from stfbnn.estimators_sklearn import StfClassifier, StfRegressor
    from stfbnn.hub import from_pretrained, push_to_hub
    from stfbnn.inference.diagnostics import Finding, diagnose
    from stfbnn.inference.estimators import Flipout, LocalReparameterization, PerExample, SharedSample
    from stfbnn.inference.fit import fit
    from stfbnn.inference.history import ComponentRecord, FitRecord, FitRun, StageStart, TemperatureTrial
    from stfbnn.inference.hmc import HMCRun, sample_hmc
    from stfbnn.inference.stepwise import Inference
    from stfbnn.inference.suggest_prior import PriorSuggestion, PriorTrial, suggest_prior
    from stfbnn.layer_listing import LayerChoice, layer_choices
    from stfbnn.likelihood import (
        Bernoulli,
        Categorical,
        CustomLikelihood,
        Gaussian,
        HeteroscedasticGaussian,
        Likelihood,
        Poisson,
    )
    from stfbnn.locate import FirstLayer, locate_first_layer
    from stfbnn.merging import merge
    from stfbnn.network import BayesianNetwork
    from stfbnn.optima.result import Landscape, LayerLandscape
    from stfbnn.optima.retraining import Optimum, RetrainingOptions
    from stfbnn.optima.study import landscape
    from stfbnn.optima.width_table import LayerComparison, LayerWidth
    from stfbnn.optima.widths import compare_layers
    from stfbnn.posterior import (
        Filterwise,
        Full,
        LowRank,
        MeanField,
        Mixture,
        MixturePosterior,
        PointMass,
        Posterior,
        Samples,
        register_family,
    )
    from stfbnn.prediction import predict
    from stfbnn.predictive import (
        BernoulliPrediction,
        CategoricalPrediction,
        CustomPrediction,
        GaussianPrediction,
        HeteroscedasticPrediction,
        PoissonPrediction,
        Prediction,
    )
    from stfbnn.prior import GaussianPrior, Normal
    from stfbnn.threat import InputSpace, Threat
    from stfbnn.training import TrainRun, train
    from stfbnn.trunk.mapped_weights import map_weights
    from stfbnn.trunk.offloading import offload
    from stfbnn.trunk.sharding import shard

__version__ = "0.1.0"

_HOMES = {
    "adapters": ("Adapters",),
    "adversarial_training": ("AdversarialTraining",),
    "artifact": ("load", "save"),
    "bulk": ("PredictedShards", "predict_shards"),
    "conversion": ("bayesianize",),
    "decision": ("AbstentionFigures", "AbstentionRule", "abstention_rule", "evaluate_abstention"),
    "deployment": ("ExportError", "Exported", "PredictiveModule", "export", "predictive_module"),
    "errors": (
        "ArtifactError",
        "CertificateError",
        "CheckpointError",
        "DataError",
        "InputError",
        "LayerError",
        "LostRankError",
        "ModelChangedError",
        "NotFittedError",
        "StfbnnError",
        "StorageError",
    ),
    "estimators_sklearn": ("StfClassifier", "StfRegressor"),
    "hub": ("from_pretrained", "push_to_hub"),
    "inference.diagnostics": ("Finding", "diagnose"),
    "inference.estimators": ("Flipout", "LocalReparameterization", "PerExample", "SharedSample"),
    "inference.fit": ("fit",),
    "inference.history": ("ComponentRecord", "FitRecord", "FitRun", "StageStart", "TemperatureTrial"),
    "inference.hmc": ("HMCRun", "sample_hmc"),
    "inference.stepwise": ("Inference",),
    "inference.suggest_prior": ("PriorSuggestion", "PriorTrial", "suggest_prior"),
    "layer_listing": ("LayerChoice", "layer_choices"),
    "likelihood": (
        "Bernoulli",
        "Categorical",
        "CustomLikelihood",
        "Gaussian",
        "HeteroscedasticGaussian",
        "Likelihood",
        "Poisson",
    ),
    "locate": ("FirstLayer", "locate_first_layer"),
    "merging": ("merge",),
    "network": ("BayesianNetwork",),
    "optima.result": ("Landscape", "LayerLandscape"),
    "optima.retraining": ("Optimum", "RetrainingOptions"),
    "optima.study": ("landscape",),
    "optima.width_table": ("LayerComparison", "LayerWidth"),
    "optima.widths": ("compare_layers",),
    "posterior": (
        "Filterwise",
        "Full",
        "LowRank",
        "MeanField",
        "Mixture",
        "MixturePosterior",
        "PointMass",
        "Posterior",
        "Samples",
        "register_family",
    ),
    "prediction": ("predict",),
    "predictive": (
        "BernoulliPrediction",
        "CategoricalPrediction",
        "CustomPrediction",
        "GaussianPrediction",
        "HeteroscedasticPrediction",
        "PoissonPrediction",
        "Prediction",
    ),
    "prior": ("GaussianPrior", "Normal"),
    "threat": ("InputSpace", "Threat"),
    "training": ("TrainRun", "train"),
    "trunk.mapped_weights": ("map_weights",),
    "trunk.offloading": ("offload",),
    "trunk.sharding": ("shard",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AbstentionFigures",
    "AbstentionRule",
    "Adapters",
    "AdversarialTraining",
    "ArtifactError",
    "BayesianNetwork",
    "Bernoulli",
    "BernoulliPrediction",
    "Categorical",
    "CategoricalPrediction",
    "CertificateError",
    "CheckpointError",
    "ComponentRecord",
    "CustomLikelihood",
    "CustomPrediction",
    "DataError",
    "ExportError",
    "Exported",
    "Filterwise",
    "Finding",
    "FirstLayer",
    "FitRecord",
    "FitRun",
    "Flipout",
    "Full",
    "Gaussian",
    "GaussianPrediction",
    "GaussianPrior",
    "HMCRun",
    "HeteroscedasticGaussian",
    "HeteroscedasticPrediction",
    "Inference",
    "InputError",
    "InputSpace",
    "Landscape",
    "LayerChoice",
    "LayerComparison",
    "LayerError",
    "LayerLandscape",
    "LayerWidth",
    "Likelihood",
    "LocalReparameterization",
    "LostRankError",
    "LowRank",
    "MeanField",
    "Mixture",
    "MixturePosterior",
    "ModelChangedError",
    "Normal",
    "NotFittedError",
    "Optimum",
    "PerExample",
    "PointMass",
    "Poisson",
    "PoissonPrediction",
    "Posterior",
    "PredictedShards",
    "Prediction",
    "PredictiveModule",
    "PriorSuggestion",
    "PriorTrial",
    "RetrainingOptions",
    "Samples",
    "SharedSample",
    "StageStart",
    "StfClassifier",
    "StfRegressor",
    "StfbnnError",
    "StorageError",
    "TemperatureTrial",
    "Threat",
    "TrainRun",
    "abstention_rule",
    "bayesianize",
    "compare_layers",
    "diagnose",
    "evaluate_abstention",
    "export",
    "fit",
    "from_pretrained",
    "landscape",
    "layer_choices",
    "load",
    "locate_first_layer",
    "map_weights",
    "merge",
    "offload",
    "predict",
    "predict_shards",
    "predictive_module",
    "push_to_hub",
    "register_family",
    "sample_hmc",
    "save",
    "shard",
    "suggest_prior",
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
