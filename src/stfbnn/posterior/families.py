"""The families by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stfbnn.errors import InputError
from stfbnn.posterior.base import PosteriorFamily
from stfbnn.posterior.filterwise import Filterwise
from stfbnn.posterior.full import Full
from stfbnn.posterior.low_rank import LowRank
from stfbnn.posterior.mean_field import MeanField
from stfbnn.posterior.point import PointMass

# Those that can be a component of a mixture; the mixture itself is added in the package's own file.
COMPONENT_FAMILIES: dict[str, Callable[..., PosteriorFamily]] = {
    "mean-field": MeanField,
    "low-rank": LowRank,
    "filterwise": Filterwise,
    "full": Full,
    "point": PointMass,
}


def family_recipe(
    posterior: str | PosteriorFamily, families: Mapping[str, Callable[..., PosteriorFamily]]
) -> PosteriorFamily:
    """Turn a name, by ``families``, or a recipe into a recipe.

    Raises:
        InputError: The name is unknown, or the object is no recipe.
    """
    if isinstance(posterior, str):
        if posterior not in families:
            raise InputError(f"posterior={posterior!r} is not a known family; choose one of {sorted(families)}")
        return families[posterior]()
    if isinstance(posterior, type) or not isinstance(posterior, PosteriorFamily):
        raise InputError(
            f"posterior must be a name or a recipe such as stfbnn.MeanField(), but it is a {type(posterior).__name__}"
        )
    return posterior
