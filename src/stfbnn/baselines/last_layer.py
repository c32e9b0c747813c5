"""A posterior over the last layer, inferred by the same machinery as that over the first.

All that comes before the last layer is deterministic. Where the layer's output is the network's output, its inputs (the
features) are computed once, and inference and prediction run the layer alone on them: the same posterior at a fraction of the
passes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stfbnn.baselines.first_batch import first_batch
from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import PLAIN, Reading, call_network, collect_outputs, input_chunks
from stfbnn.batches import Batch, Inputs, join_rows, join_targets, module_device, rows, to_device
from stfbnn.conversion import bayesianize
from stfbnn.draws import Draws
from stfbnn.errors import InputError, LayerError
from stfbnn.inference.fit import fit
from stfbnn.inference.history import FitRun
from stfbnn.inference.loaders import count_examples, shared_examples
from stfbnn.inference.minibatch import chunks
from stfbnn.inference.survey import checked_batch
from stfbnn.locate import is_passed_over, parametric_leaves
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import PosteriorFamily
from stfbnn.predictive import MemberOutputs
from stfbnn.prior import PriorLike
from stfbnn.provenance import ProvenanceRecorder, overlap
from stfbnn.randomness import seeded
from stfbnn.wrappers import unwrap


def last_layer_name(model: nn.Module, example_inputs: Any) -> str:
    """Name the last layer: the last module in execution order that owns parameters and calls no other module.

    Normalisations and learned activations are passed over, as in the search for the first layer.

    Args:
        model: The network, plain or wrapped; it is left as it was.
        example_inputs: A small batch as the model takes it.

    Raises:
        InputError: The model is no module, or does not run on ``example_inputs``.
        LayerError: It has no such layer.
    """
    plain = unwrap(model)
    leaves = parametric_leaves(plain, example_inputs)
    for name in reversed(leaves):
        if not is_passed_over(plain.get_submodule(name)):
            return name
    found = f"only {', '.join(map(repr, leaves))}, which are passed over" if leaves else "none"
    raise LayerError(
        f"the network has no last layer that could be made Bayesian: of the modules that it calls, those that own parameters "
        f"and call no other module are {found}"
    )


def fit_last_layer(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    val_loader: Iterable[Any] | None = None,
    layer: str | None = None,
    posterior: str | PosteriorFamily = "mean-field",
    prior: PriorLike | None = None,
    cache_features: bool = True,
    num_examples: int | None = None,
    max_seen_share: float = 0.02,
    seed: int = 0,
    reading: Reading = PLAIN,
    **options: Any,
) -> tuple[BayesianNetwork, FitRun]:
    """Infer a posterior over a network's last layer; the network itself is left as it is.

    Args:
        model: The trained network.
        train_loader: As for ``stfbnn.fit``.
        val_loader: Likewise.
        layer: The layer's name; None takes `last_layer_name`.
        posterior: As for ``stfbnn.bayesianize``.
        prior: Likewise.
        cache_features: Compute the features once where that is exact (see `head_features`), and shuffle them anew in every
            epoch, in batches of the loader's size. They are those of one pass: where the loader augments at random, say False.
            All features are in memory together.
        num_examples: As for ``stfbnn.fit``.
        max_seen_share: Likewise.
        seed: Of inference.
        reading: How batches, and what the network returns, are read.
        **options: Further arguments of ``stfbnn.fit``, such as ``epochs``, ``engine`` or ``temperatures``.

    Returns:
        The network with its posterior, as from ``stfbnn.bayesianize`` and ``stfbnn.fit``, and the history.

    Raises:
        InputError: An argument, a batch or the held-out data are not usable.
        LayerError: There is no such layer, or it cannot be made Bayesian.
    """
    plain = unwrap(model)
    first = first_batch(train_loader, seed, reading)
    example = to_device(rows(first.inputs, 0, 2), module_device(plain))
    name = last_layer_name(plain, example) if layer is None else layer
    bnn = bayesianize(plain, example, layer=name, posterior=posterior, prior=prior, output=reading.output)
    options = {**options, "seed": seed}
    if not cache_features or _features(bnn, example, reading) is None:
        keys = {"target_key": reading.target_key, "weight_key": reading.weight_key}
        options |= {**keys, "max_seen_share": max_seen_share}
        return bnn, fit(bnn, train_loader, val_loader=val_loader, num_examples=num_examples, **options)
    train = _Cached(bnn, train_loader, len(first), seed, reading)
    held_out = None
    if val_loader is not None:
        held_out = _Cached(bnn, val_loader, len(first), seed, reading)
        _refuse_seen(bnn, train_loader, val_loader, train, held_out, max_seen_share)
    head = bayesianize(
        copy.deepcopy(bnn.network.get_submodule(name)),
        train.batch.rows(0, 2).inputs,
        layer="",
        posterior=posterior,
        prior=bnn.prior_recipe,
    )
    count = num_examples or count_examples(train_loader, len(train.batch))
    with warnings.catch_warnings():
        # Said of equal features, which different examples may have; the inputs themselves have been compared.
        warnings.filterwarnings("ignore", message=r"\d+ of the held-out examples are equal")
        run = fit(head, train, val_loader=held_out, num_examples=count, max_seen_share=1.0, **options)
    bnn.posterior, bnn.prior = head.posterior, head.prior
    bnn.likelihood, bnn.num_examples = head.likelihood, head.num_examples
    bnn.temperature, bnn.predictive_temperature = head.temperature, head.predictive_temperature
    return bnn, run


@torch.no_grad()
def head_features(network: nn.Module, layer: str, inputs: Inputs, reading: Reading = PLAIN) -> Tensor | None:
    """What a layer is given, where the network is that layer on top of these features; None where it is not.

    It is, if the network calls the layer once, with one tensor of one row an example, and what the layer returns is what the
    network returns.

    Args:
        network: The network, in evaluation mode.
        layer: The layer's dotted name.
        inputs: A chunk of B rows on its device.
        reading: How to take the tensor of outputs out of what the network returns.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls.append((args, kwargs, result))

    handle = network.get_submodule(layer).register_forward_hook(note, with_kwargs=True)
    try:
        outputs = call_network(network, inputs, reading)
    finally:
        handle.remove()
    if len(calls) != 1:
        return None
    args, kwargs, result = calls[0]
    alone = not kwargs and len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape[:1] == outputs.shape[:1]
    return args[0] if alone and outputs is result else None


