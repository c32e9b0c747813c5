"""Leaving this library: the averaged predictive as a module, and as a file for other runtimes."""

from stfbnn.deployment.errors import ExportError
from stfbnn.deployment.exporting import Exported, Format, export
from stfbnn.deployment.predictive_module import PredictiveModule, predictive_module

__all__ = ["ExportError", "Exported", "Format", "PredictiveModule", "export", "predictive_module"]
