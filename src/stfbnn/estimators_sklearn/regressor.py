"""The regressor in scikit-learn's manner."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils import Bunch
from sklearn.utils.validation import validate_data
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.estimators_sklearn.base import FLOATS, StfEstimator
from stfbnn.estimators_sklearn.rows import Array, Table


class StfRegressor(RegressorMixin, StfEstimator):  # type: ignore[misc] # scikit-learn has no types
    """A network whose first layer is Bayesian, as a regressor that knows the standard deviation of its predictions.

    `fit` trains a network (stage one), makes its first layer Bayesian and infers that layer's posterior and the noise of y
    (stage two); the posterior's temperature is chosen on rows that neither stage has seen.

    Args:
        module: None for a multilayer perceptron with ReLU; a function of (columns of X, columns of y), such as a class, that
            returns an untrained network; or a network itself, of which a copy is trained on. It takes X as rows
            (rows, columns) in its own dtype and gives numbers (rows, columns of y).
        hidden_layer_sizes: Units of each hidden layer of the multilayer perceptron.
        train_module: False keeps ``module`` as it is, bit for bit: it is trained already, and stage one is left out.
        standardize: Shift and scale the columns of X, and y, to mean 0 and standard deviation 1 over the training rows;
            predictions are in the unit of y in any case. "auto" does so for all networks that are trained here, and not for
            one that is trained already.
        epochs: Passes over the rows in stage one.
        learning_rate: Of stage one (AdamW).
        weight_decay: Of stage one.
        batch_size: Rows of a minibatch in both stages; "auto" is a 64th of the rows, but from 32 to 512.
        layer: The name of the layer to make Bayesian, where that is not to be the first.
        posterior: As for `stfbnn.bayesianize`.
        prior: As for `stfbnn.bayesianize`.
        engine: As for `stfbnn.fit`.
        inference_epochs: Passes over the rows in stage two, for each temperature that is tried.
        temperature: T; None or "held-out" chooses it on held-out rows.
        validation_fraction: The share of the rows that is held out from both stages, equal rows together. None are held out
            where nothing is to be chosen, or where `fit` is given ``X_val``.
        samples: Posterior draws of a prediction.
        device: Where to compute; None for the CPU, or where ``module`` is.
        train_options: Further settings of `stfbnn.train`, such as ``{"clip_norm": 1.0}``.
        fit_options: Further settings of `stfbnn.fit`, such as ``{"early_stop": "nll"}``.
        random_state: All random numbers follow from it, those of predictions too; an integer gives the same result at each
            call of `fit`.
        verbose: Show progress bars.

    Attributes:
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X was a data frame with names.
        module_: The trained network, a `torch.nn.Module`.
        network_: The `stfbnn.BayesianNetwork`, for `stfbnn.predict`, `stfbnn.save` and all else.
        run_: The `stfbnn.FitRun` of stage two: its history, the temperatures that were tried, and the one that was chosen.
        training_run_: The `stfbnn.TrainRun` of stage one; None where it was left out.
    """

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> StfRegressor:
        """Train the network and infer its first layer's posterior.

        Args:
            X: Inputs, (rows, columns).
            y: Numbers, (rows,), or (rows, columns of y).
            sample_weight: What each row counts in both stages, (rows,): a weight of 2 is as good as the row twice, so that
                weights of another sum also weigh the data otherwise against the prior. None counts every row once.
            X_val: Held-out inputs on which the temperature is chosen; no stage may have seen them, nor may ``module`` have.
            y_val: Their numbers.
            sample_weight_val: What each of these rows counts.

        Returns:
            The estimator itself.

        Raises:
            InputError: A parameter, or the data, cannot be used; it is a ValueError.
            ValueError: X or y have a wrong form or are not finite.
            LayerError: The network has no layer that can be made Bayesian; it is a ValueError.
        """
        self._forget()
        X, y = validate_data(self, X, y, dtype=FLOATS, ensure_min_samples=2, multi_output=True, y_numeric=True)
        table = Table.of(X, np.asarray(y, dtype=np.float64), sample_weight)
        self._target_shape = table.y.shape[1:]
        held_out = self._validation_table(X_val, y_val, sample_weight_val, self._numbers)
        columns = self._target_shape[0] if self._target_shape else 1
        self._fit_table(table, held_out, columns, f"{columns} column{'s' * (columns > 1)}", "gaussian")
        return self

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """The mean of y for each row, in its unit, and its standard deviation on request.

        Args:
            X: Inputs, (rows, columns).
            return_std: Also give the standard deviation of y: of its noise and of what is not known of the weights together.

        Returns:
            The means, in the shape of y; with ``return_std`` a pair of them and of the standard deviations.
        """
        prediction = self._prediction(X)
        mean = self._shaped(prediction.mean) * self._target_scale.std + self._target_scale.mean
        return (mean, self._shaped(prediction.std) * self._target_scale.std) if return_std else mean

    def predict_uncertainty(self, X: Any) -> Bunch:
        """How uncertain each prediction is: variances of y, in its unit squared.

        Args:
            X: Inputs, (rows, columns).

        Returns:
            ``total``, the square of the standard deviation that `predict` gives; ``aleatoric``, the variance of the noise;
            ``epistemic``, the variance of the draws' means. The first is the sum of the others. Each is in the shape of y.
        """
        prediction, unit = self._prediction(X), np.square(self._target_scale.std)
        aleatoric = self._shaped(prediction.aleatoric) * unit
        epistemic = self._shaped(prediction.epistemic) * unit
        return Bunch(total=aleatoric + epistemic, aleatoric=aleatoric, epistemic=epistemic)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _numbers(self, y: Any) -> Array:
        numbers = np.asarray(y, dtype=np.float64)
        if numbers.shape[1:] != self._target_shape:
            raise InputError(f"y_val must have the columns of y, {self._target_shape}, but it has {numbers.shape[1:]}")
        return numbers

    def _shaped(self, values: Tensor) -> Array:
        """Numbers of each row in the shape of y; a network may give (rows, 1) or (rows,) for a single one."""
        shaped: Array = values.double().numpy().reshape(len(values), *self._target_shape)
        return shaped
