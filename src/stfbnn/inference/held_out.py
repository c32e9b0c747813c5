"""Held-out data: the score by which the temperature is chosen, and the predictive temperature τ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stfbnn.batches import WEIGHT_KEY, join_targets, rechunk, require_finite, to_device
from stfbnn.draws import Draws, chunk_rows
from stfbnn.errors import InputError
from stfbnn.inference.loaders import shared_examples
from stfbnn.inference.survey import checked_batch, counted_labels, require_weight
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork, Weights
from stfbnn.predictive import Prediction
from stfbnn.predictive.member_outputs import MemberOutputs
from stfbnn.predictive.weighting import mean_over_examples
from stfbnn.provenance import Provenance, ProvenanceRecorder, overlap
from stfbnn.randomness import derive_seed, seeded

# Logits of the held-out rows that are kept for choosing τ; beyond it the first rows are used.
_LOGIT_BYTES = 2**28


class HeldOut:
    """Held-out examples in memory, ready to be scored again and again.

    Args:
        bnn: The network.
        loader: The held-out data.
        likelihood: Of the run.
        target_key: The target's entry in mappings.
        samples: Draws for a score.
        seed: Of the draws; the same for every score, so that scores differ by the posterior alone.
        weight_key: The weights' entry in mappings.

    Attributes:
        provenance: The examples.
        weights: What each example counts in scores, (N,), in float64; None where all count the same.
        counted: Whether each label counts, in the targets' shape; None where all do.

    Raises:
        InputError: The loader is empty, a batch does not fit the likelihood, or nothing in it counts.
    """

    def __init__(
        self,
        bnn: BayesianNetwork,
        loader: Iterable[Any],
        likelihood: Likelihood,
        target_key: str,
        samples: int,
        seed: int,
        weight_key: str = WEIGHT_KEY,
    ) -> None:
        recorder = ProvenanceRecorder()
        batches = []
        for given in loader:
            batch = checked_batch(given, target_key, weight_key)
            recorder.add(batch.inputs)
            batches.append(batch)
        if not batches:
            raise InputError("val_loader gave no batch: it is empty")
        self.provenance = recorder.finish()
        inputs = [batch.inputs for batch in batches]
        self._chunks = list(rechunk(inputs, chunk_rows(inputs[0], bnn.device)))
        targets, weights = join_targets(batches)
        self._targets = targets.cpu()
        self.weights = None if weights is None else weights.cpu().double()
        self._bnn, self._samples, self._seed = bnn, samples, seed
        # Replaced when a snapshot of the run is taken back.
        self.likelihood = likelihood
        mean = Draws(bnn, 1, seed, "mean")
        first = next(mean.outputs(to_device(self._chunks[0], bnn.device)))[0]
        likelihood.check(first.cpu(), self._targets[: len(first)])
        likelihood.check_targets(first, self._targets)
        require_finite(self._targets, "the held-out targets")
        self.counted = counted_labels(likelihood, self._targets)
        labels = self._targets.numel() if self.counted is None else int(self.counted.sum())
        require_weight(1.0 if self.weights is None else float(self.weights.sum()), labels, "val_loader")

    def refuse_seen(self, seen: Provenance, where: str, most: float) -> None:
        """Refuse to be held out if training saw these examples; warn of a few, which may be chance duplicates.

        Args:
            seen: What a stage saw.
            where: That stage, for the message.
            most: The largest share of the held-out examples that it may have seen.

        Raises:
            InputError: They are more than duplicates in a data set explain.
        """
        count = overlap(self.provenance, seen)
        if count > most * self.provenance.count:
            raise InputError(
                f"val_loader is not held out: {count} of its {self.provenance.count} examples were seen by {where}. On "
                f"data that training fitted, the lowest temperature always wins and calibration goes the wrong way; hold "
                f"data out before stage one; if they are honest duplicates, as in tables of few columns, raise max_seen_share"
            )
        if count:
            warnings.warn(
                f"{count} of the held-out examples are equal to ones seen by {where}; if they are not chance duplicates, "
                f"hold data out before stage one",
                stacklevel=4,
            )

    def nll(self, predictive_temperature: float = 1.0, weights: Weights = "sample") -> float:
        """Mean negative log density of the averaged predictive, or of that at the mean, nats per example.

        The mean is weighted where the examples have weights; weights of classes are not in it.
        """
        log_density = self.log_density(self.predict(predictive_temperature, weights))
        return -float(mean_over_examples(log_density, self.weights))

    def at(self, predictive_temperature: float) -> tuple[float, float]:
        """A given τ, and `nll` there, as `tuned` gives the best."""
        return predictive_temperature, self.nll(predictive_temperature)

    def predict(
        self, predictive_temperature: float = 1.0, weights: Weights = "sample", share: float = 1.0
    ) -> Prediction:
        """The held-out examples' predictions, with a share of the draws of a score."""
        draws = Draws(self._bnn, math.ceil(share * self._samples), self._seed, weights)
        return Prediction.concatenate(
            [draws.predict(chunk, self.likelihood, predictive_temperature) for chunk in self._chunks]
        )

    def log_density(self, prediction: Prediction) -> Tensor:
        """The log density that `predict` gave to each held-out target, (N,), in float64."""
        return prediction.log_density(self._targets).double()

    def best_predictive_temperature(self) -> float:
        """τ that minimises the negative log-likelihood of the averaged predictive of each label at logits_s / τ.

        Raises:
            InputError: The likelihood has no logits.
        """
        return self.tuned()[0]

    def tuned(self) -> tuple[float, float]:
        """The best τ, and `nll` there.

        Raises:
            InputError: The likelihood has no logits.
        """
        logits, shares, count = self._logits()
        members = MemberOutputs(logits, self.likelihood, shares)
        targets = self._targets[:count]
        tau = members.best_temperature(targets, self._label_counts(count))
        # The draws are the same, so where every row is here and has one label, the score is known already.
        if count == len(self._targets) and targets.dim() == 1 and self.counted is None:
            return tau, -float(mean_over_examples(self.log_density(members.at(tau)), self.weights))
        return tau, self.nll(tau)

    def _label_counts(self, count: int) -> Tensor | None:
        """What each label of the first ``count`` examples counts, one after another; None where all count the same."""
        if self.counted is None and self.weights is None:
            return None
        shape = self._targets[:count].shape
        labels = torch.ones(shape, dtype=torch.float64) if self.counted is None else self.counted[:count].double()
        if self.weights is not None:
            labels = labels * self.weights[:count].reshape(-1, *[1] * (len(shape) - 1))
        # Where nothing counts in the rows that are kept, all labels do.
        return labels.flatten() if bool((labels > 0).any()) else None

    def _logits(self) -> tuple[Tensor, Tensor | None, int]:
        draws = Draws(self._bnn, self._samples, self._seed)
        parts: list[list[Tensor]] = [[] for _ in range(draws.count)]
        rows = used = 0
        for chunk in self._chunks:
            outputs = torch.cat(list(draws.outputs(to_device(chunk, self._bnn.device)))).cpu()
            for part, draw in zip(parts, outputs, strict=True):
                part.append(draw)
            rows += outputs.shape[1]
            used += outputs.numel() * outputs.element_size()
            if used > _LOGIT_BYTES:
                break
        return torch.stack([torch.cat(part) for part in parts]), draws.shares, rows


