"""The study of membership inference: shadow models, all releases on each of them, and all attacks on all releases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stfbnn.baselines.predictor import Predictor, require_count
from stfbnn.errors import InputError
from stfbnn.network import BayesianNetwork
from stfbnn.predictive import CategoricalPrediction
from stfbnn.privacy.artifact_features import AttackModel, artifact_features, artifact_scores
from stfbnn.privacy.attacks import ShadowScores, membership_attacks
from stfbnn.privacy.figures import by_class, membership_figures
from stfbnn.privacy.releases import Release, at_own_temperature, describe, released_network, resolve_releases
from stfbnn.privacy.result import AttackOutcome, PrivacyStudy, ReleaseOutcome, Spread
from stfbnn.privacy.scores import loss_score, scaled_confidence
from stfbnn.privacy.shadows import Design, Pool, Shadows, TrainModel
from stfbnn.progress import progress_bar

FEWEST_MODELS = 6
"""Below it some examples are left with a single model of a kind, or with none, to calibrate by."""

# Raised where what is kept of a release can no longer be read by the attacks.
_OBSERVER = 1


def privacy_study(
    pool_inputs: Tensor,
    pool_labels: Tensor,
    train_model: TrainModel,
    releases: Iterable[str] | Mapping[str, str | Release],
    *,
    make_model: Callable[[], nn.Module],
    held_out: tuple[Tensor, Tensor],
    models: int = 16,
    targets: int | None = None,
    artifact_draws: int = 32,
    artifact_attacks: Sequence[AttackModel] = ("logistic", "boosting"),
    fprs: Sequence[float] = (0.01, 0.001),
    confidence: float = 0.95,
    bootstrap: int = 200,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    progress: bool | None = None,
) -> PrivacyStudy:
    """Measure how well an attacker tells who was in the training data, of several releases of one kind of network.

    ``models`` networks are each trained on a random half of the pool, every example being in exactly half of them; every
    release is fitted on top of each, and predicts the whole pool. Then each of ``targets`` models in turn is attacked with all
    others as shadow models: the released predictive by thresholds, LiRA and RMIA, and the file of a posterior by classifiers
    over `artifact_features` that were trained on the other models' files. Everything random follows from ``seed``.

    The attacker knows the true labels, the pool, the training procedure and all others' membership; of the attacked model what
    is released. He is given as many shadow models that had an example as models that had not: in a balanced design the numbers
    themselves would tell the attacked model's members.

    Args:
        pool_inputs: (N, …), float32, as the network takes them.
        pool_labels: (N,), int64.
        train_model: Stage one, ``(members, seed) -> network``, members being numbers of the pool's examples.
        releases: Names of `RELEASES`, or a mapping from names to such names and to functions `Release`.
        make_model: An untrained network of the architecture that ``train_model`` gives, into which kept weights are loaded.
        held_out: Inputs and labels that no shadow model trains on, from which releases take their temperatures.
        models: M, even, at least 6.
        targets: How many of them are attacked; None for all, which costs no training.
        artifact_draws: Posterior draws of which the attacker on the file looks at each.
        artifact_attacks: "logistic", "boosting", both, or none.
        fprs: False-positive rates at which the rate of true positives is told.
        confidence: Coverage of the intervals.
        bootstrap: Resamples for the interval of the advantage.
        seed: A non-negative integer.
        folder: Where networks and predictions are kept, so that a study that was killed goes on; None keeps nothing.
        settings: What identifies ``train_model`` (architecture, epochs …), JSON values; a folder with others is refused.
        batch_size: Of the releases' training.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        The figures of every attack on every release, with tables and a verdict in words.

    Raises:
        InputError: An argument is not usable; found before any training where possible.
        CheckpointError: The folder holds another study, or a damaged file.
    """
    chosen = resolve_releases(releases)
    require_count(models, "models", least=FEWEST_MODELS)
    attacked = models if targets is None else require_count(targets, "targets")
    if attacked > models:
        raise InputError(f"targets must be from 1 to {models}, the number of models, but it is {targets}")
    require_count(artifact_draws, "artifact_draws")
    unknown = [one for one in artifact_attacks if one not in ("logistic", "boosting")]
    if unknown:
        raise InputError(f'artifact_attacks must be of "logistic" and "boosting", but there is {unknown[0]!r}')
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise InputError("held_out must be a pair (inputs, labels) of examples that no shadow model trains on")
    # The figures' own checks, made before hours of training.
    membership_figures(
        [0.0, 1.0, 0.0, 1.0], [True, True, False, False], fprs=fprs, confidence=confidence, bootstrap=100
    )
    pool = Pool(pool_inputs, pool_labels, *held_out)
    design = Design.balanced(len(pool_labels), models, seed)
    shadows = Shadows(
        pool,
        design,
        train_model,
        make_model,
        seed=seed,
        folder=None if folder is None else Path(folder),
        settings=settings or {},
        batch_size=require_count(batch_size, "batch_size"),
    )
    looks = artifact_draws if artifact_attacks else 0
    observed = shadows.run(chosen, _observer(pool, looks, seed), {"draws": looks, "form": _OBSERVER}, progress)
    measure = {"fprs": fprs, "confidence": confidence, "seed": seed, "bootstrap": bootstrap}
    found = {}
    with progress_bar("attacks", len(chosen) * attacked, progress) as bar:
        for name, kept in observed.items():
            attacker = Attacker(kept, pool.labels, design, artifact_attacks, seed)
            scores: dict[str, list[Tensor]] = {}
            for target in range(attacked):
                for attack, score in attacker.attack(target).items():
                    scores.setdefault(attack, []).append(score)
                bar.advance()
            found[name] = _outcome(name, kept["log_probs"], pool.labels, design.membership, scores, measure)
    said = {
        "examples": len(pool_labels),
        "models": models,
        "targets": attacked,
        "seed": seed,
        "artifact_draws": artifact_draws,
        "artifact_attacks": list(artifact_attacks),
        "releases": {name: describe(release) for name, release in chosen.items()},
        "training": dict(settings or {}),
    }
    return PrivacyStudy(found, said)


def threshold_privacy(
    predictor: Predictor | BayesianNetwork,
    member_inputs: Any,
    member_labels: Tensor,
    other_inputs: Any,
    other_labels: Tensor,
    *,
    fprs: Sequence[float] = (0.01, 0.001),
    confidence: float = 0.95,
    bootstrap: int = 1000,
    samples: int = 32,
    seed: int = 0,
) -> ReleaseOutcome:
    """Attack one released predictive by thresholds alone: what can be said without shadow models.

    It bounds the leak from below: attacks with shadow models find more, above all at low false-positive rates.

    Args:
        predictor: A method of ``stfbnn.baselines``, or a Bayesian network after `fit`.
        member_inputs: Training examples, as for ``stfbnn.predict``.
        member_labels: (n,).
        other_inputs: Examples of the same distribution that no stage saw.
        other_labels: (m,).
        fprs: False-positive rates at which the rate of true positives is told.
        confidence: Coverage of the intervals.
        bootstrap: Resamples for the interval of the advantage.
        samples: Posterior draws of a Bayesian network.
        seed: Which draws; of the bootstrap too.

    Raises:
        InputError: The data are not usable, or the predictor is no classifier.
    """
    if isinstance(predictor, BayesianNetwork):
        predictor = at_own_temperature(predictor, samples, seed)
    logs = torch.cat([_log_probs(predictor, inputs) for inputs in (member_inputs, other_inputs)])
    labels = torch.cat([member_labels.cpu(), other_labels.cpu()])
    member = torch.arange(len(logs)) < len(logs) - len(other_labels)
    scores = {name: [one] for name, one in membership_attacks(logs, labels, member).items()}
    measure = {"fprs": fprs, "confidence": confidence, "seed": seed, "bootstrap": bootstrap}
    return _outcome("predictor", logs[None], labels, member[None], scores, measure)


class Attacker:
    """All attacks on the models of one release, each with the others as shadow models.

    Args:
        kept: Of the release: ``log_probs`` (M, N, K) and, for posteriors, ``features`` (M, N, F).
        labels: (N,).
        design: Who trained on what.
        artifact_attacks: Classifiers for the posterior's file.
        seed: Of the choice of shadow models, and of the classifiers.
    """

    def __init__(
        self,
        kept: Mapping[str, Tensor],
        labels: Tensor,
        design: Design,
        artifact_attacks: Sequence[AttackModel] = (),
        seed: int = 0,
    ) -> None:
        self._log_probs, self._labels, self._design, self._seed = kept["log_probs"], labels, design, seed
        self._log_p = torch.stack([loss_score(one, labels) for one in self._log_probs])
        self._phi = torch.stack([scaled_confidence(one, labels) for one in self._log_probs])
        self._artifact_attacks = artifact_attacks if "features" in kept else ()
        if self._artifact_attacks:
            # Who has the file has the predictive.
            self._features = torch.cat([kept["features"].double(), self._phi[:, :, None]], dim=2)

    def attack(self, target: int) -> dict[str, Tensor]:
        """Attack one model; its row of the design is not used.

        Returns:
            Scores (N,) by attack, higher for members.
        """
        others = [index for index in range(len(self._design)) if index != target]
        each = self._design.fewest(others)
        chosen, columns = self._design.matched(others, each, self._seed), torch.arange(len(self._labels))
        member = (torch.arange(2 * each) < each)[:, None].expand(-1, len(self._labels))
        shadow = ShadowScores(self._log_p[chosen, columns], self._phi[chosen, columns], member)
        inside = self._design.membership[target]
        found = membership_attacks(self._log_probs[target], self._labels, inside, shadow=shadow)
        for model in self._artifact_attacks:
            scores = artifact_scores(self._features, self._design, target, model=model, seed=self._seed)
            found[f"artifact_{model}"] = scores
        return found


def _observer(pool: Pool, draws: int, seed: int) -> Callable[[Predictor], Mapping[str, Tensor]]:
    """What is kept of a release: predictions, and features of the posterior's file where there is one and draws are wanted."""

    def observe(predictor: Predictor) -> Mapping[str, Tensor]:
        kept = {"log_probs": _log_probs(predictor, pool.inputs).float()}
        bnn = released_network(predictor)
        if bnn is not None and draws:
            kept["features"] = artifact_features(bnn, pool.inputs, pool.labels, draws=draws, seed=seed).values
        return kept

    return observe


