"""The loop of a fit to a bound: a tangent after every epoch, an engine along it, estimates, and checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from stfbnn.batches import Batch
from stfbnn.checkpoint import load_checkpoint, prepare_checkpoint, save_checkpoint
from stfbnn.errors import InputError
from stfbnn.guarantees.bound_history import BoundRecord, BoundRun
from stfbnn.guarantees.objective import BoundedCrossEntropy, BoundObjective, Tangent
from stfbnn.inference.engines import build_engine, no_curvature
from stfbnn.inference.estimators import Estimator
from stfbnn.inference.first_look import first_batch, first_look
from stfbnn.inference.loaders import (
    count_examples,
    generator_states,
    kept_generators,
    length,
    set_generator_states,
)
from stfbnn.inference.minibatch import MinibatchLoss, chunks
from stfbnn.inference.survey import checked_batch, survey
from stfbnn.likelihood import LikelihoodLike
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Posterior
from stfbnn.posterior.block_gaussian import BlockGaussianPosterior
from stfbnn.prior import GaussianPrior
from stfbnn.progress import progress_bar
from stfbnn.provenance import Provenance, overlap
from stfbnn.randomness import generator, seeded

Start = Literal["auto", "prior", "posterior"]

# Draws of the estimate after each epoch where the loader has few batches; else one for each chunk.
_ESTIMATE_DRAWS = 64


class BoundLoop:
    """One call of `fit_bound`, its arguments being checked.

    Args:
        bnn: The network.
        loader: The data.
        choices: The settings that a checkpoint has to agree with.
        likelihood: What the user said it is.
        target_key: The target's entry in mappings.
        weight_key: That of the examples' weights.

    Attributes:
        example: Two rows of inputs.
    """

    def __init__(
        self,
        bnn: BayesianNetwork,
        loader: Iterable[Any],
        choices: Mapping[str, Any],
        likelihood: LikelihoodLike,
        target_key: str,
        weight_key: str,
    ) -> None:
        self.bnn, self.loader, self.choices = bnn, loader, choices
        self.keys, self.seed = (target_key, weight_key), int(choices["seed"])
        self.history: list[BoundRecord] = []
        self.best: dict[str, Any] = {}
        self.epoch, self.seconds = 0, 0.0
        _require_unweighted(first_batch(loader, self.seed, *self.keys))
        classes, self.example = first_look(bnn, loader, likelihood, self.seed, *self.keys)
        self.loss = BoundedCrossEntropy(classes, choices["p_min"])

    def begin(
        self, estimator: Estimator, checkpoint: str | os.PathLike[str] | None, resume: bool, progress: bool | None
    ) -> None:
        """Start from a checkpoint, or count the data and estimate the bound at the start."""
        bnn, choices = self.bnn, self.choices
        self.checkpoint = checkpoint
        self.signature = self._signature(estimator)
        if checkpoint is not None:
            prepare_checkpoint(checkpoint, self.signature)
        saved = load_checkpoint(checkpoint, self.signature) if checkpoint is not None and resume else None
        if saved is None:
            self._count(progress)
        else:
            self.num_examples, self.batches = int(saved["num_examples"]), int(saved["batches"])
            self.provenance = Provenance.from_tensor(saved["provenance"])
        self.objective = BoundObjective(choices["objective"], self.num_examples, choices["delta"], choices["priors"])
        if saved is None:
            self.inference: Provenance | None = self.provenance
            if self._from_prior():
                _move_to_prior(bnn.posterior, bnn.prior)
            elif bnn.fitted:
                # What shaped the start shapes the end.
                before = bnn.seen.inference
                self.inference = None if before is None else before.union(self.provenance)
            temperature = self._record(time.perf_counter()).temperature
        else:
            temperature = float(saved["temperature"])
        name, curvature = choices["engine"], None
        if name == "natural-gradient":
            # A resumed engine brings its own.
            curvature = (
                _curvature_at(bnn.posterior, bnn.prior, self.num_examples / temperature)
                if saved is None
                else no_curvature(bnn.posterior)
            )
        options = choices["engine_options"]
        self.engine = build_engine(
            name, bnn.posterior, bnn.prior, self.num_examples, self.batches, curvature, estimator, options
        )
        self.engine.begin(temperature, choices["epochs"] * self.batches)
        if saved is None:
            return
        self.engine.load_state(saved["engine"])
        bnn.load_posterior_state(saved["current"])
        self.history = [BoundRecord(**record) for record in saved["history"]]
        self.best, self.epoch, self.seconds = saved["best"], saved["epoch"], saved["seconds"]
        self.inference = None if saved["inference"] is None else Provenance.from_tensor(saved["inference"])
        set_generator_states(self.loader, saved["loader"])

    def run(self, progress: bool | None) -> BoundRun:
        """Run the epochs that are left, and mark the network as fitted."""
        epochs = self.choices["epochs"]
        with progress_bar("fit to the bound", epochs * self.batches, progress) as bar:
            bar.advance(self.epoch * self.batches)
            while self.epoch < epochs:
                self._one_epoch(bar)
                self._save()
        return self._finish()

    def _count(self, progress: bool | None) -> None:
        with seeded(self.seed, "survey"), progress_bar("look at the data", length(self.loader), progress) as bar:
            found = survey(
                self.bnn,
                self.loader,
                self.loss,
                self.keys[0],
                self.seed,
                curvature=False,
                record=True,
                bar=bar,
                weight_key=self.keys[1],
            )
        given = self.choices["num_examples"]
        self.num_examples = given or count_examples(self.loader, found.num_examples)
        self.batches, self.provenance = found.batches, found.provenance

    def _from_prior(self) -> bool:
        if self.choices["start"] != "auto":
            return bool(self.choices["start"] == "prior")
        bnn = self.bnn
        is_open = getattr(bnn.family, "initial_std", 0.0) is None
        return not bnn.fitted and is_open and bnn.prior_recipe.center == "pretrained"

    def _one_epoch(self, bar: Any) -> None:
        bnn, began = self.bnn, time.perf_counter()
        bnn.check_unchanged()
        noise = generator(self.seed, "noise", self.epoch)
        seen = 0
        with seeded(self.seed, "epoch", self.epoch):
            for given in self.loader:
                batch = self._checked(given)
                risk = self.engine.step(MinibatchLoss(bnn, self.loss, batch.inputs, batch.target), noise)
                if not risk < math.inf:
                    raise InputError(
                        f"the loss became {risk} in epoch {self.epoch + 1}: lower the learning rate with "
                        f"engine_options={{'learning_rate': …}}, or check the data for extreme values"
                    )
                seen += 1
                bar.advance(1, risk=risk, bound=self.history[-1].bound)
        if not seen:
            raise InputError(
                "train_loader gave no batch in this epoch, though it did before; it must be readable again"
            )
        self.epoch += 1
        tangent = self._record(began)
        self.engine.temperature = tangent.temperature
        # What pulls q to the prior is (T/n) KL, so for an engine a new T is the same as a new prior.
        self.engine.prior_changed()

    def _record(self, began: float) -> Tangent:
        """Estimate the bound at the posterior as it is, and keep it if it is the best."""
        posterior = self.bnn.posterior
        risk, error = self._estimate()
        with torch.no_grad():
            kl = max(0.0, float(posterior.kl(self.bnn.prior)))
            mean_std = float(posterior.std_vector().mean())
        tangent = self.objective.tangent(risk, kl)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.history.append(
            BoundRecord(
                self.epoch,
                tangent.bound,
                risk,
                error,
                self.objective.tangent(error, kl).bound,
                kl,
                tangent.temperature,
                tangent.lam,
                mean_std,
                seconds,
            )
        )
        if not self.choices["keep_best"] or not self.best or tangent.bound < self.best["bound"]:
            self.best = {**self.bnn.posterior_state(), "bound": tangent.bound, "epoch": self.epoch}
        return tangent

    @torch.no_grad()
    def _estimate(self) -> tuple[float, float]:
        """The empirical risks of bounded cross-entropy and 0-1 loss, with the same noise every time, to be compared."""
        bnn, noise = self.bnn, generator(self.seed, "bound")
        draws = math.ceil(_ESTIMATE_DRAWS / self.batches)
        totals, examples = torch.zeros(2, dtype=torch.float64), 0
        with seeded(self.seed, "bound"), kept_generators(self.loader):
            for given in self.loader:
                for part in chunks(self._checked(given), bnn.device):
                    for _ in range(draws):
                        vector = bnn.posterior.draw(bnn.draw_noise(noise))
                        found = self.loss.losses(bnn.outputs(vector, part.inputs), part.target)
                        totals += torch.stack([each.sum().cpu().double() for each in found]) / draws
                    examples += len(part)
        risk, error = (float(total) / examples for total in totals)
        if not math.isfinite(risk):
            raise InputError("the loss is not finite: the network's outputs hold NaN or infinite values for some draws")
        return min(risk, 1.0), min(error, 1.0)

    def _checked(self, given: Any) -> Batch:
        batch = checked_batch(given, *self.keys)
        _require_unweighted(batch)
        return batch.to(self.bnn.device)

    def _finish(self) -> BoundRun:
        bnn, choices = self.bnn, self.choices
        kept = int(self.best["epoch"])
        bnn.load_posterior_state(self.best)
        temperature = self.loss.scale * self.history[kept].weight
        bnn.likelihood, bnn.num_examples = self.loss.classes, self.num_examples
        bnn.temperature, bnn.predictive_temperature = temperature, 1.0
        bnn.seen = bnn.seen.after_inference(self.inference)
        seen = 0 if bnn.provenance is None else overlap(self.provenance, bnn.provenance)
        return BoundRun(
            choices["objective"],
            tuple(self.history),
            kept,
            self.num_examples,
            choices["delta"],
            choices["priors"],
            choices["p_min"],
            temperature,
            seen,
            self.engine.name,
            self.seconds,
        )

    def _signature(self, estimator: Estimator) -> dict[str, Any]:
        bnn = self.bnn
        return {
            **self.choices,
            "estimator": repr(estimator),
            "layer": bnn.layer_name,
            "shapes": [list(shape) for shape in bnn.layout.shapes],
            "model": bnn.model_fingerprint,
            "family": repr(bnn.family),
            "prior": bnn.prior_recipe.config(),
            "scales": bnn.prior.scales.tolist(),
            "likelihood": self.loss.classes.config(),
            "batches": length(self.loader),
            "rows": count_examples(self.loader, 0),
        }

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        state = {
            "current": self.bnn.posterior_state(),
            "engine": self.engine.state(),
            "temperature": self.engine.temperature,
            "best": self.best,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": [asdict(record) for record in self.history],
            "num_examples": self.num_examples,
            "batches": self.batches,
            "provenance": self.provenance.to_tensor(),
            "inference": None if self.inference is None else self.inference.to_tensor(),
            "loader": generator_states(self.loader),
        }
        save_checkpoint(self.checkpoint, state, self.signature)


def _require_unweighted(batch: Batch) -> None:
    if batch.weight is not None:
        raise InputError(
            "a bound counts every example once, but train_loader gives weights of examples; leave them out"
        )


@torch.no_grad()
def _move_to_prior(posterior: Posterior, prior: GaussianPrior) -> None:
    """Let q have the prior's mean and widths."""
    posterior.mean_vector().copy_(prior.mean)
    posterior.set_std(prior.std.expand_as(prior.mean))
    if not torch.equal(posterior.mean_vector(), prior.mean):
        raise InputError(
            f'the mean of the posterior {posterior.family!r} cannot be set from outside; pass start="posterior"'
        )


@torch.no_grad()
def _curvature_at(posterior: Posterior, prior: GaussianPrior, effective: float) -> Tensor:
    """The curvature with which natural gradient starts from q as it is: (Σ⁻¹ − 1/s²)/λ, of the shape that the engine takes."""
    pull = prior.std.square().reciprocal().expand_as(prior.mean)
    if not isinstance(posterior, BlockGaussianPosterior):
        return (posterior.std_vector().square().reciprocal() - pull) / effective
    # Off its diagonal the engine takes half of it: what a weight's width is given the others stays, correlations shrink.
    precision = torch.cholesky_inverse(posterior.scale_tril)
    precision.diagonal(dim1=-2, dim2=-1).sub_(pull[posterior.index])
    return precision / effective
