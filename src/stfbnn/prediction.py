"""Prediction: posterior draws, averaged to calibrated probabilities with their uncertainty."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stfbnn.batches import (
    TARGET_KEY,
    WEIGHT_KEY,
    Inputs,
    as_inputs,
    batch_size,
    join_rows,
    rechunk,
    require_finite,
    split_batch,
    to_device,
)
from stfbnn.draws import Draws, Execution, chunk_rows
from stfbnn.errors import InputError
from stfbnn.mixed_precision import Precision
from stfbnn.network import BayesianNetwork, Weights
from stfbnn.posterior import components_of
from stfbnn.predictive import MemberOutputs, Prediction
from stfbnn.progress import progress_bar


def predict(
    bnn: BayesianNetwork,
    data: Any,
    *,
    samples: int = 32,
    seed: int = 0,
    weights: Weights = "sample",
    predictive_temperature: float | None = None,
    has_targets: bool = True,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    chunk_size: int | None = None,
    execution: Execution = "auto",
    precision: Precision | None = None,
    progress: bool | None = None,
) -> Prediction:
    """Predict with a fitted Bayesian network.

    The same seed gives the same draws; answers agree to 1e-6 however the data are batched.

    Args:
        bnn: The network, after `fit`.
        data: A tensor, tuple or mapping of inputs as the model takes them; or a loader (any iterable) of batches, whose
            targets and weights are ignored.
        samples: S, posterior draws to average. A mixture's are dealt out to its components, at least one to each.
        seed: Which draws.
        weights: "mean" for the deterministic prediction at the posterior mean (one pass; no epistemic uncertainty); the mean of
            a mixture lies between its optima, so there it warns.
        predictive_temperature: τ, by which every draw's logits are divided; None takes what `fit` stored. Logits of classes and
            of labels only.
        has_targets: False for a loader whose batches are tuples of inputs without a target.
        target_key: The target's entry in a loader's mappings, removed before the model is called.
        weight_key: The entry of the examples' weights, likewise.
        chunk_size: Rows run at once; None takes a size that suits the inputs' shape and the device.
        execution: "loop", "stacked", or "auto" for the faster on the device.
        precision: "bf16-mixed" runs the network's passes under autocast to bfloat16, "32-true" does not; None takes what a
            surrounding ``torch.autocast`` says. Draws and averages are in full precision.
        progress: Show a progress bar; None shows it on a terminal, for loaders.

    Returns:
        By the likelihood, in the data's order: a `CategoricalPrediction` or `BernoulliPrediction` (``.probs``, ``.entropy``,
        ``.aleatoric``, ``.epistemic``, ``.labels``, ``.confidence``); a `GaussianPrediction`, `HeteroscedasticPrediction` or
        `PoissonPrediction` (``.mean``, ``.std``, ``.aleatoric``, ``.epistemic``); or a `CustomPrediction` (``.draws``,
        ``.mean``). All have ``.log_density(targets)``.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: The data are empty, not finite or of a wrong form, or an argument is, such as a predictive temperature for
            outputs that are no logits.
    """
    likelihood = bnn.require_fitted()
    temperature = bnn.predictive_temperature if predictive_temperature is None else predictive_temperature
    if not 0 < temperature < float("inf"):
        raise InputError(f"predictive_temperature must be positive and finite, but it is {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, but it is {chunk_size}")
    if weights == "mean" and len(components_of(bnn.posterior)) > 1:
        warnings.warn(
            "the mean of a mixture lies between disparate optima, where the network may be poor; predict with draws, which are "
            "as deterministic, for their seed is fixed",
            stacklevel=2,
        )
    _refuse_list_of_inputs(bnn, data)
    bnn.check_unchanged()
    shown = progress if _is_loader(data) else bool(progress)
    with bnn.computing_in(precision), progress_bar("predict", _length(data), shown) as bar:
        draws = Draws(bnn, samples, seed, weights, execution)
        batches = _counted(input_batches(data, has_targets, target_key, weight_key), bar.advance)
        chunks = _chunks(batches, bnn, chunk_size)
        parts = [draws.predict(chunk, likelihood, temperature) for chunk in chunks]
    if not parts:
        raise InputError("there is nothing to predict: the loader gave no batch")
    return Prediction.concatenate(parts)


def member_outputs(
    bnn: BayesianNetwork,
    data: Any,
    *,
    samples: int = 32,
    seed: int = 0,
    precision: Precision | None = None,
    has_targets: bool = True,
    target_key: str = TARGET_KEY,
) -> MemberOutputs:
    """The raw outputs of the draws that `predict` averages, kept on the CPU: memory grows with their number.

    ``member_outputs(bnn, data).at(τ)`` is ``predict(bnn, data, predictive_temperature=τ)``.

    Args:
        bnn: The network, after `fit`.
        data: As for `predict`, and so all other arguments.
        samples: Posterior draws.
        seed: Which draws.
        precision: Of the network's passes.
        has_targets: Whether a loader's batches have targets.
        target_key: The target's entry in a loader's mappings.

    Raises:
        NotFittedError: `fit` has not run.
        InputError: The data are empty, not finite or of a wrong form.
    """
    likelihood = bnn.require_fitted()
    _refuse_list_of_inputs(bnn, data)
    bnn.check_unchanged()
    with bnn.computing_in(precision):
        draws = Draws(bnn, samples, seed)
        chunks = _chunks(input_batches(data, has_targets, target_key), bnn, None)
        parts = [torch.cat([one.cpu() for one in draws.outputs(to_device(chunk, bnn.device))]) for chunk in chunks]
    if not parts:
        raise InputError("there is nothing to predict: the loader gave no batch")
    return MemberOutputs(join_rows(parts, "outputs", 1), likelihood, draws.shares)


def input_batches(
    data: Any, has_targets: bool, target_key: str = TARGET_KEY, weight_key: str = WEIGHT_KEY
) -> Iterator[Inputs]:
    """The batches of inputs in ``data``, checked, without their targets and weights."""
    if isinstance(data, Mapping):
        yield _checked(split_batch(data, target_key, False, weight_key)[0])
        return
    if not _is_loader(data):
        yield _checked(as_inputs(data))
        return
    if isinstance(data, np.ndarray):
        raise InputError("data are a numpy array; convert them with torch.as_tensor, in the model's dtype")
    if not isinstance(data, Iterable):
        raise InputError(
            f"data must be a tensor, a tuple, a mapping or an iterable of batches, but it is a {type(data).__name__}"
        )
    for batch in data:
        if isinstance(batch, Tensor):
            yield _checked(batch)
        elif isinstance(batch, Mapping):
            yield _checked(split_batch(batch, target_key, False, weight_key)[0])
        elif isinstance(batch, tuple | list) and len(batch) == 1:
            yield _checked(as_inputs(batch[0]))
        else:
            yield _checked(split_batch(batch, target_key, has_targets)[0])


def _refuse_list_of_inputs(bnn: BayesianNetwork, data: Any) -> None:
    """A list is a loader here, though `bayesianize` takes one for several inputs: its tensors would be batches."""
    taken = bnn.input_description or {}
    entries = taken["entries"] if taken.get("form") == "tuple" else []
    several = sum("shape" in entry for entry in entries) > 1
    if several and isinstance(data, list) and data and all(isinstance(part, Tensor) for part in data):
        raise InputError(
            "data are a list of tensors, each of which would be a batch, but the model takes several inputs: give one batch as "
            "a tuple, or a list of such tuples with has_targets=False"
        )


def _is_loader(data: Any) -> bool:
    return not isinstance(data, Tensor | tuple | Mapping)


def _length(data: Any) -> int | None:
    try:
        return len(data) if _is_loader(data) else 1
    except TypeError:
        return None


def _checked(inputs: Inputs) -> Inputs:
    batch_size(inputs)
    require_finite(inputs, "the inputs")
    return inputs


def _counted(batches: Iterable[Inputs], advance: Any) -> Iterator[Inputs]:
    for batch in batches:
        yield batch
        advance()


def _chunks(batches: Iterator[Inputs], bnn: BayesianNetwork, chunk_size: int | None) -> Iterator[Inputs]:
    first = next(batches, None)
    if first is None:
        return
    size = chunk_size or chunk_rows(first, bnn.device)

    def all_batches() -> Iterator[Inputs]:
        yield first
        yield from batches

    yield from rechunk(all_batches(), size)
