"""Certified radii: within which change of an input the vote of posterior draws cannot change, where a theorem says so.

The theorem, its proof and what it does not cover are in `stfbnn.robustness.smoothing_theorem`. Here: whether it covers a
network, and the estimate of a label's probability from draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from stfbnn.baselines.posterior_predictor import BayesianPredictor
from stfbnn.baselines.predictor import require_count
from stfbnn.decision.bounds import upper_limit
from stfbnn.draws import chunk_rows
from stfbnn.errors import InputError
from stfbnn.evaluation.checks import as_labels
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanFieldPosterior
from stfbnn.progress import progress_bar
from stfbnn.randomness import generator, seeded
from stfbnn.robustness.result import Accuracy
from stfbnn.robustness.smoothing_theorem import DenseNoise, Floats
from stfbnn.threat import InputSpace
from stfbnn.trunk import require_apart
from stfbnn.trunk.verification import difference

EPSILONS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Radii at which results are shown."""

# Rows on which it is checked that the theorem covers a network.
_CHECKED = 4


@dataclass(frozen=True, eq=False)
class CertifiedRadii:
    """Within which change of each input the plurality vote of fresh posterior draws keeps its label.

    Attributes:
        radius: (N,), l2, in the units of the input space, in float64: no δ with ‖δ‖₂ < radius changes the label; 0 where it
            abstained.
        label: The certified labels, (N,).
        abstained: Where no label could be certified at all, (N,).
        lower: Lower confidence limits of the label's probability under a fresh draw, (N,).
        targets: True labels, (N,), where they were given.
        alpha: Each certificate is wrong with at most this probability, over the draws that it was made with.
        select: Draws that chose each label.
        draws: Draws that certified it.
        seconds: Wall time.
    """

    radius: Tensor
    label: Tensor
    abstained: Tensor
    lower: Tensor
    targets: Tensor | None
    alpha: float
    select: int
    draws: int
    seconds: float = field(default=0.0)

    def certified(self, epsilon: float) -> Tensor:
        """Where no change of length ``epsilon`` changes the label, and the label is right if targets were given; (N,)."""
        kept = ~self.abstained & ((self.radius > epsilon) | (epsilon == 0))
        return kept if self.targets is None else kept & (self.label == self.targets)

    def share(self, epsilon: float) -> Accuracy:
        """The share of such examples: certified accuracy if targets were given."""
        return Accuracy.of(int(self.certified(epsilon).sum()), len(self.radius))

    def table(self, epsilons: Sequence[float] = EPSILONS) -> Table:
        """The share at several radii, for a terminal."""
        table = Table(title=self._what.capitalize(), title_justify="left")
        table.add_column("l2 radius", justify="right")
        table.add_column("share [95 % interval]", justify="right")
        for epsilon in epsilons:
            table.add_row(f"{epsilon:g}", str(self.share(epsilon)))
        return table

    def as_dict(self, epsilons: Sequence[float] = EPSILONS) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        return {
            "radius": self.radius.tolist(),
            "label": self.label.tolist(),
            "abstained": self.abstained.tolist(),
            "lower": self.lower.tolist(),
            "targets": None if self.targets is None else self.targets.tolist(),
            "alpha": self.alpha,
            "select": self.select,
            "draws": self.draws,
            "seconds": self.seconds,
            "shares": [{"epsilon": epsilon, **vars(self.share(epsilon))} for epsilon in epsilons],
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """What was certified, in words, and for which predictor."""
        known = self.radius[~self.abstained]
        said = f"Of {len(self.radius)} examples {int(self.abstained.sum())} got no certificate"
        if len(known):
            said += f"; of the others the median l2 radius is {float(known.median()):.3g}, the largest {float(known.max()):.3g}"
        return (
            f"{said}. It holds for the plurality vote of fresh posterior draws, each certificate with confidence "
            f"{1 - self.alpha:g}; not for the average of some fixed draws."
        )

    @property
    def _what(self) -> str:
        return "examples with a certificate" if self.targets is None else "certified accuracy"


def certified_radius(
    predictor: BayesianNetwork | BayesianPredictor,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    space: InputSpace | None = None,
    select: int = 100,
    draws: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    progress: bool | None = None,
) -> CertifiedRadii:
    """Certify the label that most posterior draws give, by the theorem of this module.

    The scheme is that of Cohen et al. (2019): ``select`` draws choose the label, others give Clopper and Pearson's lower limit
    of its probability, and where that is not above ½ it abstains. Draws are independent, and are made at the layer's output,
    where they have the same law as draws of weights.

    Args:
        predictor: A Bayesian network after `fit`, plain or as a predictor.
        inputs: (N, …) in the input space, in the network's dtype.
        targets: True labels, (N,), for certified accuracy.
        space: Where inputs live; None for numbers in [0, 1] that the network takes as they are.
        select: Draws that choose the label.
        draws: Draws that certify it; they bound the largest radius.
        alpha: The probability that a certificate is wrong, each, in (0, 1).
        seed: Of the draws.
        progress: Show a progress bar; None shows it on a terminal.

    Raises:
        InputError: An argument does not fit, or no theorem covers the network; the message says why.
        NotFittedError: The posterior has not been inferred.
        ModelChangedError: The user's model was changed.
    """
    began = time.perf_counter()
    require_count(select, "select")
    require_count(draws, "draws")
    if not isinstance(alpha, float) or not 0 < alpha < 1:
        raise InputError(f"alpha must be a probability in (0, 1), but it is {alpha!r}")
    where = InputSpace() if space is None else space
    where.check(inputs)
    certifier = _Certifier(_coverable(predictor), where, inputs.detach())
    labels = None if targets is None else as_labels(targets, len(inputs), certifier.classes)
    limit = (where.upper - where.lower) * math.sqrt(inputs[0].numel())
    chosen, radii, lower = [], [], []
    with progress_bar("certifying", len(inputs), progress) as bar:
        for index in range(len(inputs)):
            votes = certifier.votes(index, select, seed, "select")
            label = int(votes.argmax())
            right = int(certifier.votes(index, draws, seed, "certify")[label])
            wrong = upper_limit(draws - right, draws, alpha, whole=True)
            chosen.append(label)
            lower.append(1 - wrong)
            radii.append(certifier.noise.radius(certifier.points[index], wrong, limit))
            bar.advance()
    probability = torch.tensor(lower, dtype=torch.float64)
    return CertifiedRadii(
        radius=torch.tensor(radii, dtype=torch.float64),
        label=torch.tensor(chosen),
        abstained=probability <= 0.5,
        lower=probability,
        targets=labels,
        alpha=alpha,
        select=select,
        draws=draws,
        seconds=time.perf_counter() - began,
    )


class _Certifier:
    """A network that the theorem covers: the law of its first layer's outputs, and votes drawn from it.

    Args:
        bnn: The network, of the right kind.
        space: Where inputs live.
        inputs: (N, …) in the input space.

    Attributes:
        noise: The law, for inputs y = x − mean in the units of the input space.
        points: y of every example, (N, d).
        classes: K.

    Raises:
        InputError: The theorem does not cover it.
    """

    def __init__(self, bnn: BayesianNetwork, space: InputSpace, inputs: Tensor) -> None:
        self._bnn, self._given = bnn, space.to_network(inputs.to(bnn.device))
        with torch.no_grad():
            mean, std = bnn.posterior.mean_vector().detach(), bnn.posterior.std_vector().detach()
            self._weight, self._bias = _double(*self._parameters(mean))
            self._weight_std, self._bias_std = (part.abs() for part in _double(*self._parameters(std, deviation=True)))
        self.classes = self._check(space, inputs)
        ones = torch.ones_like(self._given[:1], dtype=torch.float64)
        # 1 / std of every entry of the layer's input.
        scale = (space.to_network(ones) - space.to_network(torch.zeros_like(ones))).flatten()
        self.noise = DenseNoise(
            (self._weight * scale).cpu().numpy(),
            (self._weight_std * scale).cpu().numpy(),
            self._bias_std.cpu().numpy(),
        )
        self.points: Floats = (self._given.flatten(1).double() / scale).cpu().numpy()

    @torch.no_grad()
    def votes(self, index: int, count: int, seed: int, purpose: str) -> Tensor:
        """How many of ``count`` independent draws give each label to an example, (K,)."""
        example, random = self._given[index : index + 1], generator(seed, purpose, index)
        point = example.flatten(1).double()
        mean = point @ self._weight.T + self._bias
        std = (point.square() @ self._weight_std.square().T + self._bias_std.square()).sqrt()
        found, left = torch.zeros(self.classes, dtype=torch.int64), count
        while left:
            size = min(left, chunk_rows(example, self._bnn.device))
            noise = torch.randn((size, std.shape[1]), generator=random).to(std)
            outputs = self._after((mean + std * noise).to(example.dtype), example.expand(size, *example.shape[1:]))
            found += torch.bincount(outputs.argmax(dim=1).cpu(), minlength=self.classes)
            left -= size
        return found

    def _after(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """The network's outputs, (B, K), with ``hidden`` (B, H) in place of what its first layer gives."""
        with self._bnn.layer_forward(lambda _: hidden):
            return self._bnn.run(self._bnn.network, inputs)

    def _parameters(self, vector: Tensor, deviation: bool = False) -> tuple[Tensor, Tensor]:
        """The layer's weight (H, d) and bias (H,), which is 0 where there is none, for a vector of weights."""
        bnn, layer = self._bnn, self._bnn.network.get_submodule(self._bnn.layer_name)
        prefix = f"{bnn.layer_name}." if bnn.layer_name else ""
        found = {name.removeprefix(prefix): value for name, value in bnn.substitution(vector, deviation).items()}
        if not {"weight"} <= found.keys() <= {"weight", "bias"}:
            raise _uncovered(f"{bnn.layer_name!r} has the random parameters {', '.join(sorted(found))}")
        bias = found.get("bias", None if deviation else layer.bias)
        if bias is None:
            bias = torch.zeros_like(found["weight"][:, 0])
        assert isinstance(bias, Tensor)  # noqa: S101 - said for the type checker
        return found["weight"], bias

    def _check(self, space: InputSpace, inputs: Tensor) -> int:
        """Run what the theorem takes for granted, on a few inputs and on as many random ones; gives K."""
        bnn, random = self._bnn, generator(0, "certificate")
        rows = inputs[:_CHECKED].to(bnn.device)
        uniform = torch.rand((_CHECKED, *rows.shape[1:]), generator=random).to(rows)
        probes = space.to_network(torch.cat([rows, space.lower + (space.upper - space.lower) * uniform]))
        with torch.no_grad(), seeded(0, "certificate"):
            vector = bnn.posterior.draw(bnn.draw_noise(random))
            expected = bnn.outputs(vector, probes)
        bnn.require_fitted().check_outputs(expected)
        if expected.ndim != 2:
            raise InputError(f"certificates are for one label an example, but outputs are {tuple(expected.shape)}")
        require_apart(lambda given: bnn.outputs(vector, given), probes)
        self._check_layer(vector, probes, expected)
        # One output of the layer for all inputs.
        hidden = nn.functional.linear(probes[:1].flatten(1), *self._parameters(vector)).detach().expand(len(probes), -1)
        with torch.enable_grad(), seeded(0, "certificate"):
            outputs = self._after(hidden, probes.detach().requires_grad_())
        found = outputs.detach()
        error, allowed = difference(found[:1].expand_as(found), found)
        if outputs.requires_grad or not error <= allowed:
            raise _uncovered(f"inputs reach the outputs past {bnn.layer_name!r}, by a way that is not smoothed")
        return expected.shape[1]

    def _check_layer(self, vector: Tensor, probes: Tensor, expected: Tensor) -> None:
        """Refuse a layer that is given something else than the network's input, or does something else than W z + b."""
        bnn, name, seen = self._bnn, self._bnn.layer_name, list[Tensor]()

        def forward(given: Tensor) -> Tensor:
            seen.append(given)
            return nn.functional.linear(given, *self._parameters(vector))

        with torch.no_grad(), seeded(0, "certificate"), bnn.layer_forward(forward):
            found = bnn.run(bnn.network, probes)
        if len(seen) != 1 or seen[0].ndim != 2:
            where = f"{len(seen)} times" if len(seen) != 1 else f"to several positions, {tuple(seen[0].shape)}"
            raise _uncovered(f"{name!r} is applied {where}, so that its outputs are not independent")
        if not torch.equal(seen[0], probes.flatten(1)):
            raise _uncovered(
                f"{name!r} is not given the network's input as it is: layers or a normalisation of the network's own come "
                f"before it (say a normalisation by mean and std in InputSpace)"
            )
        error, allowed = difference(expected, found)
        if not error <= allowed:
            raise _uncovered(f"the parameters of {name!r} act in another way than by one call of the layer")


def _coverable(predictor: Any) -> BayesianNetwork:
    """The network, if it is of a kind that the theorem is about."""
    bnn = predictor.bnn if isinstance(predictor, BayesianPredictor) else predictor
    if not isinstance(bnn, BayesianNetwork):
        raise _uncovered(f"a {type(bnn).__name__} has no posterior over a dense first layer that draws could smooth")
    if not isinstance(bnn.require_fitted(), Categorical):
        raise InputError("certificates are for classifiers, but this network's likelihood is none of classes")
    bnn.check_unchanged()
    layer = bnn.network.get_submodule(bnn.layer_name)
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.conv._ConvNd):
        raise _uncovered(
            f"{bnn.layer_name!r} is a {kind}: its outputs at many positions share few weights, so that their covariance is "
            f"singular and a change of the input moves its support"
        )
    if type(layer) is not nn.Linear:
        raise _uncovered(f"{bnn.layer_name!r} is a {kind}, and not torch.nn.Linear itself")
    if not isinstance(bnn.posterior, MeanFieldPosterior):
        raise _uncovered(f"the posterior is {bnn.posterior.family!r}, and not one Gaussian of independent weights")
    return bnn


def _uncovered(reason: str) -> InputError:
    return InputError(
        f"no certificate can be given, for no theorem covers this network: {reason}. Covered are networks whose first layer is "
        f"torch.nn.Linear on the input itself, under a mean-field posterior; for others measure attacks"
    )


def _double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().double() for tensor in tensors)
