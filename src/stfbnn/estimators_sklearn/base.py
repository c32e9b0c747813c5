"""What classifier and regressor share: the two stages of training on the rows of a table, and predictions from them."""

from __future__ import annotations

import copy
import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import Bunch, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stfbnn.batches import module_device, output_tensor
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.estimators_sklearn.networks import (
    NetworkChoice,
    floating_dtype,
    hidden_sizes,
    make_network,
    require_outputs,
)
from stfbnn.estimators_sklearn.rows import Array, RowBatches, Scale, Table, hold_out_rows
from stfbnn.inference.checks import require_count
from stfbnn.inference.engines import resolve_engine
from stfbnn.inference.fit import fit
from stfbnn.inference.options import TEMPERATURES, temperature_schedule
from stfbnn.likelihood import resolve_likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import PosteriorFamily, components_of, resolve_family
from stfbnn.prediction import predict
from stfbnn.prior import PriorLike, resolve_prior
from stfbnn.provenance import attached
from stfbnn.randomness import seeded
from stfbnn.training import TrainRun, train

# What float arrays keep of themselves; all others become float64.
FLOATS = (np.float64, np.float32)
# Rows on which the first layer is looked for.
_EXAMPLES = 8
# Settings of the two calls that follow from the estimator's own parameters.
_OWN_OF_TRAIN = frozenset(
    [
        "epochs",
        "lr",
        "weight_decay",
        "seed",
        "val_loader",
        "accelerator",
        "devices",
        "strategy",
        "num_nodes",
        "output",
        "target_key",
        "weight_key",
        "progress",
    ]
)
_OWN_OF_FIT = frozenset(
    ["epochs", "engine", "seed", "val_loader", "num_examples", "temperature", "target_key", "weight_key", "progress"]
)


