"""The posterior families: q(w) over the first layer's parameters, one family a file.

A family of the user's own is a subclass of `Posterior` and a recipe for it. `stfbnn.testing.check_family` says whether they
keep the contract, and `register_family` makes the recipe known by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stfbnn.errors import InputError
from stfbnn.posterior.base import Posterior, PosteriorFamily
from stfbnn.posterior.block_gaussian import BlockGaussianPosterior
from stfbnn.posterior.families import COMPONENT_FAMILIES, family_recipe
from stfbnn.posterior.filterwise import Filterwise
from stfbnn.posterior.full import Full
from stfbnn.posterior.layout import ParameterLayout
from stfbnn.posterior.low_rank import LowRank, LowRankPosterior
from stfbnn.posterior.mean_field import MeanField, MeanFieldPosterior
from stfbnn.posterior.mixture import Mixture, MixturePosterior, components_of
from stfbnn.posterior.point import PointMass, PointMassPosterior
from stfbnn.posterior.samples import SampledPosterior, Samples

__all__ = [
    "BlockGaussianPosterior",
    "Filterwise",
    "Full",
    "LowRank",
    "LowRankPosterior",
    "MeanField",
    "MeanFieldPosterior",
    "Mixture",
    "MixturePosterior",
    "ParameterLayout",
    "PointMass",
    "PointMassPosterior",
    "Posterior",
    "PosteriorFamily",
    "SampledPosterior",
    "Samples",
    "build_family",
    "components_of",
    "register_family",
    "resolve_family",
]

_FAMILIES: dict[str, Callable[..., PosteriorFamily]] = {**COMPONENT_FAMILIES, "mixture": Mixture, "samples": Samples}

Recipe = TypeVar("Recipe", bound=type)


def register_family(recipe: Recipe) -> Recipe:
    """Make a family known by its name: to ``bayesianize(posterior="…")``, to mixtures of it, and to `stfbnn.load`.

    A program that loads a posterior of this family has to register it first. Can be used as a class decorator.

    Args:
        recipe: The class of the recipe, which can be made without arguments; see `PosteriorFamily`.

    Returns:
        The same class.

    Raises:
        InputError: It is no such class, or another class has its name already.
    """
    if not isinstance(recipe, type):
        raise InputError(f"register_family takes a recipe's class, but it was given {recipe!r}")
    try:
        example = recipe()
    except TypeError as error:
        raise InputError(f"the recipe {recipe.__name__} cannot be made without arguments: {error}") from error
    if not isinstance(example, PosteriorFamily) or not isinstance(example.name, str):
        raise InputError(f"the recipe {recipe.__name__} needs a name, which is a string, and a method build")
    known = _FAMILIES.get(example.name)
    if known is not None and known is not recipe:
        raise InputError(f"the name {example.name!r} is taken by {known!r}; give the family another one")
    _FAMILIES[example.name] = COMPONENT_FAMILIES[example.name] = recipe
    return recipe


def resolve_family(posterior: str | PosteriorFamily) -> PosteriorFamily:
    """Turn what ``bayesianize(posterior=…)`` was given into a recipe.

    Raises:
        InputError: The name is unknown, or the object is no recipe.
    """
    return family_recipe(posterior, _FAMILIES)


def build_family(name: str, settings: Mapping[str, Any]) -> PosteriorFamily:
    """Make the recipe of a family by its name and settings.

    Raises:
        InputError: The name is unknown, or the family does not take these settings.
    """
    recipe: Any = type(resolve_family(name))
    try:
        made: PosteriorFamily = recipe(**settings)
    except TypeError as error:
        known = list(inspect.signature(recipe).parameters)
        raise InputError(f"the posterior {name!r} has the settings {known}, but was given {dict(settings)}") from error
    return made
