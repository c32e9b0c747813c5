"""The likelihood p(y | f(x)): how a network's output becomes a log-probability of the target."""

from stfbnn.likelihood.base import Likelihood
from stfbnn.likelihood.bernoulli import Bernoulli
from stfbnn.likelihood.categorical import Categorical
from stfbnn.likelihood.custom import CustomLikelihood
from stfbnn.likelihood.gaussian import Gaussian
from stfbnn.likelihood.heteroscedastic import HeteroscedasticGaussian
from stfbnn.likelihood.names import LikelihoodLike, build_likelihood, resolve_likelihood
from stfbnn.likelihood.poisson import Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "CustomLikelihood",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "LikelihoodLike",
    "Poisson",
    "build_likelihood",
    "resolve_likelihood",
]
