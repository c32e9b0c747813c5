"""SWAG: a Gaussian through the iterates of SGD at a constant learning rate (Maddox et al., 2019).

Written here because no maintained library has it without also needing torchvision; the batch-norm pass is PyTorch's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from stfbnn.baselines.predictor import (
    PLAIN,
    Reading,
    call_network,
    collect_outputs,
    input_chunks,
    require_count,
    require_likelihood,
    require_network,
)
from stfbnn.batches import Inputs, call_model, module_device, split_batch, to_device
from stfbnn.errors import InputError
from stfbnn.likelihood import Likelihood
from stfbnn.predictive import MemberOutputs
from stfbnn.progress import progress_bar
from stfbnn.randomness import derive_seed, generator, seeded
from stfbnn.training import train
from stfbnn.training_choices import LossChoice, Objective, build_optimizer

# Weight vectors are kept for all chunks up to this size, and drawn anew for every chunk beyond it.
_KEPT_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class SWAGPosterior:
    """N(θ̄, ½ diag(σ²) + D Dᵀ / (2 (K − 1))) over the P trainable weights, all parameters one after another.

    Attributes:
        mean: θ̄, (P,): the mean of the iterates.
        variance: σ², (P,): the mean of their squares less the square of their mean.
        deviations: D as rows, (K, P), K at least 2: each of the last K iterates less the mean of those up to it.
        iterates: How many there were.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor
    iterates: int

    def draw(self, random: torch.Generator) -> Tensor:
        """θ̄ + σ z₁ / √2 + D z₂ / √(2 (K − 1)), (P,), with standard normal z₁ and z₂ (their equation 1).

        Args:
            random: On the CPU.
        """
        rank = len(self.deviations)
        diagonal = torch.randn(self.mean.shape, generator=random).to(self.mean)
        low_rank = torch.randn(rank, generator=random).to(self.mean)
        by_weight = self.variance.sqrt() * diagonal / math.sqrt(2)
        return self.mean + by_weight + low_rank @ self.deviations / math.sqrt(2 * (rank - 1))