class StfEstimator(BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """Base of the two estimators; see `StfClassifier` and `StfRegressor`."""

    def __init__(
        self,
        module: NetworkChoice = None,
        *,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        train_module: bool = True,
        standardize: bool | Literal["auto"] = "auto",
        epochs: int = 50,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        batch_size: int | Literal["auto"] = "auto",
        layer: str | None = None,
        posterior: str | PosteriorFamily = "mean-field",
        prior: PriorLike | None = None,
        engine: str = "auto",
        inference_epochs: int = 20,
        temperature: float | Literal["held-out"] | None = None,
        validation_fraction: float = 0.2,
        samples: int = 32,
        device: str | torch.device | None = None,
        train_options: Mapping[str, Any] | None = None,
        fit_options: Mapping[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.module = module
        self.hidden_layer_sizes = hidden_layer_sizes
        self.train_module = train_module
        self.standardize = standardize
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.layer = layer
        self.posterior = posterior
        self.prior = prior
        self.engine = engine
        self.inference_epochs = inference_epochs
        self.temperature = temperature
        self.validation_fraction = validation_fraction
        self.samples = samples
        self.device = device
        self.train_options = train_options
        self.fit_options = fit_options
        self.random_state = random_state
        self.verbose = verbose

    @abstractmethod
    def predict_uncertainty(self, X: Any) -> Bunch:
        """The total uncertainty of every prediction, and its aleatoric and epistemic parts."""

    def _forget(self) -> None:
        """Before a new fit: one that fails must not leave the network of an older one beside its own scales and classes."""
        self.__dict__.pop("network_", None)

    def _validation_table(self, X_val: Any, y_val: Any, weights: Any, targets: Callable[[Any], Array]) -> Table | None:
        """The held-out rows that the user brought along, checked like X and y."""
        if (X_val is None) != (y_val is None) or (X_val is None and weights is not None):
            raise InputError(
                "X_val and y_val belong together, and sample_weight_val to them; give both or none of them"
            )
        if X_val is None:
            return None
        X, y = validate_data(self, X_val, y_val, reset=False, dtype=FLOATS, multi_output=True)
        return Table.of(X, targets(y), weights, "sample_weight_val")

    def _fit_table(self, table: Table, held_out: Table | None, outputs: int, what: str, likelihood: str) -> None:
        """Both stages, from the checks of the parameters to the fitted attributes.

        Args:
            table: All rows to learn from, and to hold out from.
            held_out: The user's own held-out rows; then none are held out from ``table``.
            outputs: The size of the network's outputs.
            what: What the targets are, for messages.
            likelihood: By name.
        """
        train_options, fit_options = self._checked_options()
        fit_options = {"likelihood": likelihood} | fit_options
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        network = self._network(table, outputs, seed)
        if held_out is None and self._chooses(fit_options):
            classes = table.y if likelihood == "categorical" else None
            rest, held = hold_out_rows(table.X, classes, self.validation_fraction, seed)
            table, held_out = table.take(rest), table.take(held)
            if not self.train_module and attached(network) is None:
                warnings.warn(
                    "nothing says what the trained network was trained on: if it has seen rows of X, those held out to "
                    "choose the temperature are not unseen, and it comes out too low; pass X_val= and y_val=, or declare "
                    "the training data with stfbnn.provenance.attach",
                    stacklevel=3,
                )
        standardize = self.train_module if self.standardize == "auto" else bool(self.standardize)
        for name, values in (("_input_scale", table.X), ("_target_scale", table.y)):
            scaled = standardize and values.dtype != np.int64
            setattr(self, name, Scale.of(values, table.weights) if scaled else Scale.none(values))
        batches = self._batches(table, network, shuffle=True)
        example, targets = (tensor[:_EXAMPLES].to(module_device(network)) for tensor in batches.dataset.tensors[:2])

        # Stage one can take long; what stage two would refuse is found on a copy that is not trained yet.
        rehearsal = self._bayesianize(copy.deepcopy(network) if self.train_module else network, example)
        with torch.no_grad():
            found = output_tensor(rehearsal(example.to(rehearsal.device), weights="mean"))
        require_outputs(found, outputs, what)
        resolve_likelihood(fit_options["likelihood"], targets).check(found, targets.to(found.device))
        resolve_engine(self.engine, components_of(rehearsal.posterior)[0])
        self.training_run_ = self._train(network, batches, seed, train_options) if self.train_module else None
        bnn = self._bayesianize(network, example) if self.train_module else rehearsal
        self.run_ = fit(
            bnn,
            batches,
            epochs=self.inference_epochs,
            engine=self.engine,
            val_loader=None if held_out is None else self._batches(held_out, network, shuffle=False),
            temperature=self.temperature,
            seed=seed,
            progress=bool(self.verbose),
            **fit_options,
        )
        self.module_, self.network_, self._seed = network, bnn, seed

    def _prediction(self, X: Any) -> Any:
        """The library's prediction for rows of X: of classes, or of numbers in standard units."""
        check_is_fitted(self, "network_")
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        require_count(samples=self.samples)
        bnn: BayesianNetwork = self.network_
        inputs = torch.from_numpy(self._input_scale.apply(X)).to(floating_dtype(bnn.network))
        return predict(bnn, inputs, samples=self.samples, seed=self._seed, progress=bool(self.verbose))

    def _checked_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Check the parameters that no later step would check before the first stage, or not by their names here."""
        require_count(epochs=self.epochs, inference_epochs=self.inference_epochs, samples=self.samples)
        if self.batch_size != "auto":
            require_count(batch_size=self.batch_size)
        hidden_sizes(self.hidden_layer_sizes)
        fraction = self.validation_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise InputError(f"validation_fraction must lie between 0 and 1, but it is {fraction!r}")
        if self.standardize not in (True, False, "auto"):
            raise InputError(f'standardize must be True, False or "auto", but it is {self.standardize!r}')
        train_options = _further("train_options", self.train_options, train, _OWN_OF_TRAIN)
        fit_options = _further("fit_options", self.fit_options, fit, _OWN_OF_FIT)
        temperature_schedule(self.temperature, fit_options.get("temperatures", TEMPERATURES), has_held_out=True)
        resolve_family(self.posterior)
        if self.prior is not None:
            resolve_prior(self.prior)
        return train_options, fit_options

    def _chooses(self, fit_options: Mapping[str, Any]) -> bool:
        """Whether anything is to be chosen on held-out data."""
        return (
            self.temperature in (None, "held-out")
            or fit_options.get("predictive_temperature") == "held-out"
            or fit_options.get("early_stop") is not None
        )

    def _network(self, table: Table, outputs: int, seed: int) -> nn.Module:
        with seeded(seed, "network"):
            network = make_network(
                self.module, table.X.shape[1], hidden_sizes(self.hidden_layer_sizes), outputs, not self.train_module
            )
        if self.module is None and table.X.dtype == np.float64 and self._device(network).type == "cpu":
            # In the precision of X, as scikit-learn's own networks: then predictions do not depend on their batch.
            network = network.double()
        return network.to(self._device(network)) if self.train_module else network

    def _device(self, network: nn.Module) -> torch.device:
        """Where to compute; by default where the network is."""
        if self.device is None:
            return module_device(network)
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"device={self.device!r} cannot be used here: {error}") from error
        return device

    def _batches(self, table: Table, network: nn.Module, shuffle: bool) -> RowBatches:
        dtype = floating_dtype(network)
        tensors = [torch.from_numpy(self._input_scale.apply(table.X)).to(dtype)]
        if table.y.dtype == np.int64:
            tensors.append(torch.from_numpy(table.y))
        else:
            tensors.append(torch.from_numpy(self._target_scale.apply(table.y)).to(dtype))
        if table.weights is not None:
            tensors.append(torch.from_numpy(table.weights).to(dtype))
        size = min(max(32, len(table.y) // 64), 512) if self.batch_size == "auto" else self.batch_size
        return RowBatches(TensorDataset(*tensors), size, shuffle)

    def _bayesianize(self, network: nn.Module, example: Tensor) -> BayesianNetwork:
        bnn = bayesianize(network, example, layer=self.layer, posterior=self.posterior, prior=self.prior)
        return bnn.to(self._device(network))

    def _train(self, network: nn.Module, batches: RowBatches, seed: int, options: Mapping[str, Any]) -> TrainRun:
        device = module_device(network)
        settings = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **options}
        return train(
            network,
            batches,
            epochs=self.epochs,
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            seed=seed,
            progress=bool(self.verbose),
            **settings,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the networks as copies on the CPU, so that a machine without an accelerator can read them."""
        state: dict[str, Any] = super().__getstate__()
        if "network_" in state:
            # Copied at once, so that what is one module stays one.
            copied = copy.deepcopy({name: state[name] for name in ("module", "module_", "network_", "training_run_")})
            bnn = copied["network_"].cpu()
            bnn.trained = {name: value.cpu() for name, value in bnn.trained.items()}
            for network in (copied["module"], copied["module_"]):
                if isinstance(network, nn.Module):
                    network.cpu()
            state |= copied
        return state


def _further(
    name: str, options: Mapping[str, Any] | None, call: Callable[..., Any], own: AbstractSet[str]
) -> dict[str, Any]:
    """Further settings of a call, without those that the estimator itself makes."""
    given = dict(options or {})
    known = [
        key
        for key, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in own
    ]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"{name} has {unknown}, but can hold {known} (see stfbnn.{call.__name__}); the other settings are parameters "
            f"of the estimator"
        )
    return given