def _log_probs(predictor: Predictor, inputs: Any) -> Tensor:
    prediction = predictor.outputs(inputs).at()
    if not isinstance(prediction, CategoricalPrediction) or prediction.log_probs.ndim != 2:
        raise InputError("membership inference here is for classifiers of one label an example, from outputs (B, K)")
    return prediction.log_probs


def _outcome(
    name: str,
    log_probs: Tensor,
    labels: Tensor,
    membership: Tensor,
    scores: Mapping[str, Sequence[Tensor]],
    measure: Mapping[str, Any],
) -> ReleaseOutcome:
    """The figures of one release: predictions of all models, (M, N, K), and scores of the attacked ones, (N,) each."""
    count = len(next(iter(scores.values())))
    member = membership[:count].flatten()
    outcomes = {}
    for attack, each in scores.items():
        apart = [
            membership_figures(one, inside, **{**measure, "bootstrap": 100})
            for one, inside in zip(each, membership, strict=False)
        ]
        outcomes[attack] = AttackOutcome(
            name=attack,
            on="artifact" if attack.startswith("artifact") else "predictive",
            figures=membership_figures(torch.cat(list(each)), member, **measure),
            aucs=tuple(one.auc.value for one in apart),
            advantages=tuple(one.held_out_advantage.value for one in apart),
            tprs=tuple(tuple(point.tpr.value for point in one.tpr_at) for one in apart),
        )
    right = log_probs.argmax(dim=2) == labels
    loss = -torch.stack([loss_score(one, labels) for one in log_probs])
    best = max((one for one in outcomes.values() if one.on == "predictive"), key=lambda one: one.auc.mean)
    classes = by_class(
        torch.cat(list(scores[best.name])),
        member,
        labels.repeat(count),
        log_probs=log_probs[:count].flatten(0, 1),
        confidence=measure["confidence"],
        seed=measure["seed"],
    )
    return ReleaseOutcome(
        name=name,
        accuracy_members=_over_models(right, membership),
        accuracy_others=_over_models(right, ~membership),
        nll_members=_over_models(loss, membership),
        nll_others=_over_models(loss, ~membership),
        attacks=outcomes,
        classes=classes,
    )


def _over_models(values: Tensor, chosen: Tensor) -> Spread:
    """Each model's mean over its chosen examples, both (M, N)."""
    return Spread.of([float(row[inside].double().mean()) for row, inside in zip(values, chosen, strict=True)])
