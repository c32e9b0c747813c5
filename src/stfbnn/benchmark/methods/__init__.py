"""The methods, by name, in the order in which they are run and shown."""

from stfbnn.benchmark.methods.base import Context, Fitted, Method, Trained
from stfbnn.benchmark.methods.bayesian import BAYESIAN
from stfbnn.benchmark.methods.first_layer import FIRST_LAYER
from stfbnn.benchmark.methods.networks import NETWORKS

METHODS: dict[str, Method] = {method.name: method for method in (*NETWORKS, *BAYESIAN, *FIRST_LAYER)}

__all__ = ["METHODS", "Context", "Fitted", "Method", "Trained"]
