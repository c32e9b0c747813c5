"""Laplace approximations of the last layer or of all weights, by laplace-torch (Daxberger et al., 2021).

The members are linearised networks: f(x; θ*) + J(x)(θ − θ*) at draws θ of the Gaussian N(θ*, (H + δ)⁻¹), H the generalised
Gauss–Newton matrix. Their outputs have exactly the distribution of that library's "GLM" predictive, the one that suits this
approximation, and a member is one function for all inputs, so that nothing depends on how the data are batched.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import jvp

from stfbnn.baselines.first_batch import first_batch
from stfbnn.baselines.linearised import Linearised, Structure, Subset, TrainingData
from stfbnn.baselines.predictor import PLAIN, Reading, collect_outputs, input_chunks, require_count
from stfbnn.batches import Batch, Inputs, module_device
from stfbnn.errors import InputError
from stfbnn.inference.loaders import kept_generators
from stfbnn.likelihood import Categorical, Gaussian, Likelihood, LikelihoodLike, resolve_likelihood
from stfbnn.predictive import MemberOutputs
from stfbnn.randomness import derive_seed, seeded
from stfbnn.trunk import ChangeGuard
from stfbnn.wrappers import unwrap

PACKAGES = (
    "laplace-torch",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "asdfghjkl",
    "einops",
    "unfoldNd",
    "einconv",
    "linear_operator",
)
"""What laplace-torch imports beyond what this library needs anyway."""

# Where the prior's precision is searched, as natural logarithms, and how far from the residuals' size the noise.
_LOG_PRECISIONS, _LOG_NOISE = (math.log(1e-6), math.log(1e8)), 7.0


def fit_laplace(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    subset: Subset = "last-layer",
    structure: Structure = "kron",
    likelihood: LikelihoodLike = "auto",
    prior_precision: float | Literal["marglik"] = "marglik",
    samples: int = 32,
    seed: int = 0,
    reading: Reading = PLAIN,
) -> LaplacePredictor:
    """Put a Gaussian around a network's trained weights, by one pass over the training data; the network is left as it is.

    Args:
        model: The trained network.
        train_loader: Batches with targets, without weights of examples.
        subset: Which weights are random: those of the last layer (see `last_layer_name`), or all. Of all, "kron" takes those of
            dense and two-dimensional convolutional layers, since no other kind has Kronecker factors; the rest stays fixed.
        structure: Of H: Kronecker factors for each layer, its diagonal, or the whole matrix. The last two take derivatives of
            every output for every example: of all weights that is slow but for small networks.
        likelihood: Classes, one for an example ("categorical"), or numbers with one noise for all ("gaussian"); "auto" by the
            targets.
        prior_precision: 1/s² of the prior N(0, s²), or "marglik" for the one of highest marginal likelihood.
        samples: Members.
        seed: Which draws.
        reading: How batches, and what the network returns, are read.

    Returns:
        The predictor. A Gaussian's noise that was not given is the residuals' root mean square on the training data; with
        "marglik" it is chosen together with the prior's precision.

    Raises:
        InputError: laplace-torch is not installed, or an argument or a batch is not usable.
        LayerError: The network has no layer of the kind that is needed.
    """
    _require_options(subset, structure, prior_precision)
    require_count(samples, "samples")
    library = import_laplace()
    plain = unwrap(model)
    first = first_batch(train_loader, seed, reading)
    example = first.rows(0, 2).to(module_device(plain))
    linearised = Linearised(plain, example.inputs, subset, structure, reading)
    kind, outputs = _checked_likelihood(likelihood, linearised, example)
    regression = isinstance(kind, Gaussian)
    with seeded(seed, "laplace"), kept_generators(train_loader):
        data = TrainingData(linearised, train_loader, kind, outputs, structure, reading)
        approximation = library.Laplace(
            linearised,
            "regression" if regression else "classification",
            subset_of_weights="all",
            hessian_structure=structure,
        )
        try:
            approximation.fit(data)
        except NotImplementedError as error:
            raise InputError(f"laplace-torch cannot do structure={structure!r} for this network: {error}") from error
    if isinstance(kind, Gaussian):
        # The loss is ½ Σ (y − f)².
        residual = math.sqrt(2 * float(approximation.loss) / data.numbers)
        approximation.sigma_noise = max(residual, 1e-12) if kind.learned else float(kind.noise_std)
    if prior_precision == "marglik":
        _maximise_evidence(approximation, isinstance(kind, Gaussian) and kind.learned)
    else:
        approximation.prior_precision = float(prior_precision)
    if regression:
        kind = Gaussian(float(approximation.sigma_noise), learned=False)
    return LaplacePredictor(plain, approximation, kind, samples, seed, reading)


class LaplacePredictor:
    """Draws of a Laplace approximation as members, each the network linearised in its weights.

    Made by `fit_laplace`.

    Attributes:
        likelihood: What the outputs mean.
        prior_precision: 1/s² of the prior.
        trainable_parameters: Weights that have a posterior; they are not trained, but their curvature is found.
    """

    def __init__(
        self, model: nn.Module, approximation: Any, likelihood: Likelihood, samples: int, seed: int, reading: Reading
    ) -> None:
        self.likelihood = likelihood
        self.prior_precision = float(approximation.prior_precision[0])
        self.trainable_parameters = int(approximation.n_params)
        self._approximation, self._samples, self._seed, self._reading = approximation, samples, seed, reading
        self._model, self._guard = model, ChangeGuard(model)

    @property
    def artifact_bytes(self) -> int:
        """Of the curvature: Kronecker factors, diagonal or matrix."""
        curvature = self._approximation.H
        layers = [[curvature]] if isinstance(curvature, Tensor) else self._approximation.H_facs.kfacs
        return sum(factor.numel() * factor.element_size() for layer in layers for factor in layer)

    def with_prior_precision(self, prior_precision: float) -> LaplacePredictor:
        """The same curvature and noise under another prior, without a pass over the data.

        Raises:
            InputError: It is not positive and finite.
        """
        _require_options("all", "diag", prior_precision)
        other = copy.copy(self._approximation)
        other.prior_precision = float(prior_precision)
        return LaplacePredictor(self._model, other, self.likelihood, self._samples, self._seed, self._reading)

    def outputs(self, data: Any) -> MemberOutputs:
        """The raw outputs of all members, (S, N, …).

        Args:
            data: As for ``stfbnn.predict``.

        Raises:
            ModelChangedError: The user's model was changed since `fit_laplace`.
            InputError: There are no data, they are not finite or of a wrong form, or an operation of the network has no
                forward-mode derivative.
        """
        self._guard.check()
        linearised: Linearised = self._approximation.model
        device = module_device(linearised)
        random = torch.Generator(device).manual_seed(derive_seed(self._seed, "laplace", "draws"))
        with torch.no_grad():
            deviations = self._approximation.sample(self._samples, random) - self._approximation.mean

        def run(_index: int, chunk: Inputs) -> Iterator[Tensor]:
            prepared = linearised.prepared(chunk)
            for deviation in deviations:
                yield linearised.at(deviation, prepared)

        return MemberOutputs(collect_outputs(run, input_chunks(data, device, self._reading)), self.likelihood)


def import_laplace() -> Any:
    """The package laplace-torch.

    Raises:
        InputError: It, or something that it imports, is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Said of one of the packages, and of PyTorch's own derivatives when they are first taken forwards.
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is ", category=DeprecationWarning)
            library = importlib.import_module("laplace")
            jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
            return library
    except ImportError as error:
        raise InputError(
            f"Laplace approximations need laplace-torch ({error}). Install it without its dependencies, for one of them "
            f"is torchvision, which it does not use and which must match torch exactly: pip install --no-deps "
            f"{' '.join(PACKAGES)}"
        ) from error