def held_out_data(
    bnn: BayesianNetwork,
    train_loader: Iterable[Any],
    loader: Iterable[Any],
    likelihood: Likelihood,
    seed: int,
    samples: int,
    target_key: str,
    weight_key: str,
) -> HeldOut:
    """Read the held-out data once, for all scores of a run with this seed.

    Raises:
        InputError: They are not usable, or stage two is to learn from them.
    """
    with seeded(seed, "held-out"):
        found = HeldOut(bnn, loader, likelihood, target_key, samples, derive_seed(seed, "held-out"), weight_key)
    shared = shared_examples(train_loader, loader)
    if shared:
        raise InputError(
            f"val_loader is not held out: it reads {shared} of the same rows of the same data set as train_loader; "
            f"hold data out before stage one"
        )
    return found


def warn_of_no_gain(network_nll: float | None, nll: float | None, temperature: float) -> None:
    """Warn where the Bayesian network's held-out score is no better than the trained network's, where both are known."""
    if network_nll is not None and nll is not None and not nll < network_nll:
        warnings.warn(
            f"on the held-out data the Bayesian network (NLL {nll:.4f} at T={temperature:g}) is no better "
            f"than the trained network ({network_nll:.4f}): it has not converged (try more epochs), or there was "
            f"nothing to repair",
            stacklevel=5,
        )
