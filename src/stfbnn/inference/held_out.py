"""Held-out data: the score by which the temperature is chosen, and the predictive temperature τ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from stfbnn.batches import rechunk, require_finite, to_device
from stfbnn.draws import Draws, chunk_rows
from stfbnn.errors import InputError
from stfbnn.inference.survey import checked_batch
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork, Weights
from stfbnn.predictive import Prediction
from stfbnn.predictive.weighting import log_average
from stfbnn.provenance import Provenance, ProvenanceRecorder, overlap

# τ is searched between these.
TAU_RANGE = (0.05, 20.0)
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

    Raises:
        InputError: The loader is empty, or a batch does not fit the likelihood.
    """

    def __init__(
        self,
        bnn: BayesianNetwork,
        loader: Iterable[Any],
        likelihood: Likelihood,
        target_key: str,
        samples: int,
        seed: int,
    ) -> None:
        recorder = ProvenanceRecorder()
        batches, targets = [], []
        for batch in loader:
            inputs, target = checked_batch(batch, target_key)
            recorder.add(inputs)
            batches.append(inputs)
            targets.append(target)
        if not batches:
            raise InputError("val_loader gave no batch: it is empty")
        self.provenance = recorder.finish()
        self._chunks = list(rechunk(batches, chunk_rows(batches[0], bnn.device)))
        self._targets = torch.cat(targets).cpu()
        self._bnn, self._samples, self._seed = bnn, samples, seed
        # Replaced when a snapshot of the run is taken back.
        self.likelihood = likelihood
        mean = Draws(bnn, 1, seed, "mean")
        first = next(mean.outputs(to_device(self._chunks[0], bnn.device)))[0]
        likelihood.check(first.cpu(), self._targets[: len(first)])
        likelihood.check_targets(first, self._targets)
        require_finite(self._targets, "the held-out targets")

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
        """Mean negative log density of the averaged predictive, or of that at the mean, nats per example."""
        return -float(self.log_density(self.predict(predictive_temperature, weights)).mean())

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
        likelihood, (logits, shares, count) = self.likelihood, self._logits()
        targets = self._targets[:count]

        def loss(tau: float) -> float:
            each = torch.stack([likelihood.label_log_probs(draw.double(), targets, tau) for draw in logits])
            return -float(log_average(each, shares).mean())

        low, high = TAU_RANGE
        found = minimize_scalar(
            lambda log_tau: loss(math.exp(log_tau)),
            bounds=(math.log(low), math.log(high)),
            method="bounded",
            options={"xatol": 1e-3},
        )
        tau = math.exp(found.x)
        # The draws are the same, so where every row is here and has one label, the score is known already.
        known = count == len(self._targets) and targets.dim() == 1
        return tau, loss(tau) if known else self.nll(tau)

    def _logits(self) -> tuple[list[Tensor], Tensor | None, int]:
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
        return [torch.cat(part) for part in parts], draws.shares, rows
