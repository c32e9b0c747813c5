"""From predictions and targets to figures, and the competitors that a Bayesian network is to be shown beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.baselines.temperature_scaling import fit_temperature
from stfbnn.batches import (
    TARGET_KEY,
    OutputFunction,
    call_model,
    join_rows,
    module_device,
    output_tensor,
    split_batch,
    to_device,
)
from stfbnn.errors import InputError
from stfbnn.evaluation.calibration import ClassificationMetrics, classification_metrics, per_position
from stfbnn.evaluation.ood import auroc, fpr_at_tpr
from stfbnn.evaluation.regression import RegressionMetrics, regression_metrics
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import input_batches, predict
from stfbnn.predictive import (
    BernoulliPrediction,
    CategoricalPrediction,
    GaussianPrediction,
    HeteroscedasticPrediction,
    PoissonPrediction,
    Prediction,
    sums_for,
)

TRAINED, SCALED, BAYESIAN = "trained network", "temperature-scaled", "STF-BNN"


def evaluate(prediction: Prediction, targets: Tensor) -> ClassificationMetrics | RegressionMetrics:
    """Compute the figures of a prediction.

    Args:
        prediction: Of N examples; where an example has several positions (N, K, …) or several 0-or-1 labels, each counts as
            one, and positions whose target is the prediction's ``ignore_index`` are left out. Coverage and ranked probability
            score of counts are those of a Gaussian of the same mean and standard deviation, as for all numbers: rough where
            counts are small.
        targets: Class indices (N, …), labels of the shape of the prediction's probabilities, or numbers of the shape of its
            mean (a dimension of 1 apart).

    Raises:
        InputError: Shapes or values are wrong, or nobody knows figures for such a prediction.
    """
    if isinstance(prediction, CategoricalPrediction):
        log_probs, labels = per_position(prediction.log_probs, targets, prediction.ignore_index)
        return classification_metrics(log_probs.exp(), log_probs, labels)
    if isinstance(prediction, BernoulliPrediction):
        # Refuses targets that do not fit.
        prediction.log_density(targets)
        log_probs = torch.stack([prediction.log_negative, prediction.log_positive], dim=-1).flatten(0, -2)
        return classification_metrics(log_probs.exp(), log_probs, targets.flatten().long())
    if isinstance(prediction, GaussianPrediction | HeteroscedasticPrediction | PoissonPrediction):
        mean, std = (Gaussian.match(value, targets) for value in (prediction.mean, prediction.std))
        return regression_metrics(mean, std, prediction.log_density(targets), targets)
    raise InputError(
        f"figures are known for classes, labels, numbers and counts, not for a {type(prediction).__name__}; its log density "
        f"is prediction.log_density(targets)"
    )


def targets_of(loader: Iterable[Any], target_key: str = TARGET_KEY) -> Tensor:
    """The targets of all batches of a loader, in order.

    Raises:
        InputError: The loader is empty, a batch has no target, or their shapes do not agree.
    """
    parts = [target for batch in loader if (target := split_batch(batch, target_key)[1]) is not None]
    if not parts:
        raise InputError("the loader gave no batch: there is nothing to evaluate on")
    return join_rows(parts, "the batches' targets").cpu()


@torch.no_grad()
def network_outputs(
    model: nn.Module, data: Any, output: OutputFunction | None = None, target_key: str = TARGET_KEY
) -> Tensor:
    """Run an ordinary network, in evaluation mode, over inputs or a loader.

    Args:
        model: The network; its mode is put back afterwards.
        data: As for ``stfbnn.predict``.
        output: How to take the tensor of outputs out of what the model returns.
        target_key: The target's entry in a loader's mappings.

    Returns:
        The raw outputs, (N, …), on the CPU.

    Raises:
        InputError: There are no data, or they are not finite or of a wrong form.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        device = module_device(model)
        batches = input_batches(data, True, target_key)
        parts = [output_tensor(call_model(model, to_device(batch, device)), output).cpu() for batch in batches]
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not parts:
        raise InputError("the loader gave no batch: there is nothing to predict")
    return join_rows(parts, "the network's outputs")


def point_prediction(outputs: Tensor, likelihood: Likelihood, temperature: float = 1.0) -> Prediction:
    """The prediction of an ordinary network, in the form that a Bayesian one gives.

    Args:
        outputs: Raw outputs, (N, K, …) for classes or (N, …) for numbers.
        likelihood: Says what they mean.
        temperature: What logits are divided by.
    """
    sums = sums_for(likelihood, temperature)
    sums.add(outputs.unsqueeze(0))
    return sums.finish(at_mean=True)


@dataclass(frozen=True)
class Contender:
    """One of the methods that are shown side by side.

    Attributes:
        name: What the table calls it.
        predict: From inputs or a loader to a prediction.
        note: What was fitted for it on held-out data, for a person; "" where nothing was.
    """

    name: str
    predict: Callable[[Any], Prediction]
    note: str = ""


