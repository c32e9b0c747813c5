"""What a user would pick instead, to be compared with on equal terms.

Each is a `Predictor`: ``outputs(data)`` gives the raw outputs of its members, from which predictions are made.
"""

from stfbnn.baselines.deep_ensemble import DeepEnsemble
from stfbnn.baselines.laplace import LaplacePredictor, fit_laplace
from stfbnn.baselines.last_layer import LastLayerPredictor, fit_last_layer
from stfbnn.baselines.mc_dropout import MCDropout, with_dropout
from stfbnn.baselines.networks import PointNetwork
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import Predictor, Reading, residual_noise
from stfbnn.baselines.swag import SWAG, SWAGPosterior, fit_swag
from stfbnn.baselines.temperature_scaling import fit_temperature, scale
from stfbnn.baselines.whole_network import bayesianize_whole, fit_whole_network

__all__ = [
    "SWAG",
    "BayesianPredictor",
    "DeepEnsemble",
    "LaplacePredictor",
    "LastLayerPredictor",
    "MCDropout",
    "PointNetwork",
    "Predictor",
    "Reading",
    "SWAGPosterior",
    "bayesianize_whole",
    "fit_laplace",
    "fit_last_layer",
    "fit_swag",
    "fit_temperature",
    "fit_whole_network",
    "residual_noise",
    "scale",
    "with_dropout",
]
