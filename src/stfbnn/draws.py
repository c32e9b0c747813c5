"""Running posterior draws through the network: the same draws whatever the batching, in bounded memory.

Draw number s of a seed is one fixed weight vector. A mixture's draws are dealt out to its components, in a fixed order that
keeps each component's number of draws near its weight's share, and every draw carries its share of the sum, so that the
weights of the components add no noise. Inputs are cut into chunks whose size follows from their shape and the
device, so that neither the caller's batch size nor a timing changes an answer. On a CPU the draws of a chunk run one after
another (fastest there: the chunk stays in the cache); on an accelerator they are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from stfbnn.batches import Inputs, batch_size, tensors_of, to_device
from stfbnn.errors import InputError
from stfbnn.likelihood import Likelihood
from stfbnn.network import BayesianNetwork, Weights
from stfbnn.posterior import MixturePosterior, Posterior, components_of
from stfbnn.predictive import Prediction, sums_for
from stfbnn.randomness import generator

Execution = Literal["auto", "loop", "stacked"]

# Input numbers in one chunk, and the fewest and most rows: about 64–256 images on a CPU, whose cache is small.
_CHUNK_NUMBERS = {"cpu": 2**18, "accelerator": 2**20}
_CHUNK_ROWS = {"cpu": (16, 512), "accelerator": (32, 2048)}
# Input numbers that a stack of draws times a chunk may hold.
_STACK_NUMBERS = 2**22
# Weight vectors are kept for all chunks up to this size, and drawn anew for every chunk beyond it.
_KEPT_BYTES = 2**28


def chunk_rows(inputs: Inputs, device: torch.device) -> int:
    """Rows of a chunk: a power of two that follows from the size of one example and from the kind of device."""
    kind = "cpu" if device.type == "cpu" else "accelerator"
    low, high = _CHUNK_ROWS[kind]
    numbers = _numbers_per_row(inputs)
    return int(min(high, max(low, 2 ** math.floor(math.log2(max(1.0, _CHUNK_NUMBERS[kind] / numbers))))))


class Draws:
    """The first ``samples`` weight draws of ``seed``, ready to be run on chunks of inputs.

    Args:
        bnn: The network.
        samples: S, the number of draws. A mixture takes at least one a component, and point masses exactly one.
        seed: Which draws; draw s is the same whatever S is.
        weights: "sample", or "mean" for the posterior mean as the only draw.
        execution: "loop" runs draw after draw, "stacked" several at once by vmap, "auto" takes the faster for the device.

    Attributes:
        count: The number of draws.
        shares: What each draw counts in averages, (count,), summing to 1, in float64; None where all count the same.

    Raises:
        InputError: ``samples`` is not a positive integer, or an option is unknown.
    """

    def __init__(
        self,
        bnn: BayesianNetwork,
        samples: int,
        seed: int,
        weights: Weights = "sample",
        execution: Execution = "auto",
    ) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise InputError(f"samples must be a positive integer, but it is {samples!r}")
        if weights not in ("sample", "mean"):
            raise InputError(f'weights must be "sample" or "mean", but it is {weights!r}')
        if execution not in ("auto", "loop", "stacked"):
            raise InputError(f'execution must be "auto", "loop" or "stacked", but it is {execution!r}')
        self._bnn = bnn
        self._seed = seed
        self._weights = weights
        self._components: list[int] | None = None
        self.shares: Tensor | None = None
        posterior = bnn.posterior
        if weights == "mean":
            self.count = 1
        elif isinstance(posterior, MixturePosterior):
            self._components = deal(posterior, samples)
            self.count = len(self._components)
            dealt = torch.tensor(self._components)
            self.shares = posterior.weights.cpu().double()[dealt] / torch.bincount(dealt)[dealt]
        else:
            self.count = samples if posterior.noise_size else 1
        self._may_loop = execution != "stacked"
        self._stacked = execution == "stacked" or (execution == "auto" and bnn.device.type != "cpu")
        vector = bnn.posterior.mean_vector()
        kept = self.count * vector.numel() * vector.element_size() <= _KEPT_BYTES
        self._kept = [self._draw(index) for index in range(self.count)] if kept else None

    @torch.no_grad()
    def _draw(self, index: int) -> Tensor:
        if self._weights == "mean":
            return self._bnn.posterior.mean_vector().detach()
        posterior: Posterior = self._bnn.posterior
        if self._components is not None:
            posterior = components_of(posterior)[self._components[index]]
        noise = torch.randn(posterior.noise_size, generator=generator(self._seed, "draw", index))
        return posterior.draw(noise.to(posterior.mean_vector()))

    def vector(self, index: int) -> Tensor:
        """Weight vector (d,) of draw ``index``."""
        return self._draw(index) if self._kept is None else self._kept[index]

    @torch.no_grad()
    def outputs(self, inputs: Inputs) -> Iterator[Tensor]:
        """Run every draw on one chunk.

        Args:
            inputs: A chunk of B rows on the network's device.

        Yields:
            Outputs of some of the draws, in order, (draws, B, …).
        """
        start = 0
        if self._stacked:
            try:
                for outputs in self._stacks(inputs):
                    yield outputs
                    start += len(outputs)
                return
            except RuntimeError as error:
                # Recurrent layers, and control flow that depends on data, have no rule for several draws at once.
                if not self._may_loop:
                    raise InputError(f'this network cannot run stacked ({error}); pass execution="loop"') from error
                self._stacked = False
        for index in range(start, self.count):
            yield self._bnn.outputs(self.vector(index), inputs).unsqueeze(0)

    def predict(self, inputs: Inputs, likelihood: Likelihood, temperature: float) -> Prediction:
        """Average every draw's prediction for one chunk.

        Args:
            inputs: A chunk on any device.
            likelihood: What the outputs mean.
            temperature: τ, by which every draw's logits are divided.

        Raises:
            InputError: The outputs do not fit the likelihood, or it is not one that can be averaged.
        """
        sums = sums_for(likelihood, temperature)
        start = 0
        for outputs in self.outputs(to_device(inputs, self._bnn.device)):
            if self.shares is None:
                sums.add(outputs)
            else:
                sums.add(outputs, self.shares[start : start + len(outputs)])
            start += len(outputs)
        return sums.finish(at_mean=self._weights == "mean")

    def _stacks(self, inputs: Inputs) -> Iterator[Tensor]:
        size = max(1, int(_STACK_NUMBERS / (_numbers_per_row(inputs) * batch_size(inputs))))
        start = 0
        while start < self.count:
            stop = min(self.count, start + size)
            vectors = torch.stack([self.vector(index) for index in range(start, stop)])
            try:
                outputs = torch.vmap(self._run_on(inputs))(vectors)
            except torch.cuda.OutOfMemoryError as error:
                if size == 1:
                    raise InputError(
                        f"one draw on a chunk of {batch_size(inputs)} rows does not fit in the accelerator's memory; "
                        f"pass a smaller chunk_size"
                    ) from error
                size = max(1, size // 2)
                continue
            yield outputs
            start = stop

    def _run_on(self, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        return lambda vector: self._bnn.outputs(vector, inputs)


def deal(mixture: MixturePosterior, samples: int) -> list[int]:
    """Which component each of ``samples`` draws comes from.

    First one of each, then always the component that is furthest behind its weight's share; so component s does not depend
    on ``samples``, and π_k S draws are missed by less than one wherever that is one or more. Equal weights are served in turn.

    Returns:
        Numbers of components; K of them where ``samples`` is fewer, or where the components are point masses.
    """
    weights = mixture.weights.tolist()
    size = len(weights) if mixture.is_ensemble else max(samples, len(weights))
    counts = [0] * len(weights)
    dealt = []
    for index in range(size):
        behind = [weight * (index + 1) - count for weight, count in zip(weights, counts, strict=True)]
        # Of equals, the first; the tolerance keeps rounding from deciding.
        most = max(behind) - 1e-9
        chosen = index if index < len(weights) else next(k for k, value in enumerate(behind) if value >= most)
        counts[chosen] += 1
        dealt.append(chosen)
    return dealt


def _numbers_per_row(inputs: Inputs) -> float:
    return max(1.0, sum(tensor.numel() for tensor in tensors_of(inputs)) / batch_size(inputs))
