"""Clauses on the recipe and on the posterior as it is built."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from stfbnn.posterior import Posterior, PosteriorFamily
from stfbnn.prior import GaussianPrior
from stfbnn.testing.setting import PRIOR_STD, NotApplicableError, Setting, require


def recipe_builds(setting: Setting) -> None:
    """The recipe has a name and builds a Posterior of that family for the layout."""
    recipe = setting.family
    require(isinstance(recipe, PosteriorFamily), f"{type(recipe).__name__} has no name or no method build")
    require(isinstance(recipe.name, str) and bool(recipe.name), f"the name is {recipe.name!r}, not a word")
    posterior = setting.built()
    require(isinstance(posterior, Posterior), f"build returned a {type(posterior).__name__}, not a Posterior")
    require(
        posterior.family == recipe.name,
        f"the posterior's family is {posterior.family!r}, but the recipe's name {recipe.name!r}",
    )
    require(posterior.layout == setting.layout, f"the posterior's layout is {posterior.layout}")


def recipe_prints_alike(setting: Setting) -> None:
    """Equal recipes have the same repr, by which a checkpoint knows them; a frozen dataclass's does."""
    first, second = repr(setting.family), repr(copy.deepcopy(setting.family))
    require(first == second, f"a recipe and its copy print as {first} and {second}")


def starts_at_the_trained_weights(setting: Setting) -> None:
    """The initial mean is the one that was given, and the initial widths are finite and not negative."""
    posterior, given = setting.built(), setting.mean
    off = float((posterior.mean_vector() - given).detach().abs().max())
    require(off <= 1e-12, f"the initial mean is up to {off:.3g} off the one that was given")
    std = posterior.std_vector().detach()
    require(tuple(std.shape) == tuple(given.shape), f"the initial widths have the shape {tuple(std.shape)}")
    require(bool((torch.isfinite(std) & (std >= 0)).all()), f"an initial width is not a number ≥ 0: {std.tolist()}")


def build_is_repeatable(setting: Setting) -> None:
    """Building twice gives the same, without drawing from torch's global generator."""
    before = torch.random.get_rng_state()
    first, second = setting.built().state_dict(), setting.built().state_dict()
    require(torch.equal(before, torch.random.get_rng_state()), "build draws from torch's global generator")
    require(list(first) == list(second), f"two builds have the tensors {list(first)} and {list(second)}")
    for name, value in first.items():
        require(torch.equal(value, second[name]), f"two builds differ in {name!r}")


def build_takes_copies(setting: Setting) -> None:
    """Changing the mean or the prior in place after the build does not change the posterior."""
    mean, prior = setting.mean, setting.prior()
    posterior = setting.family.build(setting.layout, mean, prior)
    before = _snapshot(posterior)
    for tensor in (mean, prior.mean, prior.std):
        tensor.add_(1)
    _require_unchanged(before, posterior, "the mean or the prior that it was built with")


def named_views_are_copies(setting: Setting) -> None:
    """mean() and std() cut their vectors by the layer's own names, and what they return are detached copies."""
    posterior = setting.posterior()
    before = _snapshot(posterior)
    layout = setting.layout
    for name, named, vector in (
        ("mean", posterior.mean(), posterior.mean_vector()),
        ("std", posterior.std(), posterior.std_vector()),
    ):
        shapes = {key: tuple(value.shape) for key, value in named.items()}
        expected = dict(zip(layout.names, layout.shapes, strict=True))
        require(shapes == expected, f"{name}() has {shapes}, but the layer {expected}")
        require(not any(value.requires_grad for value in named.values()), f"{name}() is not detached")
        require(torch.equal(layout.flatten(named), vector.detach()), f"{name}() and {name}_vector() differ")
        for value in named.values():
            value.add_(1)
    _require_unchanged(before, posterior, "what mean() or std() returned")


def set_std_sets_or_does_nothing(setting: Setting) -> None:
    """set_std on a new posterior makes std_vector the widths given, or changes nothing; the mean stays."""
    posterior = setting.built()
    mean, before = posterior.mean_vector().detach().clone(), posterior.std_vector().detach().clone()
    target = torch.linspace(0.05, 0.5, setting.layout.size, dtype=torch.float64).to(setting.device)
    given = target.clone()
    posterior.set_std(given)
    std = posterior.std_vector().detach()
    require(torch.equal(given, target), "set_std changes the tensor that it is given")
    require(torch.equal(posterior.mean_vector().detach(), mean), "set_std changes the mean")
    off = float((std / target - 1).abs().max())
    require(off <= 1e-9 or torch.equal(std, before), f"after set_std the widths are up to {off:.3g} (relative) off")
    if torch.equal(std, before):
        raise NotApplicableError("set_std changes nothing")


def dtype_follows_the_mean(setting: Setting) -> None:
    """Built from a float32 mean everything is float32, and .double() makes it float64."""
    layout = setting.layout
    mean = setting.mean.float()
    prior = GaussianPrior(torch.zeros_like(mean), mean.new_tensor(PRIOR_STD))
    posterior = setting.family.build(layout, mean, prior)
    noise = setting.noise(posterior, 3)
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            posterior = posterior.double()
        for name, value in (
            ("draw", posterior.draw(noise.to(dtype))),
            ("mean_vector", posterior.mean_vector()),
            ("std_vector", posterior.std_vector()),
        ):
            require(value.dtype == dtype, f"{name} is {value.dtype} for a posterior of {dtype}")
            require(value.device == mean.device, f"{name} is on {value.device}, and the posterior on {mean.device}")


def _snapshot(posterior: Posterior) -> tuple[Tensor, Tensor]:
    return posterior.mean_vector().detach().clone(), posterior.std_vector().detach().clone()


def _require_unchanged(before: tuple[Tensor, Tensor], posterior: Posterior, what: str) -> None:
    same = all(torch.equal(old, new) for old, new in zip(before, _snapshot(posterior), strict=True))
    require(same, f"the posterior changes with {what}: it must keep copies")


CLAUSES = (
    recipe_builds,
    recipe_prints_alike,
    starts_at_the_trained_weights,
    build_is_repeatable,
    build_takes_copies,
    named_views_are_copies,
    set_std_sets_or_does_nothing,
    dtype_follows_the_mean,
)
