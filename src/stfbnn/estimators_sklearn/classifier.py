"""The classifier in scikit-learn's manner."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils import Bunch
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from stfbnn.errors import InputError
from stfbnn.estimators_sklearn.base import FLOATS, StfEstimator
from stfbnn.estimators_sklearn.rows import Array, Table


class StfClassifier(ClassifierMixin, StfEstimator):  # type: ignore[misc] # scikit-learn has no types
    """A network whose first layer is Bayesian, as a classifier with calibrated probabilities.

    `fit` trains a network (stage one), makes its first layer Bayesian and infers that layer's posterior (stage two); the
    posterior's temperature is chosen on rows that neither stage has seen.

    Args:
        module: None for a multilayer perceptron with ReLU; a function of (columns of X, classes), such as a class, that
            returns an untrained network; or a network itself, of which a copy is trained on. It takes X as rows
            (rows, columns) in its own dtype and gives logits (rows, classes), in the order of ``classes_``.
        hidden_layer_sizes: Units of each hidden layer of the multilayer perceptron.
        train_module: False keeps ``module`` as it is, bit for bit: it is trained already, and stage one is left out.
        standardize: Shift and scale the columns of X to mean 0 and standard deviation 1 over the training rows. "auto" does
            so for all networks that are trained here, and not for one that is trained already.
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
        validation_fraction: The share of the rows that is held out from both stages, each class in proportion and equal rows
            together. None are held out where nothing is to be chosen, or where `fit` is given ``X_val``.
        samples: Posterior draws of a prediction.
        device: Where to compute; None for the CPU, or where ``module`` is.
        train_options: Further settings of `stfbnn.train`, such as ``{"label_smoothing": 0.1}``.
        fit_options: Further settings of `stfbnn.fit`, such as ``{"predictive_temperature": "held-out"}``.
        random_state: All random numbers follow from it, those of predictions too; an integer gives the same result at each
            call of `fit`.
        verbose: Show progress bars.

    Attributes:
        classes_: The classes, sorted.
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X was a data frame with names.
        module_: The trained network, a `torch.nn.Module`.
        network_: The `stfbnn.BayesianNetwork`, for `stfbnn.predict`, `stfbnn.save` and all else.
        run_: The `stfbnn.FitRun` of stage two: its history, the temperatures that were tried, and the one that was chosen.
        training_run_: The `stfbnn.TrainRun` of stage one; None where it was left out.
    """

    classes_: Array

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> StfClassifier:
        """Train the network and infer its first layer's posterior.

        Args:
            X: Inputs, (rows, columns).
            y: Classes, (rows,): integers, strings or whatever can be sorted.
            sample_weight: What each row counts in both stages, (rows,): a weight of 2 is as good as the row twice, so that
                weights of another sum also weigh the data otherwise against the prior. None counts every row once.
            X_val: Held-out inputs on which the temperature is chosen; no stage may have seen them, nor may ``module`` have.
            y_val: Their classes.
            sample_weight_val: What each of these rows counts.

        Returns:
            The estimator itself.

        Raises:
            InputError: A parameter, or the data, cannot be used; it is a ValueError.
            ValueError: X or y have a wrong form, are not finite, or hold a single class.
            LayerError: The network has no layer that can be made Bayesian; it is a ValueError.
        """
        self._forget()
        X, y = validate_data(self, X, y, dtype=FLOATS, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y holds one class only, {self.classes_[0]!r}; a classifier needs at least two classes")
        held_out = self._validation_table(X_val, y_val, sample_weight_val, self._codes)
        what = f"{len(self.classes_)} classes"
        self._fit_table(
            Table.of(X, codes.astype(np.int64), sample_weight), held_out, len(self.classes_), what, "categorical"
        )
        return self

    def predict(self, X: Any) -> Array:
        """The most probable class of each row, (rows,)."""
        prediction = self._prediction(X)
        labels: Array = self.classes_[prediction.labels.numpy()]
        return labels

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, averaged over posterior draws, (rows, classes), in the order of ``classes_``."""
        probabilities: Array = self._prediction(X).probs.double().numpy()
        return probabilities

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of `predict_proba`; finite where a probability is too small for a float."""
        logarithms: Array = self._prediction(X).log_probs.double().numpy()
        return logarithms

    def predict_uncertainty(self, X: Any) -> Bunch:
        """How uncertain each prediction is, in nats.

        Args:
            X: Inputs, (rows, columns).

        Returns:
            ``total``, the entropy of `predict_proba`; ``aleatoric``, the mean entropy of the draws, which would remain if
            the weights were known; ``epistemic``, their difference, the mutual information of class and weights. Each is
            (rows,).
        """
        prediction = self._prediction(X)
        return Bunch(
            total=prediction.entropy.double().numpy(),
            aleatoric=prediction.aleatoric.double().numpy(),
            epistemic=prediction.epistemic.double().numpy(),
        )

    def _codes(self, y: Any) -> Array:
        """Classes as numbers 0 … K−1."""
        y = column_or_1d(y, warn=True)
        unknown = sorted(set(np.unique(y).tolist()) - set(self.classes_.tolist()))
        if unknown:
            raise InputError(f"y_val holds the classes {unknown}, which y does not; y has {self.classes_.tolist()}")
        codes: Array = np.searchsorted(self.classes_, y).astype(np.int64)
        return codes
