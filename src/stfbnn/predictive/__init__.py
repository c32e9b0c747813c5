"""What a prediction is: the predictive distribution of each example, and where its uncertainty comes from."""

from stfbnn.predictive.base import Prediction, Sums
from stfbnn.predictive.bernoulli import BernoulliPrediction
from stfbnn.predictive.categorical import CategoricalPrediction
from stfbnn.predictive.custom import CustomPrediction
from stfbnn.predictive.dispatch import sums_for
from stfbnn.predictive.gaussian import GaussianPrediction, HeteroscedasticPrediction
from stfbnn.predictive.member_outputs import MemberOutputs
from stfbnn.predictive.poisson import PoissonPrediction

__all__ = [
    "BernoulliPrediction",
    "CategoricalPrediction",
    "CustomPrediction",
    "GaussianPrediction",
    "HeteroscedasticPrediction",
    "MemberOutputs",
    "PoissonPrediction",
    "Prediction",
    "Sums",
    "sums_for",
]
