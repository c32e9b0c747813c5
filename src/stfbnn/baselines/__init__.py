"""What a user would pick instead, to be compared with on equal terms."""

from stfbnn.baselines.temperature_scaling import fit_temperature, scale

__all__ = ["fit_temperature", "scale"]