def _maximise_evidence(approximation: Any, learn_noise: bool) -> None:
    """Set the prior's precision, and the noise if it is learned, to where the Laplace estimate of the evidence is highest."""
    start = [0.0]
    bounds = [_LOG_PRECISIONS]
    if learn_noise:
        center = math.log(float(approximation.sigma_noise))
        start.append(center)
        bounds.append((center - _LOG_NOISE, center + _LOG_NOISE))
    like = approximation.mean

    def loss(point: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        logs = torch.as_tensor(point).to(like).requires_grad_()
        with torch.enable_grad():
            scales = logs.exp()
            evidence = approximation.log_marginal_likelihood(scales[:1], scales[1] if learn_noise else None)
            (slope,) = torch.autograd.grad(evidence, logs)
        value = -float(evidence.detach())
        if not math.isfinite(value):
            return 1e30, np.zeros_like(point)
        return value, -slope.double().cpu().numpy()

    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    approximation.prior_precision = math.exp(found.x[0])
    if learn_noise:
        approximation.sigma_noise = math.exp(found.x[1])


def _checked_likelihood(likelihood: LikelihoodLike, network: Linearised, example: Batch) -> tuple[Likelihood, Tensor]:
    """The likelihood, if laplace-torch has it, and the example's outputs (B, K), if they fit it."""
    kind = resolve_likelihood(likelihood, example.target)
    with torch.no_grad():
        outputs = network(network.prepared(example.inputs))
    plain = type(kind) in (Categorical, Gaussian)
    if isinstance(kind, Categorical):
        plain = (kind.outputs, kind.class_weights, kind.ignore_index) == ("logits", None, None)
    if isinstance(kind, Gaussian):
        plain = kind.noise_std.numel() == 1
    if not plain or outputs.ndim != 2:
        raise InputError(
            f"laplace-torch knows classes, one for an example, by plain logits (N, K), and numbers with one Gaussian noise for "
            f"all; here are outputs {tuple(outputs.shape)} and a {kind.name} likelihood, {kind.config()}"
        )
    kind.check(outputs.squeeze(-1) if network.squeezed else outputs, example.target)
    return kind, outputs


def _require_options(subset: object, structure: object, prior_precision: object) -> None:
    if subset not in ("last-layer", "all"):
        raise InputError(f'subset must be "last-layer" or "all", but it is {subset!r}')
    if structure not in ("kron", "diag", "full"):
        raise InputError(f'structure must be "kron", "diag" or "full", but it is {structure!r}')
    number = isinstance(prior_precision, int | float) and not isinstance(prior_precision, bool)
    if prior_precision != "marglik" and not (number and 0 < float(str(prior_precision)) < math.inf):
        raise InputError(f'prior_precision must be positive and finite, or "marglik", but it is {prior_precision!r}')
