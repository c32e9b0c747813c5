"""The model card of a saved posterior: what a person who finds the folder needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stfbnn.errors import InputError
from stfbnn.network import BayesianNetwork

_BYTES_PER_KIB = 1024


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Refuse figures that cannot stand in a table.

    Args:
        metrics: Figures by name.

    Returns:
        The same, as plain floats.

    Raises:
        InputError: A name is not a line of text, or a value is not a finite number.
    """
    figures = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"the name of a metric must be a line of text, but it is {name!r}")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"the metric {name!r} must be a number, but it is a {type(value).__name__}") from error
        if not math.isfinite(number):
            raise InputError(f"the metric {name!r} must be finite, but it is {number}")
        figures[name] = number
    return figures


def model_card(bnn: BayesianNetwork, name: str, metrics: Mapping[str, float], function: str = "load") -> str:
    """Write the model card.

    Args:
        bnn: A fitted network.
        name: The folder's or the repository's name, for the example.
        metrics: Figures by name; may be empty.
        function: The function of this library that loads what is under that name, for the example.

    Returns:
        Markdown, with the front matter that model hubs read.
    """
    likelihood = bnn.require_fitted()
    model, prior = bnn.model_description, bnn.prior_recipe
    size = sum(tensor.numel() * tensor.element_size() for tensor in bnn.posterior.tensors().values())
    layer = f"`{bnn.layer_name}`" if bnn.layer_name else "the whole model, which is one layer"
    shapes = ", ".join(
        f"{own} {'×'.join(map(str, shape))}" for own, shape in zip(bnn.layout.names, bnn.layout.shapes, strict=True)
    )
    center = "the trained weights" if prior.center == "pretrained" else "zero"
    learned = ", learned from the data" if prior.learned else ""
    scales = [f"{scale:.4g}" for scale in bnn.prior.scales.tolist()]
    if prior.per_parameter:
        scales = [f"{scale} ({own})" for own, scale in zip(bnn.layout.names, scales, strict=True)]
    rows = {
        "Model": f"{model.class_name}, {model.parameters:,} parameters",
        "First layer": f"{layer} ({shapes})",
        "Random weights": f"{bnn.layout.size:,}",
        "Posterior": f"{bnn.posterior.family}, {size / _BYTES_PER_KIB:,.1f} KiB",
        "Prior": f"Gaussian, centred on {center}, standard deviation {', '.join(scales)}{learned}",
        "Likelihood": likelihood.name,
        "Temperature T": f"{bnn.temperature:g}",
        "Predictive temperature τ": f"{bnn.predictive_temperature:.4g}",
        "Training examples": "not recorded" if bnn.num_examples is None else f"{bnn.num_examples:,}",
        "Fingerprint of the model": f"`{bnn.model_fingerprint[:16]}…`",
    }
    parts = [
        "---\nlibrary_name: stfbnn\ntags:\n- bayesian\n- uncertainty\n---",
        f"# Bayesian first layer for a {model.class_name}",
        "The posterior of the first layer of a trained network, inferred with all other layers frozen at their trained "
        "values. With it, the network's predictions come with their uncertainty. It is no model by itself: it upgrades the "
        "one network that it was inferred for, whose weights are not in this folder, and loading checks that.",
        _table(("What", "Value"), rows),
    ]
    if metrics:
        parts += ["## Figures", _table(("Metric", "Value"), {key: f"{value:.6g}" for key, value in metrics.items()})]
    extra = ", output=…" if bnn.output is not None else ""
    parts += [
        "## How to load",
        "```python\nimport stfbnn\n\nmodel = ...  # the trained network, with its weights loaded\n"
        f"bnn = stfbnn.{function}({name!r}, model{extra})\nprediction = stfbnn.predict(bnn, inputs)\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(heading: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
