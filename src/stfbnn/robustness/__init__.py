"""Adversarial robustness: attacks that know of the posterior, checks of the attacks themselves, and what they found."""
