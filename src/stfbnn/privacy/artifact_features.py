"""What a posterior's file says of an example that the averaged predictive does not, and the attack that reads it.

The file holds q(w) = N(m, diag σ²) over the first layer; the trunk is public. So an attacker sees the log-likelihood of every
single draw, not only of their average, and how the example's gradient lies in the posterior. Two of these are traces of
training itself. A member's gradient pulled the mean its way, from the public trained weights. And with g_n the gradient of
log p(y_n | x_n, w), the natural-gradient fixed point sets the precision to

    1/σ_i² = (N/T) (h_i + δ_i),  (N/T) δ_i = 1/s_i²,  h_i ≈ (1/N) Σ_n g_{n,i}²,

the sum being over the members, so that 1/σ_i² − 1/s_i² ≈ (1/T) Σ_n g_{n,i}² holds each member's own squared gradient, and
Σ_i g_i² (1/σ_i² − 1/s_i²), the curvature match, is larger for a member by (1/T) Σ_i g_i⁴ than had it been left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from stfbnn.batches import require_finite
from stfbnn.draws import Draws, chunk_rows
from stfbnn.errors import InputError
from stfbnn.evaluation.checks import as_finite, as_labels
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MixturePosterior, Posterior, components_of
from stfbnn.predictive.categorical import in_double
from stfbnn.predictive.weighting import average, variance
from stfbnn.privacy.shadows import Design
from stfbnn.randomness import derive_seed, generator

NAMES = (
    "log-likelihood at the mean",
    "mean log-likelihood of draws",
    "spread of draws' log-likelihoods",
    "lowest log-likelihood of draws",
    "gradient norm in the posterior's metric",
    "gradient norm",
    "alignment with the mean's move",
    "curvature match",
)
"""The features, in the order of their columns."""

AttackModel = Literal["logistic", "boosting"]

# Rows of other shadow models that an attack is trained on: more only take time.
_TRAINING_ROWS = 60_000
# Numbers in the gradients of the examples that are differentiated at once.
_GRADIENT_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class ArtifactFeatures:
    """Features of N examples.

    Attributes:
        names: F of them.
        values: (N, F), float64, on the CPU.
    """

    names: tuple[str, ...]
    values: Tensor

    def column(self, name: str) -> Tensor:
        """One feature, (N,).

        Raises:
            InputError: There is none of this name.
        """
        if name not in self.names:
            raise InputError(f"there is no feature {name!r}; there are {list(self.names)}")
        return self.values[:, self.names.index(name)]


def artifact_features(
    bnn: BayesianNetwork, inputs: Tensor, labels: Tensor, *, draws: int = 32, seed: int = 0
) -> ArtifactFeatures:
    """What an attacker who holds the posterior's file computes of examples with their labels.

    With g the gradient of log p(y | x, w) by the random weights at the posterior's mean m, w₀ the public trained weights, σ the
    posterior's widths and s the prior's: log p(y | x, m); over the draws the mean, the standard deviation and the minimum of
    log p(y | x, w); Σ σ_i² g_i²; √Σ g_i²; ⟨g, m − w₀⟩; and Σ g_i² (1/σ_i² − 1/s_i²).

    For a mixture, draws are dealt out to its components and count their shares; the features at the mean are those of each
    component at its own mean and width, averaged by the components' weights. For correlated posteriors σ are the marginal
    widths. A point mass has no width: the spread, the metric's norm and the curvature match are 0.

    Args:
        bnn: The network, after `fit`: any posterior, over any layer.
        inputs: (N, …), as the network takes them.
        labels: (N,), the classes that the attacker believes to be the examples'.
        draws: Posterior draws.
        seed: Which draws.

    Raises:
        NotFittedError: `fit` has not run.
        InputError: It is no classifier of one label an example, inputs are not finite, labels are out of range, or the network
            cannot run with weights of its own for each example.
    """
    likelihood = bnn.require_fitted()
    if not isinstance(likelihood, Categorical):
        raise InputError(f"artifact features are those of classifiers, but the likelihood is {likelihood!r}")
    require_finite(inputs, "the inputs")
    if labels.shape != inputs.shape[:1]:
        raise InputError(
            f"each input needs one label, but the inputs are {tuple(inputs.shape)} and the labels {tuple(labels.shape)}"
        )
    bnn.check_unchanged()
    drawn = Draws(bnn, draws, seed)
    posterior = bnn.posterior
    parts = components_of(posterior)
    shares = posterior.weights.cpu().double() if isinstance(posterior, MixturePosterior) else torch.ones(1).double()
    rows = []
    with bnn.computing_in(None):
        size = chunk_rows(inputs, bnn.device)
        for given, targets in zip(torch.split(inputs, size), torch.split(labels.cpu(), size), strict=True):
            chunk = given.to(bnn.device)
            at_mean = torch.stack([_at_mean(bnn, part, likelihood, chunk, targets) for part in parts])
            whole = torch.tensordot(shares, at_mean, dims=1)
            each = torch.stack([_log_prob(likelihood, out, targets) for some in drawn.outputs(chunk) for out in some])
            over_draws = (average(each, drawn.shares), variance(each, drawn.shares).sqrt(), each.amin(dim=0))
            rows.append(torch.cat([whole[:, :1], torch.stack(over_draws, dim=1), whole[:, 1:]], dim=1))
    return ArtifactFeatures(NAMES, torch.cat(rows))


def artifact_scores(
    features: Tensor, design: Design, target: int, *, model: AttackModel = "logistic", seed: int = 0
) -> Tensor:
    """Attack one model's file with a classifier that was trained on the other shadow models' files.

    Every feature is also calibrated for each example by other shadow models, as LiRA does (Carlini et al., 2022): its distance
    from the mean of as many models that trained on the example, of as many that did not, and the difference of their squares,
    which is the log-likelihood ratio under Gaussians of one width. A shadow model's features are calibrated without itself and
    without the attacked model. The attacked model's membership is not read, and the numbers of models that had an example are
    made equal, for in a balanced design they would tell it.

    Args:
        features: (M, N, F), of every model on every example.
        design: Which model trained on which example.
        target: The attacked model.
        model: "logistic" regression, or gradient "boosting", which also sees products of features.
        seed: Of the classifier, of the rows that it is trained on, and of the models that calibrate.

    Returns:
        Scores of the attacked model's examples, (N,), higher for members.

    Raises:
        InputError: Shapes do not agree, features are not finite, the attack's model is not known, or there are too few models.
    """
    values = as_finite(features, "artifact features")
    if values.ndim != 3 or values.shape[:2] != design.membership.shape or not 0 <= target < len(values):
        raise InputError(
            f"features must be (models, examples, features) as in the design, {tuple(design.membership.shape)}, and the target "
            f"one of the models, but they are {tuple(values.shape)} and {target}"
        )
    if model not in ("logistic", "boosting"):
        raise InputError(f'the attack must be "logistic" or "boosting", but it is {model!r}')
    others = [index for index in range(len(values)) if index != target]
    left = {one: [other for other in others if other != one] for one in others}
    each = min(design.fewest(models) for models in left.values())
    if each < 1:
        raise InputError(
            f"to calibrate, every example needs a model that had it and one that had not beside the attacked model and any "
            f"other: take at least 6 models, not {len(values)}"
        )
    # By the other models' typical size: gradients of examples span orders of magnitude.
    sizes = values[others].abs().flatten(0, 1).median(dim=0).values.clamp_min(1e-12)
    values = values.sign() * (values.abs() / sizes).log1p()
    train = [_calibrated(values, one, design.matched(left[one], each, seed)) for one in others]
    labels = design.membership[others].flatten()
    return _classified(
        torch.cat(train), labels, _calibrated(values, target, design.matched(others, each, seed)), model, seed
    )


def _log_prob(likelihood: Categorical, outputs: Tensor, targets: Tensor) -> Tensor:
    """log p of the labels, (B,), on the CPU."""
    logs = likelihood.log_probs(in_double(outputs.detach())).cpu()
    return logs.gather(1, targets[:, None]).squeeze(1)


def _at_mean(bnn: BayesianNetwork, part: Posterior, likelihood: Categorical, inputs: Tensor, targets: Tensor) -> Tensor:
    """The features of one component that need no draws, (B, 5): log-likelihood, both norms, alignment, curvature match."""
    mean, std = part.mean_vector().detach(), part.std_vector().detach()
    with torch.no_grad():
        outputs = bnn.outputs(mean, inputs)
    if outputs.ndim != 2:
        raise InputError(f"one label an example is expected, from outputs (B, K), but they are {tuple(outputs.shape)}")
    checked = as_labels(targets, len(inputs), outputs.shape[1])
    squared = in_double(std).square()
    excess = torch.where(squared > 0, 1 / squared - 1 / in_double(bnn.prior.std).square(), 0.0)
    moved = in_double(mean - bnn.trained_vector().to(mean))
    size = max(1, _GRADIENT_NUMBERS // len(mean))
    found = []
    for some, labels in zip(torch.split(inputs, size), torch.split(checked.to(inputs.device), size), strict=True):
        _, gradients = MinibatchLoss(bnn, likelihood, some, labels).per_example(mean.expand(len(some), -1))
        # Of the mean negative log-likelihood of these examples.
        slope = -len(some) * in_double(gradients)
        square = slope.square()
        found.append(torch.stack([square @ squared, square.sum(dim=1).sqrt(), slope @ moved, square @ excess], dim=1))
    return torch.cat([_log_prob(likelihood, outputs, checked)[:, None], torch.cat(found).cpu()], dim=1)


def _calibrated(values: Tensor, model: int, matched: Tensor) -> Tensor:
    """A model's features beside what other models' say of them, (N, 4 F)."""
    own = values[model]
    others = values[matched, torch.arange(values.shape[1])]
    had, had_not = others[: len(matched) // 2].mean(dim=0), others[len(matched) // 2 :].mean(dim=0)
    ratio = (own - had_not).square() - (own - had).square()
    return torch.cat([own, own - had, own - had_not, ratio], dim=1)


def _classified(train: Tensor, labels: Tensor, test: Tensor, model: AttackModel, seed: int) -> Tensor:
    chosen = torch.randperm(len(train), generator=generator(seed, "attack rows"))[:_TRAINING_ROWS]
    classifier: Any
    if model == "logistic":
        classifier = LogisticRegression(max_iter=2000)
    else:
        classifier = HistGradientBoostingClassifier(
            max_leaf_nodes=15, early_stopping=False, random_state=derive_seed(seed, "attack") % 2**32
        )
    attack = make_pipeline(StandardScaler(), classifier)
    attack.fit(train[chosen].numpy(), labels[chosen].numpy())
    return torch.from_numpy(attack.decision_function(test.numpy()))
