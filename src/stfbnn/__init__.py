"""Make the first layer of a trained network Bayesian, and know when not to trust its predictions."""
