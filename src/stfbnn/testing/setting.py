"""The setting in which a family is checked: a small layer, its prior, and a posterior that has been moved about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.posterior import ParameterLayout, Posterior, PosteriorFamily
from stfbnn.prior import GaussianPrior
from stfbnn.randomness import generator

# Three output units of four inputs, with biases: every family can be built for it, and a matrix of its weights is small.
LAYOUT = ParameterLayout(("weight", "bias"), ((3, 2, 2), (3,)))
PRIOR_STD = 0.7
# Chance that a family that keeps the contract is refused by any of the comparisons with random draws, together.
FALSE_ALARM = 1e-6
# Rounding in double precision, relative to the numbers compared.
ROUNDING = 1e-9

_STEPS = 40
_STEP_DRAWS = 16
_RATE = 0.03
_SLOPE = 1e-5


class ContractError(AssertionError):
    """A posterior family breaks a clause of the contract; says which, what was found and what was expected."""


class NotApplicableError(Exception):
    """A clause asks for something that a family declares not to have; raised and caught within the suite."""


@dataclass(frozen=True)
class Setting:
    """A family under test; computes in double precision.

    Attributes:
        family: The recipe.
        layout: A layer of the shape to check it on. Small: it is drawn 100,000 times.
        prepare: Brings a posterior that was just built into the state to check, in place; None takes some steps of
            optimisation, so that nothing is checked in its initial, too simple state only.
        seed: Of all random numbers.
        draws: Weight draws for the comparisons with random draws; the more, the smaller an error that is found.
        device: Where to build and draw.

    Raises:
        InputError: ``draws`` is too small for the statistics.
    """

    family: PosteriorFamily
    layout: ParameterLayout = LAYOUT
    prepare: Callable[[Posterior], None] | None = None
    seed: int = 0
    draws: int = 100_000
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.draws < 1000:
            raise InputError(f"the checks need at least 1000 draws, but draws={self.draws}")

    def random(self, *shape: int, purpose: str = "numbers") -> Tensor:
        """Standard normal numbers in double precision; of the same purpose and shape always the same."""
        numbers = torch.randn(*shape, generator=generator(self.seed, purpose), dtype=torch.float64)
        return numbers.to(self.device)

    @property
    def mean(self) -> Tensor:
        """The trained weights, (d,): a new tensor."""
        return 0.5 * self.random(self.layout.size, purpose="mean")

    def prior(self, std: Tensor | float = PRIOR_STD, purpose: str = "prior") -> GaussianPrior:
        """A Gaussian prior that is centred neither at zero nor at the trained weights."""
        width = torch.as_tensor(std, dtype=torch.float64).to(self.device)
        return GaussianPrior(0.3 * self.random(self.layout.size, purpose=purpose), width)

    def built(self) -> Posterior:
        """A posterior as the recipe makes it."""
        return self.family.build(self.layout, self.mean, self.prior())

    def posterior(self) -> Posterior:
        """A posterior in the state to check: a copy, to do anything with."""
        fresh = self.built()
        fresh.load_state_dict(self._state)
        return fresh

    def noise(self, posterior: Posterior, *leading: int, purpose: str = "noise") -> Tensor:
        """Standard normal noise for draws of a posterior, (*leading, noise_size)."""
        return self.random(*leading, posterior.noise_size, purpose=purpose)

    def weights(self, posterior: Posterior, purpose: str = "noise") -> Tensor:
        """Many draws, (draws, d)."""
        with torch.no_grad():
            return posterior.draw(self.noise(posterior, self.draws, purpose=purpose))

    def require_agreement(self, what: str, samples: Tensor, value: Tensor) -> None:
        """Compare the means of independent samples (n, …) with what they should be (…), as exactly as their scatter allows.

        Raises:
            ContractError: One is further off than chance explains.
        """
        error = samples.std(dim=0) / len(samples) ** 0.5
        self.require_close(what, samples.mean(dim=0), value, error)

    def require_close(self, what: str, found: Tensor, value: Tensor, error: Tensor) -> None:
        """Compare estimates with values, given the estimates' standard errors.

        Raises:
            ContractError: One is further off than chance explains.
        """
        off = (found - value).abs()
        allowed = self._bound * error + ROUNDING * (1 + value.abs())
        # Not-a-number is not within anything.
        wrong = ~(off <= allowed)
        if bool(wrong.any()):
            worst = int(torch.where(off.isnan(), torch.inf, off / allowed).argmax())
            raise ContractError(
                f"{what}: {found.flatten()[worst]:.6g} in {self.draws} draws, but {value.flatten()[worst]:.6g} was claimed, "
                f"at most {allowed.flatten()[worst]:.2g} off; {int(wrong.sum())} of {wrong.numel()} numbers are wrong"
            )

    @property
    def _bound(self) -> float:
        """Standard errors such that all comparisons together raise a false alarm with FALSE_ALARM (Bonferroni)."""
        size = self.layout.size
        comparisons = 2 * size + size * (size + 1) // 2 + 10
        return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * comparisons))

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        posterior = self.built()
        if self.prepare is not None:
            self.prepare(posterior)
        else:
            self._optimise(posterior)
        return {name: value.detach().clone() for name, value in posterior.state_dict().items()}

    def _optimise(self, posterior: Posterior) -> None:
        """Adam on a quadratic loss with correlations, plus the divergence where there is one."""
        parameters = [parameter for parameter in posterior.parameters() if parameter.requires_grad]
        if not parameters:
            return
        size, prior = self.layout.size, self.prior()
        directions = self.random(size, size, purpose="loss") * (3 / size) ** 0.5
        adam = torch.optim.Adam(parameters, lr=_RATE)
        for step in range(_STEPS):
            drawn = posterior.draw(self.noise(posterior, _STEP_DRAWS, purpose=f"step {step}"))
            loss = 0.5 * ((drawn - 0.2) @ directions).square().sum(dim=1).mean()
            with suppress(InputError):  # a family without a divergence
                loss = loss + posterior.kl(prior)
            if not loss.requires_grad:
                # A clause of its own says so.
                return
            adam.zero_grad()
            loss.backward()
            adam.step()


def require(holds: bool, message: str) -> None:
    """Raise a ContractError with this message unless ``holds``."""
    if not holds:
        raise ContractError(message)


def if_defined(compute: Callable[[], Tensor]) -> Tensor:
    """What a family computes, unless it declares by an InputError that it has no such thing.

    Raises:
        NotApplicableError: It declares so.
    """
    try:
        return compute()
    except InputError as error:
        raise NotApplicableError(str(error)) from error


def require_slopes(setting: Setting, what: str, posterior: Posterior, compute: Callable[[], Tensor]) -> None:
    """Compare a scalar's gradient by the posterior's parameters with its slopes in some random directions.

    Raises:
        ContractError: They differ: some dependence is not differentiated, or wrongly.
        NotApplicableError: There are no parameters.
    """
    parameters = {name: value for name, value in posterior.named_parameters() if value.requires_grad}
    if not parameters:
        raise NotApplicableError("the family has no parameters to optimise")
    value = compute()
    require(value.requires_grad, f"{what} does not depend differentiably on any parameter")
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for number in range(3):
        moves = [setting.random(*p.shape, purpose=f"direction {number} {name}") for name, p in parameters.items()]
        slope = sum(float((g * move).sum()) for g, move in zip(gradients, moves, strict=True) if g is not None)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, move in zip(parameters.values(), moves, strict=True):
                    parameter.add_(move, alpha=sign * _SLOPE)
                ends.append(float(compute()))
                for parameter, move in zip(parameters.values(), moves, strict=True):
                    parameter.sub_(move, alpha=sign * _SLOPE)
        measured = (ends[0] - ends[1]) / (2 * _SLOPE)
        require(
            abs(measured - slope) <= 1e-4 * (abs(slope) + abs(measured)) + 1e-6 * (1 + abs(ends[0])),
            f"{what} changes by {measured:.6g} per step along a random direction of the parameters, but its gradient says "
            f"{slope:.6g}",
        )
