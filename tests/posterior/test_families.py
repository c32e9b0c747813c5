"""Families by name, from bayesianize to a loaded file, and families of a user's own."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from core_models import classification, conv_net, mlp
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import ArtifactError, InputError
from stfbnn.inference.fit import fit
from stfbnn.posterior import _FAMILIES as FAMILIES
from stfbnn.posterior import (
    Filterwise,
    Full,
    LowRank,
    MeanField,
    MeanFieldPosterior,
    Mixture,
    ParameterLayout,
    families,
    register_family,
    resolve_family,
)
from stfbnn.prediction import predict
from stfbnn.prior import GaussianPrior


def linear_case() -> tuple[nn.Module, Tensor, Tensor]:
    return (mlp().eval(), *classification(40))


def conv_case() -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return conv_net(), x, torch.arange(24) % 3


@pytest.mark.parametrize("case", [linear_case, conv_case])
@pytest.mark.parametrize("family", ["low-rank", "filterwise", "full", LowRank(rank=2), Full(initial_std=0.01)], ids=str)
def test_from_the_network_to_a_loaded_file(family: Any, case: Any, tmp_path: Path) -> None:
    model, x, y = case()
    bnn = bayesianize(model, x, posterior=family)
    torch.testing.assert_close(bnn.posterior.mean_vector().detach(), bnn.trained_vector())
    before = {name: value.detach().clone() for name, value in bnn.posterior.named_parameters()}
    fit(bnn, [(x, y)] * 3, epochs=2, engine="bayes-by-backprop", temperature=0.5, progress=False)
    for name, value in bnn.posterior.named_parameters():
        assert not torch.equal(value, before[name]), name
    expected = predict(bnn, x, samples=4, seed=3).probs
    assert not torch.allclose(expected, predict(bnn, x, samples=1, weights="mean").probs)
    loaded = load(save(bnn, tmp_path / "posterior"), model)
    assert type(loaded.posterior) is type(bnn.posterior)
    assert loaded.posterior.family == bnn.posterior.family
    assert torch.equal(predict(loaded, x, samples=4, seed=3).probs, expected)
    torch.testing.assert_close(loaded.posterior.covariance(), bnn.posterior.covariance())


def test_a_file_of_another_rank_builds_that_rank(tmp_path: Path) -> None:
    model, x, y = linear_case()
    bnn = bayesianize(model, x, posterior=LowRank(rank=3))
    fit(bnn, [(x, y)], epochs=1, engine="bayes-by-backprop", temperature=1.0, progress=False)
    assert load(save(bnn, tmp_path / "posterior"), model).posterior.config() == {"rank": 3}


def test_layers_without_common_output_units_have_no_filterwise_posterior() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mix(x, x, x)[0].flatten(1))

    model, x = Attention(), torch.randn(4, 2, 4)
    with pytest.raises(InputError, match=r"in_proj_weight \(12, 4\).*out_proj.weight \(4, 4\)"):
        bayesianize(model, x, posterior="filterwise")
    assert bayesianize(model, x, posterior="low-rank").posterior.family == "low-rank"


def test_the_names() -> None:
    for name, recipe in (("low-rank", LowRank), ("filterwise", Filterwise), ("full", Full)):
        assert type(resolve_family(name)) is recipe
        assert resolve_family(name).name == name


class WidePosterior(MeanFieldPosterior):
    family: ClassVar[str] = "wide"


@dataclass(frozen=True)
class Wide:
    """A user's own recipe."""

    @property
    def name(self) -> str:
        return "wide"

    def build(self, layout: ParameterLayout, mean: Tensor, prior: GaussianPrior) -> WidePosterior:
        return WidePosterior(layout, mean, prior.std)


@pytest.fixture
def registry() -> Iterator[None]:
    kept = dict(FAMILIES), dict(families.COMPONENT_FAMILIES)
    yield
    for known, before in zip((FAMILIES, families.COMPONENT_FAMILIES), kept, strict=True):
        known.clear()
        known.update(before)


@pytest.mark.usefixtures("registry")
def test_a_family_of_the_users_own(tmp_path: Path) -> None:
    model, x, y = linear_case()
    with pytest.raises(InputError, match="wide"):
        bayesianize(model, x, posterior="wide")
    assert register_family(Wide) is Wide
    register_family(Wide)
    bnn = bayesianize(model, x, posterior="wide")
    fit(bnn, [(x, y)], epochs=1, engine="bayes-by-backprop", temperature=1.0, progress=False)
    loaded = load(save(bnn, tmp_path / "posterior"), model)
    assert type(loaded.posterior) is WidePosterior
    assert type(Mixture(components=2, family="wide").component_family()) is Wide


def test_without_registration_it_is_not_saved(tmp_path: Path) -> None:
    model, x, y = linear_case()
    bnn = bayesianize(model, x, posterior=Wide())
    fit(bnn, [(x, y)], epochs=1, engine="bayes-by-backprop", temperature=1.0, progress=False)
    with pytest.raises((InputError, ArtifactError), match="user's own making"):
        save(bnn, tmp_path / "posterior")


@pytest.mark.usefixtures("registry")
def test_taken_names_and_unusable_recipes_are_refused() -> None:
    taken = type("Other", (MeanField,), {})
    with pytest.raises(InputError, match="taken"):
        register_family(taken)
    with pytest.raises(InputError, match="class"):
        register_family(MeanField())  # type: ignore[type-var]
    with pytest.raises(InputError, match="name"):
        register_family(int)

    class NeedsArguments(Wide):
        def __init__(self, width: float) -> None:
            pass

    with pytest.raises(InputError, match="without arguments"):
        register_family(NeedsArguments)


@pytest.mark.parametrize("recipe", [MeanField, LowRank, Filterwise, Full])
@pytest.mark.parametrize("width", ["wide", 0.0, True, math.inf])
def test_an_initial_width_that_is_none_is_refused(recipe: Any, width: object) -> None:
    with pytest.raises(InputError, match="initial_std must be positive and finite"):
        recipe(initial_std=width)


def test_a_recipes_class_is_no_recipe() -> None:
    with pytest.raises(InputError, match="must be a name or a recipe"):
        bayesianize(nn.Linear(2, 2), torch.ones(1, 2), posterior=Mixture)  # type: ignore[arg-type]
