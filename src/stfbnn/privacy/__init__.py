"""Membership inference: what a released predictive, and a released posterior file, tell of who was in the training data."""
