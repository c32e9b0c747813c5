"""The figures of a network with one random layer beside those of the network itself, all from the same examples in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from stfbnn.batches import Inputs, OutputFunction, batch_size, join_targets, module_device, tensors_of
from stfbnn.errors import InputError
from stfbnn.evaluation.evaluate import evaluate, network_outputs, point_prediction
from stfbnn.evaluation.ood import auroc
from stfbnn.inference.history import FitRun
from stfbnn.inference.loaders import kept_generators
from stfbnn.inference.survey import checked_batch
from stfbnn.layer_listing import LayerChoice
from stfbnn.likelihood import Likelihood
from stfbnn.likelihood.names import resolve_likelihood
from stfbnn.mixed_precision import Precision, autocast_dtype, cast_to
from stfbnn.network import BayesianNetwork
from stfbnn.optima.width_table import Difference, LayerWidth, NetworkFigures
from stfbnn.prediction import input_batches, predict
from stfbnn.predictive import BernoulliPrediction, CategoricalPrediction, CustomPrediction, Prediction
from stfbnn.predictive.weighting import mean_over_examples
from stfbnn.randomness import seeded
from stfbnn.trunk.fingerprint import raw_bytes

TEST: Final = "test"
HELD_OUT: Final = "held-out"

Pairs = list[tuple[Inputs, Tensor]]


@dataclass(frozen=True)
class LabelledSet:
    """Examples with targets, in memory.

    Attributes:
        pairs: Batches (inputs, target).
        targets: Of all of them, on the CPU.
        weights: What each example counts, (N,); None where all count the same.
    """

    pairs: Pairs
    targets: Tensor
    weights: Tensor | None

    @classmethod
    def read(cls, what: str, loader: Iterable[Any], seed: int, target_key: str, weight_key: str) -> LabelledSet:
        """Read a loader once.

        Args:
            what: Its name, for messages.
            loader: Batches with targets.
            seed: Of what it draws.
            target_key: The target's entry in mappings.
            weight_key: The weights' entry in mappings.

        Raises:
            InputError: It gives no batch, or one that cannot be used.
        """
        if not isinstance(loader, Iterable):
            raise InputError(f"{what} must give batches when iterated, but it is a {type(loader).__name__}")
        with seeded(seed, what), kept_generators(loader):
            batches = [checked_batch(batch, target_key, weight_key) for batch in loader]
        if not batches:
            raise InputError(f"{what} gave no batch: it is empty")
        targets, weights = join_targets(batches)
        pairs = [(one.inputs, one.target) for one in batches]
        return cls(pairs, targets.cpu(), None if weights is None else weights.cpu())


def read_foreign(sets: Mapping[str, Any], seed: int, target_key: str, weight_key: str) -> dict[str, Pairs]:
    """Read sets of foreign examples; their targets, if they have any, are replaced by zeros.

    Args:
        sets: By name, inputs or loaders as ``stfbnn.predict`` takes them.
        seed: Of what loaders draw.
        target_key: The target's entry in mappings.
        weight_key: The weights' entry in mappings.

    Raises:
        InputError: A name is taken, or a set is empty or cannot be used.
    """
    if not isinstance(sets, Mapping):
        raise InputError(
            f"outside must be a mapping from names to inputs or loaders, but it is a {type(sets).__name__}"
        )
    found: dict[str, Pairs] = {}
    for name, data in sets.items():
        if not isinstance(name, str) or name in (TEST, HELD_OUT):
            raise InputError(
                f'names of outside must be strings other than "{TEST}" and "{HELD_OUT}", but one is {name!r}'
            )
        with seeded(seed, "outside", name), kept_generators(data):
            batches = list(input_batches(data, True, target_key, weight_key))
        if not batches:
            raise InputError(f"outside[{name!r}] gave no batch: it is empty")
        found[name] = [(batch, torch.zeros(batch_size(batch))) for batch in batches]
    return found


@dataclass(frozen=True)
class JudgedData:
    """All data but those of training.

    Attributes:
        held_out: By which layers are ranked.
        test: For the figures; None where they are of the held-out examples.
        foreign: Further sets, by name.
    """

    held_out: LabelledSet
    test: LabelledSet | None
    foreign: Mapping[str, Pairs]

    @property
    def tested(self) -> LabelledSet:
        """What the figures are of."""
        return self.held_out if self.test is None else self.test

    def digests(self) -> dict[str, Any]:
        """What tells the data from others, and their order from another."""
        return {
            "held-out data": _digest(self.held_out.pairs),
            "test data": None if self.test is None else _digest(self.test.pairs),
            "foreign data": {name: _digest(pairs) for name, pairs in self.foreign.items()},
        }


@dataclass(frozen=True)
class Measured:
    """A layer that is done.

    Attributes:
        width: Its figures.
        density: log p(y_n | x_n) of the held-out examples, (N,), in float64.
    """

    width: LayerWidth
    density: Tensor

    def beside(self, first: Measured | None, weights: Tensor | None) -> LayerWidth:
        """The figures with the difference from the first layer, where that is another and is there."""
        if first is None or first.width.layer == self.width.layer:
            return self.width
        return replace(self.width, over_first=Difference.of(self.density, first.density, weights))


class Judge:
    """Takes the figures of Bayesian networks, after those of the trained network itself.

    Args:
        model: The trained network.
        data: The examples.
        likelihood: p(y | output).
        samples: Draws.
        seed: Of the draws.
        precision: Of the network's passes.
        output: How to take the tensor of predictions out of what the model returns.

    Attributes:
        network: The trained network's own figures.

    Raises:
        InputError: The model does not run on the data, or they do not fit the likelihood.
    """

    def __init__(
        self,
        model: nn.Module,
        data: JudgedData,
        likelihood: Likelihood,
        samples: int,
        seed: int,
        precision: Precision | None,
        output: OutputFunction | None,
    ) -> None:
        self._data, self._samples, self._seed, self._precision = data, samples, seed, precision
        device = module_device(model)

        def outputs(what: str, pairs: Pairs) -> Tensor:
            try:
                with cast_to(autocast_dtype(precision, device), device):
                    return network_outputs(model, pairs, output)
            except (RuntimeError, TypeError) as error:
                raise InputError(f"the model does not run on {what}: {error}") from error

        held_out, targets = outputs("val_loader", data.held_out.pairs), data.held_out.targets
        likelihood.check(held_out, targets)
        # A noise that is learned is the network's own, as in `stfbnn.evaluation.evaluate.contenders`.
        own = resolve_likelihood(likelihood, targets)
        own.move(own.estimate(held_out, targets, data.held_out.weights), 1.0)
        prediction = point_prediction(held_out, own)
        self._density = prediction.log_density(targets).double()
        inside = prediction if data.test is None else point_prediction(outputs("test_loader", data.test.pairs), own)
        foreign = {
            name: point_prediction(outputs(f"outside[{name!r}]", pairs), own) for name, pairs in data.foreign.items()
        }
        apart = {name: _separation(inside, one) for name, one in foreign.items()}
        self.network = NetworkFigures(
            held_out_nll=-float(mean_over_examples(self._density, data.held_out.weights)),
            metrics=_metrics(inside, data.tested.targets),
            auroc={name: scores["entropy"] for name, scores in apart.items() if "entropy" in scores},
        )

    def measure(self, bnn: BayesianNetwork, choice: LayerChoice, run: FitRun) -> Measured:
        """Take the figures of a network that was fitted.

        Args:
            bnn: The network.
            choice: Its random layer.
            run: The fit.
        """
        data = self._data

        def predicted(pairs: Pairs) -> Prediction:
            return predict(
                bnn, pairs, samples=self._samples, seed=self._seed, precision=self._precision, progress=False
            )

        held_out = predicted(data.held_out.pairs)
        density = held_out.log_density(data.held_out.targets).double()
        inside = held_out if data.test is None else predicted(data.test.pairs)
        foreign = {name: predicted(pairs) for name, pairs in data.foreign.items()}
        parts = {HELD_OUT if data.test is None else TEST: inside, **foreign}
        with torch.no_grad():
            std, kl = bnn.posterior.std_vector().double().mean(), bnn.posterior.kl(bnn.prior)
            size = bnn.trained_vector().double().square().mean().sqrt()
        width = LayerWidth(
            layer=choice.name,
            kind=choice.kind,
            parameters=choice.parameters,
            share=choice.share,
            temperature=run.temperature,
            relative_std=float(std / size),
            kl_per_parameter=float(kl) / bnn.layout.size,
            held_out_nll=-float(mean_over_examples(density, data.held_out.weights)),
            metrics=_metrics(inside, data.tested.targets),
            epistemic={
                name: float(scores["epistemic"].mean())
                for name, part in parts.items()
                if "epistemic" in (scores := _scores(part))
            },
            auroc={name: _separation(inside, one) for name, one in foreign.items()},
            seconds=run.seconds,
            artifact_bytes=choice.artifact_bytes,
            over_network=Difference.of(density, self._density, data.held_out.weights),
        )
        return Measured(width, density)


def _metrics(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    return {} if isinstance(prediction, CustomPrediction) else asdict(evaluate(prediction, targets))


def _scores(prediction: Prediction) -> dict[str, Tensor]:
    """By what strange examples may be told, one number an example, (N,): the mean over its positions or labels."""
    found: dict[str, Tensor] = {}
    if isinstance(prediction, CategoricalPrediction | BernoulliPrediction):
        found["entropy"] = prediction.entropy
    if not prediction.at_mean and not isinstance(prediction, CustomPrediction):
        found["epistemic"] = prediction.epistemic  # type: ignore[attr-defined]
    return {name: score.double().reshape(len(score), -1).mean(dim=1) for name, score in found.items()}


def _separation(inside: Prediction, outside: Prediction) -> dict[str, float]:
    """The AUROC of every score that both predictions have."""
    ordinary, strange = _scores(inside), _scores(outside)
    return {name: auroc(score, strange[name]) for name, score in ordinary.items()}


def _digest(pairs: Pairs) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for inputs, target in pairs:
        for tensor in (*tensors_of(inputs), target):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()
