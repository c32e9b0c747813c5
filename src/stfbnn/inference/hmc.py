"""Hamiltonian Monte Carlo: the reference by which a variational answer is judged, for layers of up to some hundred weights.

It samples the distribution that minimises E_q[−Σ log p(y|x,w)] + T KL(q‖p) over ALL distributions q, not over one family:
q(w) ∝ p(w) p(D|w)^(1/T). Chains are run by Pyro's no-U-turn sampler (Hoffman & Gelman 2014) and judged by ArviZ's diagnostics
(Vehtari et al. 2021); both come with ``pip install 'stfbnn[hmc]'``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, Batch, Inputs, concatenate, join_targets
from stfbnn.errors import InputError
from stfbnn.inference.checks import require_count, require_gradients, require_positive
from stfbnn.inference.loaders import count_examples
from stfbnn.inference.minibatch import chunks
from stfbnn.inference.survey import checked_batch, counted_labels, require_weight
from stfbnn.likelihood import Likelihood, LikelihoodLike, resolve_likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import SampledPosterior, Samples
from stfbnn.progress import progress_bar
from stfbnn.randomness import seeded

# Vehtari et al. (2021): chains that agree have a smaller R̂, and each should be worth this many independent draws.
LARGEST_RHAT = 1.01
LEAST_ESS_A_CHAIN = 100
# Split chains of fewer draws have no autocorrelation to speak of.
_FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class HMCRun:
    """The result of `sample_hmc`.

    Attributes:
        temperature: T of the sampled posterior.
        num_examples: N.
        chains: Independent chains.
        samples: Draws kept of each.
        warmup: Draws of each that tuned it, and were thrown away.
        rhat: Split R̂ of every weight, rank-normalised, the larger of the bulk's and the tails', under the layer's own
            parameter names; 1 where all chains agree.
        ess: Effective sample size of every weight in the bulk, rank-normalised, all chains together.
        acceptance: Mean acceptance probability of each chain; about ``target_accept`` where the tuning worked.
        divergences: Draws of each chain at which the integrator failed: a few hint at places that the chain cannot enter.
        step_size: The integrator's step of each chain.
        gradients: Passes over all data, warm-up included.
        seconds: Wall time.
    """

    temperature: float
    num_examples: int
    chains: int
    samples: int
    warmup: int
    rhat: Mapping[str, Tensor]
    ess: Mapping[str, Tensor]
    acceptance: tuple[float, ...]
    divergences: tuple[int, ...]
    step_size: tuple[float, ...]
    gradients: int
    seconds: float

    @property
    def largest_rhat(self) -> float:
        """The largest R̂ of all weights."""
        return max(float(value.max()) for value in self.rhat.values())

    @property
    def smallest_ess(self) -> float:
        """The smallest effective sample size of all weights."""
        return min(float(value.min()) for value in self.ess.values())

    def table(self) -> Table:
        """How far the chains can be trusted, a row for each parameter of the layer, for a terminal."""
        caption = (
            f"{self.chains} chains of {self.samples} draws after {self.warmup} of warm-up, T={self.temperature:g}: acceptance "
            f"{min(self.acceptance):.2f}–{max(self.acceptance):.2f}, {sum(self.divergences)} divergences, {self.gradients} "
            f"gradients, {self.seconds:.1f} s ({self.smallest_ess / self.seconds:.2f} effective draws a second)."
        )
        table = Table(title="Hamiltonian Monte Carlo", title_justify="left", caption=caption, caption_justify="left")
        for heading in ("parameter", "weights", "largest R̂", "smallest ESS", "median ESS"):
            table.add_column(heading, justify="left" if heading == "parameter" else "right")
        for name, rhat in self.rhat.items():
            ess = self.ess[name]
            cells = (f"{float(rhat.max()):.4f}", f"{float(ess.min()):.0f}", f"{float(ess.median()):.0f}")
            table.add_row(name, str(rhat.numel()), *cells)
        return table

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        plain = {
            name: {key: part.tolist() for key, part in value.items()} if isinstance(value, Mapping) else value
            for name, value in vars(self).items()
        }
        return {**plain, "largest_rhat": self.largest_rhat, "smallest_ess": self.smallest_ess}


def sample_hmc(
    bnn: BayesianNetwork,
    train_loader: Iterable[Any],
    *,
    samples: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    likelihood: LikelihoodLike = "auto",
    temperature: float = 1.0,
    seed: int = 0,
    num_examples: int | None = None,
    max_parameters: int = 2000,
    dense_mass: bool = False,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    target_key: str = TARGET_KEY,
    weight_key: str = WEIGHT_KEY,
    progress: bool | None = None,
) -> HMCRun:
    """Sample the exact posterior of the first layer, and make the samples the network's posterior.

    The energy is U(w) = −(1/T) Σ_n a_n log p(y_n|x_n,w) − log p(w), a_n being the examples' weights (1 where none are given),
    with the trunk frozen and all data in memory. Chains start at
    draws of the prior, so that agreement means something, and run one after another in double precision on the CPU, the
    network on its own device. The prior's scale stays as it is, also where it is to be learned. A noise that the likelihood
    would learn stays as it is, or, where it is unknown, at its estimate from the trained network's residuals. If the run fails
    or is interrupted, the network is left as it was.

    Args:
        bnn: The network, from `bayesianize`; the family of its posterior does not matter.
        train_loader: Batches (inputs, target) or (inputs, target, weight), or mappings with ``target_key``; read once, and kept
            as they were then.
        samples: Draws to keep of each chain.
        warmup: Draws before those, which tune the step and the mass matrix.
        chains: How many, at least 2: one alone cannot show whether it has converged.
        likelihood: "auto" (integer targets: categorical; float: Gaussian), a name, or an object, such as ``bnn.likelihood``
            for the noise that `fit` learned.
        temperature: T; 1 is Bayes.
        seed: A non-negative integer, from which everything random follows.
        num_examples: N, by which the mean over rows of the (weighted) log-likelihood is multiplied; None takes the size of the
            loader's data set.
        max_parameters: Larger layers are refused: chains would not converge in reasonable time.
        dense_mass: Tune a whole mass matrix, not its diagonal: for strongly correlated weights, with a warm-up of several times
            their number.
        target_accept: Mean acceptance probability that the step is tuned for; a higher one means smaller steps.
        max_tree_depth: At most 2^depth − 1 steps for one draw.
        target_key: The target's entry in mappings.
        weight_key: The examples' weights' entry in mappings, where they have any.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        The chains' diagnostics. ``bnn.posterior.samples`` (chains · samples, d) holds the draws, chain after chain.

    Raises:
        InputError: An argument or a batch is not usable, the layer is too large, or Pyro or ArviZ is not installed; raised
            before the first draw.
        ModelChangedError: The user's model was changed since `bayesianize`.

    Warns:
        UserWarning: The chains do not agree (R̂ > 1.01), are worth too few draws, or diverged.
    """
    mcmc, nuts, array_stats = _libraries()
    require_count(
        samples=samples, warmup=warmup, chains=chains, max_parameters=max_parameters, max_tree_depth=max_tree_depth
    )
    require_positive(temperature=temperature, target_accept=target_accept)
    if samples < _FEWEST_SAMPLES:
        raise InputError(f"samples must be at least {_FEWEST_SAMPLES} to judge a chain by, but it is {samples}")
    if chains == 1:
        raise InputError("one chain cannot show whether it has converged: chains must be at least 2")
    if target_accept >= 1:
        raise InputError(f"target_accept must be below 1, but it is {target_accept}")
    if num_examples is not None:
        require_count(num_examples=num_examples)
    size = bnn.layout.size
    if size > max_parameters:
        raise InputError(
            f"the layer {bnn.layer_name!r} has {size} weights, more than max_parameters={max_parameters}: chains over so many "
            f"rarely converge in reasonable time. Use stfbnn.fit, or raise max_parameters if you can wait"
        )
    require_gradients(bnn.posterior)
    bnn.check_unchanged()
    started = time.perf_counter()
    with seeded(seed, "data"):
        data = _read(train_loader, target_key, weight_key)
    chosen = resolve_likelihood(likelihood, data.target).to(bnn.device)
    size_of_data = num_examples or count_examples(train_loader, len(data))
    energy = _Energy(bnn, chosen, data.inputs, data.target, size_of_data, temperature, data.weight)

    draws, acceptance, divergences, step_size = [], [], [], []
    with progress_bar("sample", chains * (warmup + samples), progress) as bar:
        for chain in range(chains):
            # The sampler forgets its own state at the end.
            last: dict[str, float] = {}

            def note(kernel: Any, *_: Any, last: dict[str, float] = last) -> None:
                last |= {"acceptance": float(kernel.logging()["acc. prob"]), "step": float(kernel.step_size)}
                bar.advance(1, acceptance=last["acceptance"])

            with seeded(seed, "chain", chain):
                start = energy.prior_mean + energy.prior_std * torch.randn(size, dtype=torch.float64)
                kernel = nuts(
                    potential_fn=lambda state: energy(state["weights"]),
                    full_mass=dense_mass,
                    target_accept_prob=target_accept,
                    max_tree_depth=max_tree_depth,
                )
                run = mcmc(
                    kernel,
                    num_samples=samples,
                    warmup_steps=warmup,
                    initial_params={"weights": start},
                    disable_progbar=True,
                    hook_fn=note,
                )
                run.run()
            draws.append(run.get_samples()["weights"])
            divergences.append(len(run.diagnostics()["divergences"]["chain 0"]))
            acceptance.append(last["acceptance"])
            step_size.append(last["step"])

    together = torch.stack(draws)
    result = HMCRun(
        temperature=float(temperature),
        num_examples=energy.num_examples,
        chains=chains,
        samples=samples,
        warmup=warmup,
        rhat=bnn.layout.unflatten(_each(array_stats.rhat, together)),
        ess=bnn.layout.unflatten(_each(array_stats.ess, together)),
        acceptance=tuple(acceptance),
        divergences=tuple(divergences),
        step_size=tuple(step_size),
        gradients=energy.evaluations,
        seconds=time.perf_counter() - started,
    )
    bnn.family = Samples(chains * samples)
    bnn.posterior = SampledPosterior(bnn.layout, together.flatten(0, 1).to(bnn.posterior.mean_vector()))
    bnn.likelihood, bnn.num_examples = chosen, energy.num_examples
    bnn.temperature, bnn.predictive_temperature = float(temperature), 1.0
    _warn(result)
    return result


class _Energy:
    """U(w) and its gradient, chunk by chunk, so that no more than one chunk's activations are in memory."""

    def __init__(
        self,
        bnn: BayesianNetwork,
        likelihood: Likelihood,
        inputs: Inputs,
        target: Tensor,
        num_examples: int,
        temperature: float,
        weight: Tensor | None = None,
    ) -> None:
        self._bnn, self._likelihood = bnn, likelihood
        self._chunks = chunks(Batch(inputs, target, weight).to(bnn.device), bnn.device)
        self.num_examples = num_examples
        self._factor = num_examples / len(target) / temperature
        self._like = bnn.posterior.mean_vector().detach()
        self.prior_mean, self.prior_std = bnn.prior.mean.cpu().double(), bnn.prior.std.cpu().double()
        self.evaluations = 0
        self._check()

    def __call__(self, weights: Tensor) -> Tensor:
        """U at the weights (d,), a scalar in nats up to a constant, whose gradient is known."""
        vector = weights.detach().to(self._like).requires_grad_()
        total, gradient = 0.0, torch.zeros_like(vector)
        # What is exact is not to depend on a surrounding autocast.
        with torch.enable_grad(), self._bnn.computing_in("32-true"):
            for part in self._chunks:
                outputs = self._bnn.outputs(vector, part.inputs)
                loss = -part.weighted(self._likelihood.log_prob(outputs, part.target)).sum()
                gradient += torch.autograd.grad(loss, vector)[0]
                total += float(loss.detach())
        self.evaluations += 1
        with torch.no_grad():
            apart = (weights - self.prior_mean) / self.prior_std
            value = self._factor * total + 0.5 * apart.square().sum()
            slope = self._factor * gradient.to(weights) + apart / self.prior_std
        # A stand-in with this value and this gradient, for the sampler differentiates what it is given.
        return value + (weights - weights.detach()) @ slope

    @torch.no_grad()
    def _check(self) -> None:
        """Run all data once at the trained weights, and estimate a noise that is not known."""
        weights = self._bnn.trained_vector().to(self._like)
        unknown = any(bool(buffer.isnan().any()) for buffer in self._likelihood.buffers())
        seen, labels = 0.0, 0
        with self._bnn.computing_in("32-true"):
            for part in self._chunks:
                try:
                    outputs = self._bnn.outputs(weights, part.inputs)
                except (RuntimeError, TypeError) as error:
                    raise InputError(f"the model does not run on the batches of train_loader: {error}") from error
                self._likelihood.check(outputs, part.target)
                counted = counted_labels(self._likelihood, part.target)
                labels += part.target.numel() if counted is None else int(counted.sum())
                counts = part.total_weight
                seen += counts
                if unknown and counts > 0:
                    self._likelihood.move(self._likelihood.estimate(outputs, part.target, part.weight), counts / seen)
        require_weight(seen, labels, "train_loader")


