"""The posterior families: q(w) over the first layer's parameters, one family a file."""

from __future__ import annotations

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior, PosteriorFamily
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.mean_field import MeanField, MeanFieldPosterior

__all__ = ["MeanField", "MeanFieldPosterior", "ParameterLayout", "Posterior", "PosteriorFamily", "resolve_family"]

_FAMILIES: dict[str, type[MeanField]] = {"mean-field": MeanField}


def resolve_family(posterior: str | PosteriorFamily) -> PosteriorFamily:
    """Turn what ``bayesianize(posterior=…)`` was given into a recipe.

    Raises:
        InputError: The name is unknown, or the object is no recipe.
    """
    if isinstance(posterior, str):
        if posterior not in _FAMILIES:
            raise InputError(f"posterior={posterior!r} is not a known family; choose one of {sorted(_FAMILIES)}")
        return _FAMILIES[posterior]()
    if not isinstance(posterior, PosteriorFamily):
        raise InputError(
            f"posterior must be a name or a recipe such as stfbnn.MeanField(), but it is a {type(posterior).__name__}"
        )
    return posterior