def contenders(
    model: nn.Module,
    bnn: BayesianNetwork,
    held_out: Iterable[Any] | None,
    samples: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[Contender]:
    """The trained network, the cheapest repair of it, and the Bayesian network.

    For classes and labels the repair is temperature scaling, fitted on the held-out data; it is left out without such data.
    For numbers with noise of one size the trained network gets the noise that its held-out residuals have (which is the
    repair), or without such data the Bayesian network's noise. For other likelihoods no repair is known.

    Args:
        model: The trained network.
        bnn: The Bayesian network made of it, fitted.
        held_out: Data that stage one has not seen.
        samples: Posterior draws.
        seed: Of the draws.
        progress: As for ``stfbnn.predict``.

    Yields:
        The contenders, in the order of a table.

    Raises:
        NotFittedError: The Bayesian network has not been fitted.
    """
    likelihood = bnn.require_fitted()

    def trained(data: Any, as_what: Likelihood = likelihood, temperature: float = 1.0) -> Prediction:
        return point_prediction(network_outputs(model, data, bnn.output), as_what, temperature)

    if isinstance(likelihood, Gaussian):
        if held_out is None:
            yield Contender(TRAINED, trained, "with the Bayesian network's noise")
        else:
            noise = _residual_noise(network_outputs(model, held_out, bnn.output), targets_of(held_out))
            own = Gaussian(noise_std=noise)
            yield Contender(TRAINED, lambda data: trained(data, own), "with the noise of its held-out residuals")
    else:
        yield Contender(TRAINED, trained)
        if held_out is not None and isinstance(likelihood, Categorical | Bernoulli):
            outputs = network_outputs(model, held_out, bnn.output)
            tau = fit_temperature(*_class_logits(likelihood, outputs.double(), targets_of(held_out)))
            yield Contender(SCALED, lambda data: trained(data, temperature=tau), f"τ = {tau:.3f} from held-out data")
    yield Contender(BAYESIAN, lambda data: predict(bnn, data, samples=samples, seed=seed, progress=progress))


@dataclass(frozen=True)
class OutOfDistribution:
    """How one method sees one set of strange examples.

    Attributes:
        prediction: For the strange examples.
        auroc_entropy: Of telling them from the test data by the total entropy; 0.5 is chance.
        auroc_epistemic: The same by the epistemic part alone; None for a method that has none.
        fpr_at_95_tpr: Share of test examples flagged when 95 % of the strange ones are, by the entropy.
        confidence: Mean confidence in the strange examples, whose every class is wrong.
    """

    prediction: CategoricalPrediction
    auroc_entropy: float
    auroc_epistemic: float | None
    fpr_at_95_tpr: float
    confidence: float


@dataclass(frozen=True)
class SideBySide:
    """Several methods on the same examples; all mappings have the methods' names as keys.

    Attributes:
        targets: Of the test examples.
        predictions: For the test examples.
        metrics: The figures.
        outside: For each set of strange examples what each method makes of it.
        notes: What was fitted for a method on held-out data.
    """

    targets: Tensor
    predictions: Mapping[str, Prediction]
    metrics: Mapping[str, ClassificationMetrics | RegressionMetrics]
    outside: Mapping[str, Mapping[str, OutOfDistribution]]
    notes: Mapping[str, str]


def side_by_side(
    methods: Iterable[Contender], test: Iterable[Any], outside: Mapping[str, Any] | None = None
) -> SideBySide:
    """Let several methods predict the same examples, and compute their figures.

    Args:
        methods: What to compare.
        test: A loader of labelled examples; it must give them in the same order at each pass.
        outside: Sets of examples unlike the training data, by name: inputs or loaders (targets are ignored).

    Raises:
        InputError: There are no targets, or entropies are asked of a regression.
    """
    targets = targets_of(test)
    predictions: dict[str, Prediction] = {}
    strange: dict[str, dict[str, OutOfDistribution]] = {name: {} for name in outside or {}}
    notes: dict[str, str] = {}
    for method in methods:
        inside = predictions[method.name] = method.predict(test)
        notes |= {method.name: method.note} if method.note else {}
        for name, data in (outside or {}).items():
            strange[name][method.name] = _out_of_distribution(inside, method.predict(data))
    metrics = {name: evaluate(prediction, targets) for name, prediction in predictions.items()}
    return SideBySide(targets, predictions, metrics, strange, notes)


def _class_logits(likelihood: Categorical | Bernoulli, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One row of logits, and its class, for each position that counts or label; of a label that is 0 or 1, 0 and the logit."""
    if isinstance(likelihood, Bernoulli):
        logits = likelihood.logits(outputs).flatten()
        return torch.stack([torch.zeros_like(logits), logits], dim=1), targets.flatten().long()
    return per_position(likelihood.log_probs(outputs), targets, likelihood.ignore_index)


def _out_of_distribution(inside: Prediction, outside: Prediction) -> OutOfDistribution:
    if not (isinstance(inside, CategoricalPrediction) and isinstance(outside, CategoricalPrediction)):
        raise InputError(
            "strange examples are told by the entropy of their class; a regression, counts or separate labels have none"
        )
    epistemic = None if inside.at_mean else auroc(inside.epistemic, outside.epistemic)
    return OutOfDistribution(
        prediction=outside,
        auroc_entropy=auroc(inside.entropy, outside.entropy),
        auroc_epistemic=epistemic,
        fpr_at_95_tpr=fpr_at_tpr(inside.entropy, outside.entropy),
        confidence=float(outside.confidence.mean()),
    )


def _residual_noise(outputs: Tensor, targets: Tensor) -> list[float] | float:
    residuals = (targets - Gaussian.match(outputs, targets)).double()
    noise: list[float] | float = residuals.square().mean(dim=0).sqrt().tolist()
    return noise
