"""PAC-Bayes bounds as objectives of inference: a loss in [0, 1], and a bound of its risk, made linear in risk and KL.

The forms of `bounds` that are objectives here are concave in (r̂, KL) together: the quadratic one is r̂ + B + √(B (2r̂ + B)), with
the geometric mean of two linear functions, McAllester's has the root of one, and the λ-form is a minimum of linear ones. So the
tangent

    a r̂ + b KL + constant,   a = ∂bound/∂r̂,   b = ∂bound/∂KL,

lies above the bound and touches it where it is taken: what lowers the tangent lowers the bound at least as much, and in turn
with a new tangent the bound falls every time (majorisation and minimisation). At fixed (a, b) it is a variational free energy
with the bounded loss in place of the negative log-likelihood, at temperature T = n b/a, which the library's engines minimise as
they stand, without the bias that a minibatch's risk inside a root would have. For the λ-form this is the classical alternation
over Q and λ, for the slope b/a is 1/(nλ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.guarantees.bounds import best_lambda, budget, lambda_bound, mcallester, quadratic_bound
from stfbnn.likelihood import Categorical, Likelihood
from stfbnn.likelihood.base import at_least_float32

Form = Literal["quadratic", "lambda", "mcallester"]


@dataclass(frozen=True)
class Tangent:
    """A bound and its slopes at one (r̂, KL).

    Attributes:
        bound: Its value there; may be above 1.
        by_risk: a = ∂bound/∂r̂.
        by_kl: b = ∂bound/∂KL, per nat.
        temperature: T = n b/a: minimising r̂ + (T/n) KL goes down the bound.
        lam: λ, for the λ-form; None for the others.
    """

    bound: float
    by_risk: float
    by_kl: float
    temperature: float
    lam: float | None


@dataclass(frozen=True)
class BoundObjective:
    """A bound on the risk of a loss in [0, 1] as a function of the empirical risk r̂ and KL(Q‖P).

    Attributes:
        form: "quadratic"; "lambda", at its best λ, where it equals the quadratic one; or "mcallester".
        num_examples: n, at least 8.
        delta: The probability δ with which the bound may fail.
        priors: k, the number of priors among which P is picked on the same examples.

    Raises:
        InputError: The form is unknown, or a number is out of range.
    """

    form: Form
    num_examples: int
    delta: float
    priors: int = 1

    def __post_init__(self) -> None:
        check_form(self.form)
        budget(0.0, self.num_examples, self.delta, self.priors)

    def value(self, risk: Tensor, kl: Tensor, lam: float | None = None) -> Tensor:
        """The bound, differentiable in both.

        Args:
            risk: r̂, a scalar.
            kl: KL(Q‖P), nats, a scalar.
            lam: λ for the λ-form; None takes the best one, as a constant.
        """
        if self.form == "quadratic":
            return quadratic_bound(risk, kl, self.num_examples, self.delta, self.priors)
        if self.form == "mcallester":
            return mcallester(risk, kl, self.num_examples, self.delta, self.priors)
        best = self.best_lambda(float(risk.detach()), float(kl.detach())) if lam is None else lam
        chosen = risk.new_tensor(best)
        return lambda_bound(risk, kl, self.num_examples, self.delta, chosen, self.priors)

    def best_lambda(self, risk: float, kl: float) -> float:
        """The λ at which the λ-form is least."""
        return best_lambda(risk, kl, self.num_examples, self.delta, self.priors)

    def tangent(self, risk: float, kl: float) -> Tangent:
        """The bound and its slopes at (r̂, KL)."""
        at_risk = torch.tensor(risk, dtype=torch.float64, requires_grad=True)
        at_kl = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            bound = self.value(at_risk, at_kl)
        by_risk, by_kl = (float(slope) for slope in torch.autograd.grad(bound, (at_risk, at_kl)))
        lam = self.best_lambda(risk, kl) if self.form == "lambda" else None
        return Tangent(float(bound.detach()), by_risk, by_kl, self.num_examples * by_kl / by_risk, lam)


class BoundedCrossEntropy(Likelihood):
    """−log max(p_y, p_min) / log(1/p_min), in [0, 1] (Pérez-Ortiz et al. 2021), in the place of a negative log-likelihood.

    Unlike the 0-1 loss it has gradients, and unlike the cross-entropy it is bounded. It has no gradient where p_y ≤ p_min.

    Args:
        classes: How outputs become class probabilities: every class is to count the same and none to be left out.
        p_min: Probability in (0, 1) below which the loss stays at 1.

    Attributes:
        scale: log(1/p_min): nats that a loss of 1 stands for.

    Raises:
        InputError: The likelihood is not one of classes, weighs or leaves out some, or ``p_min`` is out of range.
    """

    name: ClassVar[str] = "bounded-cross-entropy"

    def __init__(self, classes: Likelihood, p_min: float = 1e-5) -> None:
        super().__init__()
        check_p_min(p_min)
        if not isinstance(classes, Categorical):
            raise InputError(
                f"the bound is for classification with one class an example, whose loss can be bounded, but the likelihood is "
                f'{classes.name!r}; use likelihood="categorical" with integer targets'
            )
        if classes.class_weights is not None or classes.ignore_index is not None:
            raise InputError(
                "a bound counts every example alike: class_weights or ignore_index would make another loss of it; use "
                "likelihood=stfbnn.Categorical() without them, and leave out of the data what is not to count"
            )
        self.classes, self.p_min = classes, float(p_min)
        self.scale = -math.log(self.p_min)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As the likelihood of classes, with one target an example.

        Raises:
            InputError: Outputs or targets do not fit.
        """
        self.classes.check(outputs, targets)
        if targets.ndim != 1:
            raise InputError(
                f"the bound is for one class an example, but the targets are {tuple(targets.shape)}: the positions of one "
                f"example are not independent of each other"
            )

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Minus the loss, (B,), so that what minimises a negative log-likelihood minimises it."""
        true = self.classes.log_prob(at_least_float32(outputs), targets)
        return true.clamp_min(-self.scale) / self.scale

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the 0-1 loss of every example, (B,) each."""
        wrong = self.classes.log_probs(at_least_float32(outputs)).argmax(dim=1) != targets
        return -self.log_prob(outputs, targets), wrong.to(torch.float32)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Classes drawn from the unbounded likelihood."""
        return self.classes.sample(outputs, generator)

    def config(self) -> dict[str, Any]:
        """``p_min``; the classes are the caller's."""
        return {"p_min": self.p_min}

    def rebuilt(self, config: dict[str, Any]) -> BoundedCrossEntropy:
        """With the same classes."""
        return BoundedCrossEntropy(self.classes, **config)


def check_form(form: str) -> None:
    """Refuse a form that is not known.

    Raises:
        InputError: It is not.
    """
    if form not in get_args(Form):
        raise InputError(f"objective must be one of {sorted(get_args(Form))}, but it is {form!r}")


def check_p_min(p_min: float) -> None:
    """Refuse a floor that is no probability strictly between 0 and 1.

    Raises:
        InputError: It is not.
    """
    if isinstance(p_min, bool) or not isinstance(p_min, int | float) or not 0 < p_min < 1:
        raise InputError(f"p_min must be a probability between 0 and 1, such as 1e-5, but it is {p_min!r}")