class Moments:
    """Running mean and variance of vectors, and the last deviations from the mean, in float64.

    Welford's update: algebraically the running first and second moments of the source, without their loss of digits where the
    iterates hardly differ.

    Args:
        rank: K, how many deviations are kept.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._count = 0
        self._deviations: list[Tensor] = []

    def add(self, vector: Tensor) -> None:
        """Take in an iterate, (P,), on any device."""
        value = vector.detach().cpu().double()
        if self._count == 0:
            self._mean, self._squares = torch.zeros_like(value), torch.zeros_like(value)
        self._count += 1
        before = value - self._mean
        self._mean += before / self._count
        after = value - self._mean
        self._squares += before * after
        kept = after.to(torch.promote_types(vector.dtype, torch.float32))
        self._deviations = [*self._deviations, kept][-self._rank :]

    def posterior(self, device: torch.device, dtype: torch.dtype) -> SWAGPosterior:
        """What the iterates so far come to.

        Raises:
            InputError: There are fewer than two.
        """
        if self._count < 2:
            raise InputError(
                f"a Gaussian needs at least two iterates, but {self._count} were taken; lower collect_every"
            )
        mean, variance, deviations = (
            value.to(device, dtype)
            for value in (self._mean, self._squares / self._count, torch.stack(self._deviations))
        )
        return SWAGPosterior(mean, variance, deviations, self._count)


class SWAG:
    """Networks drawn from a `SWAGPosterior`, each with batch-norm statistics of its own; `fit_swag` makes it.

    Args:
        network: The network in evaluation mode, whose trainable parameters the draws stand in for; it becomes this object's.
        posterior: Over its trainable parameters.
        likelihood: What its outputs mean.
        samples: Draws to average.
        seed: Which draws; draw s is the same whatever ``samples`` is.
        reading: How batches and what the network returns are read.

    Attributes:
        posterior: The Gaussian.
        trainable_parameters: (2 + K) P: mean, variance and deviations.
        artifact_bytes: Of these, and of every draw's batch-norm statistics, for which the training data are needed otherwise.
    """

    def __init__(
        self,
        network: nn.Module,
        posterior: SWAGPosterior,
        likelihood: Likelihood,
        samples: int,
        seed: int,
        reading: Reading = PLAIN,
    ) -> None:
        self.likelihood, self.posterior, self.samples, self.seed = likelihood, posterior, samples, seed
        self._network, self._reading = network, reading
        self._parameters = [(name, value.shape) for name, value in network.named_parameters() if value.requires_grad]
        self._statistics: list[dict[str, Tensor]] = [{} for _ in range(samples)]
        kept = samples * posterior.mean.numel() * posterior.mean.element_size() <= _KEPT_BYTES
        self._vectors = [self._draw(index) for index in range(samples)] if kept else None

    @property
    def trainable_parameters(self) -> int:
        """(2 + K) P: mean, variance and deviations."""
        return sum(map(torch.numel, self._learned()))

    @property
    def artifact_bytes(self) -> int:
        """Bytes of mean, variance, deviations and every draw's batch-norm statistics."""
        tensors = [*self._learned(), *(value for one in self._statistics for value in one.values())]
        return sum(value.numel() * value.element_size() for value in tensors)

    def vector(self, index: int) -> Tensor:
        """The weights of draw ``index``, (P,)."""
        return self._draw(index) if self._vectors is None else self._vectors[index]

    def state(self, index: int) -> dict[str, Tensor]:
        """The weights and batch-norm statistics of draw ``index``, under the network's names."""
        sizes = [shape.numel() for _, shape in self._parameters]
        parts = torch.split(self.vector(index), sizes)
        weights = {
            name: part.view(shape).to(self._network.get_parameter(name).dtype)
            for (name, shape), part in zip(self._parameters, parts, strict=True)
        }
        return {**weights, **self._statistics[index]}

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs of every draw, (samples, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            InputError: There are no data, or they are not finite or of a wrong form.
        """
        chunks = input_chunks(data, module_device(self._network), self._reading)
        return MemberOutputs(collect_outputs(self._members, chunks), self.likelihood)

    def estimate_statistics(self, loader: Iterable[Any], progress: bool | None = None) -> None:
        """Estimate every draw's batch-norm statistics by one pass over the training data each; nothing without batch norm.

        The pass runs in training mode, with dropout, as training did; its random numbers follow from the seed.

        Args:
            loader: Training batches.
            progress: Show a bar; None shows it on a terminal.

        Raises:
            InputError: A batch is of a wrong form.
        """
        if not _statistics_of(self._network):
            return
        with progress_bar("SWAG: batch-norm statistics", self.samples, progress) as bar:
            for index in range(self.samples):
                network = copy.deepcopy(self._network)
                network.load_state_dict(self.state(index), strict=False)
                with seeded(self.seed, "swag batch norm", index):
                    # In a list, of which update_bn takes the first entry, so that inputs of any form come through.
                    update_bn(([inputs] for inputs in self._training_inputs(loader)), _Called(network))
                self._statistics[index] = _statistics_of(network)
                bar.advance()

    def _training_inputs(self, loader: Iterable[Any]) -> Iterator[Inputs]:
        device = module_device(self._network)
        for batch in loader:
            inputs, _ = split_batch(batch, self._reading.target_key, weight_key=self._reading.weight_key)
            yield to_device(inputs, device)

    def _draw(self, index: int) -> Tensor:
        return self.posterior.draw(generator(self.seed, "swag draw", index))

    def _learned(self) -> tuple[Tensor, ...]:
        return self.posterior.mean, self.posterior.variance, self.posterior.deviations

    def _members(self, _: int, chunk: Inputs) -> Iterator[Tensor]:
        for index in range(self.samples):
            state = self.state(index)
            yield call_network(_with_state(self._network, state), chunk, self._reading)


def fit_swag(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: Likelihood,
    *,
    epochs: int,
    lr: float,
    rank: int = 20,
    collect_every: int | None = None,
    samples: int = 30,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    loss: LossChoice = "auto",
    label_smoothing: float = 0.0,
    seed: int = 0,
    accelerator: str = "auto",
    reading: Reading = PLAIN,
    progress: bool | None = None,
) -> SWAG:
    """Train on from a network's weights by SGD at a constant learning rate, and take a Gaussian through the iterates.

    As in the authors' implementation the weights that it starts from are not an iterate.

    Args:
        model: The trained network; it is not changed, for a copy is trained.
        loader: Training batches, anew at each pass, as for ``stfbnn.train``.
        likelihood: What the outputs mean at prediction; for a regression with the noise set.
        epochs: Passes over the loader.
        lr: The constant learning rate: so large that the iterates spread.
        rank: K, the largest number of deviations that are kept: the rank of the covariance's second part.
        collect_every: Steps of the optimizer between two iterates that are taken; None takes one an epoch.
        samples: Draws to average at prediction.
        momentum: Of SGD.
        weight_decay: The L2 penalty's factor; that of stage one, if the two are to have one optimum.
        loss: As for ``stfbnn.train``.
        label_smoothing: Likewise.
        seed: Of batches, dropout and draws.
        accelerator: As for ``stfbnn.train``.
        reading: How batches and what the network returns are read.
        progress: Show bars; None shows them on a terminal.

    Returns:
        The predictor, on the model's device.

    Raises:
        InputError: A setting or the first batch is wrong, fewer than two iterates would be taken, or the training diverged.
    """
    require_network(model)
    require_likelihood(likelihood)
    for value, what, least in ((epochs, "epochs", 1), (rank, "rank", 2), (samples, "samples", 1)):
        require_count(value, what, least)
    derive_seed(seed)
    every = _steps_between(loader, epochs, collect_every)
    try:
        network = copy.deepcopy(model)
    except Exception as error:
        raise InputError(f"the model cannot be copied: {error}") from error
    moments = Moments(rank)

    def sgd(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = build_optimizer("sgd", parameters, lr, weight_decay, momentum)
        optimizer.register_step_post_hook(_collector(parameters, every, moments))
        return optimizer

    train(
        network,
        loader,
        epochs=epochs,
        optimizer=sgd,
        schedule="constant",
        loss=_fitting(Objective(loss, label_smoothing), likelihood),
        seed=seed,
        accelerator=accelerator,
        output=reading.output,
        target_key=reading.target_key,
        weight_key=reading.weight_key,
        progress=progress,
    )
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    dtype = reduce(torch.promote_types, [parameter.dtype for parameter in trainable], torch.float32)
    posterior = moments.posterior(trainable[0].device, dtype)
    swag = SWAG(network, posterior, likelihood, samples, seed, reading)
    swag.estimate_statistics(loader, progress)
    return swag


def _steps_between(loader: Any, epochs: int, collect_every: int | None) -> int:
    """Steps between two iterates; refuses a run that is known to take fewer than two of them."""
    try:
        steps = len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        # A DataLoader has the method even where its data set has no length.
        steps = None
    if collect_every is not None:
        every = require_count(collect_every, "collect_every")
    elif steps is None:
        raise InputError("the loader has no length, so say after how many steps an iterate is taken: collect_every=")
    else:
        every = max(steps, 1)
    if steps and epochs * steps // every < 2:
        raise InputError(
            f"a Gaussian needs at least two iterates, but {epochs} epochs of {steps} steps with one iterate every {every} "
            f"steps give {epochs * steps // every}; train longer or lower collect_every"
        )
    return every


def _collector(parameters: list[nn.Parameter], every: int, moments: Moments) -> Callable[..., None]:
    """What the optimizer calls after every step."""
    steps = 0

    def collect(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            moments.add(nn.utils.parameters_to_vector(parameters))

    return collect


def _fitting(objective: Objective, likelihood: Likelihood) -> Callable[..., Tensor]:
    """The loss, which at its first call, before training, also refuses what the likelihood could not predict in the end."""
    looked = False

    def loss(outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        nonlocal looked
        if not looked:
            objective.check(outputs, target, weight)
            likelihood.check(outputs, target)
            looked = True
        return objective(outputs, target, weight)

    return loss


def _statistics_of(network: nn.Module) -> dict[str, Tensor]:
    """The buffers of all batch norms, under the network's names; none where they use every batch's own statistics."""
    norms = ((name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm))
    return {name: value for prefix, norm in norms for name, value in norm.named_buffers(prefix, recurse=False)}


def _with_state(network: nn.Module, state: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The network as it would be with other weights and buffers, called like a module."""
    return lambda *args, **kwargs: functional_call(network, dict(state), args, kwargs)


class _Called(nn.Module):
    """A network that takes all its inputs as one argument."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Inputs) -> Any:
        return call_model(self.network, inputs)