def _features(bnn: BayesianNetwork, inputs: Inputs, reading: Reading) -> Tensor | None:
    """`head_features` of the random layer; None where a batch norm after it was folded into its weights."""
    if bnn.folding.first_layer_affine is not None:
        return None
    return head_features(bnn.network, bnn.layer_name, inputs, replace(reading, output=bnn.output))


class LastLayerPredictor(BayesianPredictor):
    """The draws of a network whose last layer is random: one pass to the features, and every draw on these.

    Its outputs are those of `BayesianPredictor`; where the layer's output is not the network's, it runs like that one.
    """

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs of all draws, (S, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            ModelChangedError: The user's model was changed since the posterior was inferred.
            InputError: There are no data, or they are not finite or of a wrong form.
        """
        bnn = self.bnn
        bnn.check_unchanged()
        draws = Draws(bnn, self.samples, self.seed)
        layer = bnn.network.get_submodule(bnn.layer_name)

        def run(_index: int, chunk: Inputs) -> Iterator[Tensor]:
            features = _features(bnn, chunk, self.reading)
            for number in range(draws.count):
                vector = draws.vector(number)
                if features is None:
                    yield bnn.outputs(vector, chunk)
                else:
                    yield functional_call(layer, bnn.layer_parameters(vector), (features,))

        with bnn.computing_in(None):
            outputs = collect_outputs(run, input_chunks(data, bnn.device, self.reading))
        return MemberOutputs(outputs, self.likelihood, draws.shares)


class _Cached:
    """A loader's examples with their features in place of their inputs, shuffled anew whenever it is read."""

    def __init__(
        self, bnn: BayesianNetwork, loader: Iterable[Any], batch_size: int, seed: int, reading: Reading
    ) -> None:
        recorder = ProvenanceRecorder()
        parts, batches = [], []
        with seeded(seed, "features"), bnn.computing_in(None):
            for given in loader:
                batch = checked_batch(given, reading.target_key, reading.weight_key)
                recorder.add(batch.inputs)
                for part in chunks(batch, bnn.device):
                    features = _features(bnn, to_device(part.inputs, bnn.device), reading)
                    if features is None:
                        raise InputError(
                            "the network does not end in its last layer on all batches; pass cache_features=False"
                        )
                    parts.append(features)
                batches.append(batch)
        if not batches:
            raise InputError("a loader gave no batch: it is empty, or drop_last dropped its only one")
        target, weight = join_targets(batches)
        self.batch = Batch(join_rows(parts, "the features"), target, weight)
        self.provenance = recorder.finish()
        self._size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.batch) / self._size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        features, target, weight = self.batch.inputs, self.batch.target, self.batch.weight
        assert isinstance(features, Tensor)  # noqa: S101 - as it was made
        for index in torch.split(torch.randperm(len(target)), self._size):
            at = index.to(features.device), index.to(target.device)
            yield (features[at[0]], target[at[1]]) + (() if weight is None else (weight[index.to(weight.device)],))


def _refuse_seen(
    bnn: BayesianNetwork,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    train: _Cached,
    held_out: _Cached,
    most: float,
) -> None:
    """What ``fit`` refuses by the inputs, for it sees only features."""
    same_rows = shared_examples(train_loader, val_loader)
    seen = train.provenance if bnn.provenance is None else train.provenance.union(bnn.provenance)
    count = max(same_rows, overlap(held_out.provenance, seen))
    if same_rows or count > most * held_out.provenance.count:
        raise InputError(
            f"val_loader is not held out: {count} of its {held_out.provenance.count} examples were seen by stage one or are in "
            f"train_loader; hold data out before stage one"
        )
    if count:
        warnings.warn(
            f"{count} of the held-out examples are equal to ones seen by a stage; if they are not chance duplicates, hold data "
            f"out before stage one",
            stacklevel=3,
        )