def _libraries() -> tuple[Any, Any, Any]:
    try:
        from arviz_stats.base.array import array_stats  # noqa: PLC0415 - optional
        from pyro.infer.mcmc import MCMC, NUTS  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise InputError(
            f"Hamiltonian Monte Carlo needs pyro-ppl and arviz-stats, but {error.name} is not installed: "
            f"pip install 'stfbnn[hmc]'"
        ) from error
    return MCMC, NUTS, array_stats


def _read(loader: Iterable[Any], target_key: str, weight_key: str) -> Batch:
    batches = [checked_batch(batch, target_key, weight_key) for batch in loader]
    if not batches:
        raise InputError("train_loader gave no batch: it is empty, or drop_last dropped its only one")
    return Batch(concatenate([batch.inputs for batch in batches]), *join_targets(batches))


def _each(statistic: Any, draws: Tensor) -> Tensor:
    """A statistic of every weight, (d,), from draws (chains, samples, d)."""
    return torch.as_tensor(np.asarray(statistic(draws.numpy(), chain_axis=0, draw_axis=1)))


def _warn(run: HMCRun) -> None:
    reasons = []
    if not run.largest_rhat <= LARGEST_RHAT:
        reasons.append(f"the chains do not agree (largest R̂ {run.largest_rhat:.3f}, should be at most {LARGEST_RHAT})")
    enough = LEAST_ESS_A_CHAIN * run.chains
    if not run.smallest_ess >= enough:
        reasons.append(
            f"they are worth only {run.smallest_ess:.0f} independent draws for some weight (should be {enough})"
        )
    if any(run.divergences):
        reasons.append(f"the integrator diverged at {sum(run.divergences)} draws (raise target_accept)")
    if reasons:
        warnings.warn(
            f"these samples are no reference yet: {'; '.join(reasons)}. Take more warm-up and samples", stacklevel=3
        )
