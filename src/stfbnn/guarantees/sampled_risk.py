"""The empirical risk R̂_S(Q) of the sampled classifier, with an independent weight draw for every example.

Antithetic, quasi-Monte-Carlo and flipout draws are not independent, and one draw shared by all examples is a single one: none
of them is used here, so that n examples in one pass are n draws, as the Monte-Carlo part of a certificate counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, Batch, Inputs, rechunk, to_device
from stfbnn.errors import InputError
from stfbnn.guarantees.draw_per_example import ExampleDraws
from stfbnn.inference.loaders import kept_generators, length, require_rereadable
from stfbnn.inference.survey import checked_batch
from stfbnn.likelihood import Bernoulli, Categorical, Likelihood
from stfbnn.likelihood.base import match
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Posterior
from stfbnn.progress import progress_bar
from stfbnn.provenance import Provenance, ProvenanceRecorder
from stfbnn.randomness import generator, seeded

Loss: TypeAlias = Literal["0-1", "cross-entropy", "1 - p"]
"""Losses in [0, 1]: an error, with a tie as one; −ln max(p_y, p_min)/ln(1/p_min); 1 − p_y."""

LOSSES: tuple[Loss, ...] = get_args(Loss)
P_MIN = 1e-5


@dataclass(frozen=True)
class SampledRisk:
    """Sums of losses, each example's with weight draws of its own.

    Attributes:
        totals: The sum of each loss, over all examples and passes.
        examples: n.
        draws: M, independent draws: n times the passes. Where the posterior has only one weight vector nothing is drawn, and
            M is n.
        way: How they were made: see `ExampleDraws`.
        provenance: The distinct examples.
    """

    totals: Mapping[Loss, float]
    examples: int
    draws: int
    way: str
    provenance: Provenance

    def mean(self, loss: Loss) -> float:
        """The mean of a loss over all draws: an unbiased estimate of R̂_S(Q)."""
        return self.totals[loss] / self.draws


def sampled_risk(
    bnn: BayesianNetwork,
    data: Any,
    *,
    losses: Sequence[Loss] = ("0-1",),
    posterior: Posterior | None = None,
    passes: int = 1,
    p_min: float = P_MIN,
    predictive_temperature: float | None = None,
    seed: int = 0,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    progress: bool | None = None,
) -> SampledRisk:
    """Estimate R̂_S(Q) = (1/n) Σ_n E_q[ℓ(y_n, f(x_n, w))] with weights drawn anew for every example and every pass.

    The result follows from the seed and from the order in which the data come; not from how they are cut into batches.

    Args:
        bnn: A fitted classifier: its likelihood is categorical, or Bernoulli with one label.
        data: S: a loader or a list of batches (inputs, target) or mappings, or one such batch. Weights of examples are left
            out, for a risk counts every example as one.
        losses: Which losses to sum, of the same draws.
        posterior: Q; None takes the network's own. A posterior of a single weight vector is the deterministic classifier.
        passes: How many draws every example gets.
        p_min: Where bounded cross-entropy cuts the probability off, in (0, 1).
        predictive_temperature: τ; None takes the network's. It matters for all losses but 0-1.
        seed: Of the draws.
        target_key: The target's entry in mappings.
        weight_key: The entry of the examples' weights in mappings.
        progress: Show a progress bar; None shows it on a terminal.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: The network is no classifier with one label an example, an argument is out of range, or a batch is not
            usable.
    """
    likelihood = require_classifier(bnn)
    tau = checked_options(bnn, losses, passes, p_min, predictive_temperature)
    loader, shown = as_loader(data)
    bnn.check_unchanged()
    chosen = bnn.posterior if posterior is None else posterior
    totals, examples = torch.zeros(len(losses), dtype=torch.float64), 0
    repeated = passes if chosen.noise_size else 1
    with (
        bnn.computing_in(None),
        progress_bar("draw for each example", length(loader), shown if progress is None else progress) as bar,
        kept_generators(loader),
    ):
        with seeded(seed, "sampled risk", "example"), kept_generators(loader):
            first = _first(loader, target_key, weight_key)
        draws = ExampleDraws(bnn, chosen, to_device(first.rows(0, 3).inputs, bnn.device))
        with seeded(seed, "sampled risk"):
            recorder = ProvenanceRecorder()
            batches = _read(loader, target_key, weight_key, recorder, bar.advance)
            for number, batch in enumerate(_chunks(batches, draws.chunk_rows(first.inputs))):
                one = batch.to(bnn.device)
                for index in range(repeated):
                    random = generator(seed, "sampled risk", index, number)
                    outputs = draws.outputs(one.inputs, random).cpu()
                    if not examples:
                        _require_single(likelihood, outputs, batch.target.cpu())
                    _require_targets(likelihood, outputs, batch.target.cpu())
                    totals += _sums(outputs, batch.target.cpu(), likelihood, losses, tau, p_min)
                examples += len(batch)
    sums = dict(zip(losses, totals.tolist(), strict=True))
    return SampledRisk(sums, examples, examples * repeated, draws.way, recorder.finish())


def require_classifier(bnn: BayesianNetwork) -> Categorical | Bernoulli:
    """The likelihood of a network whose examples have one class or one 0-or-1 label each.

    Raises:
        NotFittedError: `fit` has not run.
        InputError: The likelihood is of another kind.
    """
    likelihood = bnn.require_fitted()
    if not isinstance(likelihood, Categorical | Bernoulli):
        raise InputError(
            f"a certificate bounds the risk of a classification, but this network's likelihood is {likelihood.name!r}"
        )
    return likelihood


def checked_options(
    bnn: BayesianNetwork, losses: Sequence[str], passes: int, p_min: float, predictive_temperature: float | None
) -> float:
    """Check what `sampled_risk` was asked for.

    Returns:
        τ.

    Raises:
        InputError: An argument is unknown or out of range.
    """
    unknown = [loss for loss in losses if loss not in LOSSES]
    if unknown or not losses:
        raise InputError(f"the losses are {list(LOSSES)}, but {unknown or losses!r} was asked for")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise InputError(f"passes must be a positive integer, but it is {passes!r}")
    if isinstance(p_min, bool) or not isinstance(p_min, int | float) or not 0 < p_min < 1:
        raise InputError(f"p_min must lie between 0 and 1, but it is {p_min!r}")
    tau = bnn.predictive_temperature if predictive_temperature is None else predictive_temperature
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau < math.inf:
        raise InputError(f"predictive_temperature must be positive and finite, but it is {tau!r}")
    return float(tau)


def as_loader(data: Any) -> tuple[Iterable[Any], bool | None]:
    """Data as something that gives batches each time it is read, and False where it is one batch, which needs no bar.

    Raises:
        InputError: It can be read only once, or cannot be read at all.
    """
    if isinstance(data, Tensor):
        raise InputError("data are a tensor without targets; give batches (inputs, target)")
    if isinstance(data, tuple | Mapping):
        return [data], False
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise InputError(
            f"data must be a loader, a list of batches or one batch, which can be read more than once, but they are a "
            f"{type(data).__name__}"
        )
    require_rereadable(data)
    return data, None


def example_losses(
    outputs: Tensor,
    target: Tensor,
    likelihood: Categorical | Bernoulli,
    loss: Loss,
    tau: float = 1.0,
    p_min: float = P_MIN,
) -> Tensor:
    """One loss in [0, 1] of every example, (B,), in float64; outputs that are not numbers count as 1.

    Args:
        outputs: (B, K) of classes, or (B,) or (B, 1) of one label.
        target: (B,), or (B, 1) of one label.
        likelihood: What the outputs mean.
        loss: Which.
        tau: τ, by which logits are divided.
        p_min: Of bounded cross-entropy.
    """
    found = outputs.double()
    if loss == "0-1":
        # A tie is an error, whatever a predictor does about it.
        return 1 - _is_right(found, target, likelihood).double()
    probs = likelihood.label_log_probs(found, target, tau).reshape(len(target)).exp().nan_to_num(0.0).clamp(0, 1)
    if loss == "1 - p":
        return 1 - probs
    return probs.clamp_min(p_min).log() / math.log(p_min)


def _is_right(outputs: Tensor, target: Tensor, likelihood: Categorical | Bernoulli) -> Tensor:
    if isinstance(likelihood, Bernoulli):
        logits = likelihood.logits(match(outputs, target)).reshape(-1)
        return torch.where(target.reshape(-1) == 1, logits > 0, logits < 0)
    scores = likelihood.canonical(outputs)
    own = target.long().unsqueeze(1)
    others = scores.scatter(1, own, -math.inf).amax(dim=1)
    return scores.gather(1, own).squeeze(1) > others


def _sums(
    outputs: Tensor,
    target: Tensor,
    likelihood: Categorical | Bernoulli,
    losses: Sequence[Loss],
    tau: float,
    p_min: float,
) -> Tensor:
    return torch.stack([example_losses(outputs, target, likelihood, loss, tau, p_min).sum() for loss in losses])


def _require_single(likelihood: Likelihood, outputs: Tensor, target: Tensor) -> None:
    """Refuse targets of several labels an example: they are not independent, and a risk counts examples."""
    likelihood.check(outputs.nan_to_num(), target)
    labels = target.numel() // max(1, len(target))
    if labels != 1:
        raise InputError(
            f"a certificate counts one label an example, but each has {labels} here: targets have the shape "
            f"{tuple(target.shape)}, and labels of one example are not independent"
        )


def _require_targets(likelihood: Categorical | Bernoulli, outputs: Tensor, target: Tensor) -> None:
    likelihood.check_targets(outputs, target)
    left_out = likelihood.ignore_index if isinstance(likelihood, Categorical) else None
    count = 0 if left_out is None else int((target == left_out).sum())
    if count:
        raise InputError(
            f"{count} targets of a batch are {left_out}, which the likelihood leaves out: a risk is one of labelled examples; "
            f"give the others alone"
        )


def _read(
    loader: Iterable[Any], target_key: str, weight_key: str, recorder: ProvenanceRecorder, advance: Any
) -> Iterator[Batch]:
    for given in loader:
        batch = checked_batch(given, target_key, weight_key)
        recorder.add(batch.inputs)
        yield batch
        advance()


def _first(loader: Iterable[Any], target_key: str, weight_key: str) -> Batch:
    for given in loader:
        return checked_batch(given, target_key, weight_key)
    raise InputError("the data gave no batch: they are empty")


def _chunks(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Batches cut anew, so that the draws do not depend on how the data came."""
    forms: list[Inputs] = []

    def joined() -> Iterator[Mapping[str, Any]]:
        for batch in batches:
            forms[:] = [batch.inputs]
            yield {**dict(_named(batch.inputs)), "target": batch.target}

    for chunk in rechunk(joined(), size):
        assert isinstance(chunk, Mapping)  # noqa: S101 - as given
        yield Batch(_formed(chunk, forms[0]), chunk["target"])


def _named(inputs: Inputs) -> list[tuple[str, Any]]:
    """The parts of inputs by names that no target has."""
    if isinstance(inputs, Tensor):
        return [("input", inputs)]
    entries: Iterable[tuple[Any, Any]] = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [(f"input {key}", value) for key, value in entries]


def _formed(chunk: Mapping[str, Any], form: Inputs) -> Inputs:
    """The inverse of `_named`, for inputs of the same form."""
    if isinstance(form, Tensor):
        found: Inputs = chunk["input"]
        return found
    if isinstance(form, Mapping):
        return {key: chunk[f"input {key}"] for key in form}
    return tuple(chunk[f"input {index}"] for index in range(len(form)))
