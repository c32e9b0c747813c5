"""Figures made readable: tables and pictures of several methods side by side."""

from stfbnn.report.plots import reliability_diagram, save_figure, uncertainty_histogram
from stfbnn.report.tables import Column, Comparison, compare, known_column

__all__ = [
    "Column",
    "Comparison",
    "compare",
    "known_column",
    "reliability_diagram",
    "save_figure",
    "uncertainty_histogram",
]
