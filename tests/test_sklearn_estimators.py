"""StfClassifier and StfRegressor: scikit-learn's contract, and what they add to it."""

import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.base import clone
from sklearn.calibration import CalibrationDisplay
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import stfbnn
from core_models import classification, loader, mlp, trained
from stfbnn.errors import InputError, LayerError
from stfbnn.estimators_sklearn import StfClassifier, StfRegressor
from stfbnn.estimators_sklearn.rows import RowBatches

QUICK: dict[str, Any] = {
    "hidden_layer_sizes": (16,),
    "epochs": 6,
    "learning_rate": 0.05,
    "inference_epochs": 1,
    "batch_size": 64,
    "samples": 4,
}
FIXED: dict[str, Any] = {**QUICK, "temperature": 0.1, "random_state": 0}
WEIGHTS = (
    "rows are drawn into minibatches, and posterior draws are made for each row, so a row of weight 2 and a row that is "
    "there twice meet other random numbers; that they agree without these is tested below"
)
# Of networks that are hardly trained, in a test of something else.
NOT_BETTER = pytest.mark.filterwarnings("ignore:on the held-out data")


@parametrize_with_checks(
    [StfClassifier(**QUICK, temperature=0.1), StfRegressor(**QUICK, temperature=0.1)],
    expected_failed_checks=lambda _: {"check_sample_weight_equivalence_on_dense_data": WEIGHTS},
)
def test_the_estimators_pass_the_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def blobs(classes: int = 3, count: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, y = classification(count, classes=classes, seed=seed)
    return x.double().numpy(), y.numpy()


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray]:
    """Digits through a noisy sensor, on which a network is easily too sure of itself."""
    X, y = load_digits(return_X_y=True)
    X = X + np.random.default_rng(0).normal(0, 5, X.shape)
    return train_test_split(X, y, test_size=0.4, random_state=0, stratify=y)


@pytest.fixture(scope="module")
def reader(digits: list[np.ndarray]) -> StfClassifier:
    X, _, y, _ = digits
    return StfClassifier(epochs=30, inference_epochs=6, random_state=0).fit(X, y)


def calibration_error(probabilities: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    part = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(
        abs(right[part == b].mean() - confidence[part == b].mean()) * (part == b).mean() for b in np.unique(part)
    )


def test_digits_are_read_as_well_as_by_a_plain_network_and_with_better_calibration(
    digits: list[np.ndarray], reader: StfClassifier
) -> None:
    X, X_test, y, y_test = digits
    plain = make_pipeline(StandardScaler(), MLPClassifier(random_state=0, max_iter=300)).fit(X, y)
    softmax, averaged = plain.predict_proba(X_test), reader.predict_proba(X_test)
    assert reader.score(X_test, y_test) > plain.score(X_test, y_test) - 0.02
    assert log_loss(y_test, averaged) < log_loss(y_test, softmax) - 0.03
    assert calibration_error(averaged, y_test) < 0.7 * calibration_error(softmax, y_test)


def test_the_uncertainty_of_a_class_is_split_into_its_parts(digits: list[np.ndarray], reader: StfClassifier) -> None:
    X_test = digits[1]
    found = reader.predict_uncertainty(X_test)
    np.testing.assert_allclose(found.total, entropy(reader.predict_proba(X_test), axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.total, found.aleatoric + found.epistemic, atol=1e-9)
    assert found.epistemic.mean() > 0.01
    far = reader.predict_uncertainty(np.random.default_rng(1).permuted(X_test, axis=1) * 2)
    assert far.epistemic.mean() > 1.5 * found.epistemic.mean()


@pytest.mark.parametrize("through", [pickle, joblib], ids=["pickle", "joblib"])
def test_a_fitted_estimator_survives_pickling(through: Any, digits: list[np.ndarray], reader: StfClassifier) -> None:
    file = BytesIO()
    through.dump(reader, file)
    file.seek(0)
    again = through.load(file)
    np.testing.assert_array_equal(again.predict_proba(digits[1]), reader.predict_proba(digits[1]))
    assert again.training_run_.model is again.module_
    assert again.run_ == reader.run_


def test_what_was_fitted_can_be_saved_and_loaded_by_the_library(reader: StfClassifier, tmp_path: Path) -> None:
    folder = stfbnn.save(reader.network_, tmp_path / "posterior")
    again = stfbnn.load(folder, reader.module_)
    x = torch.randn(5, 64, dtype=torch.float64)
    assert torch.equal(stfbnn.predict(again, x).probs, stfbnn.predict(reader.network_, x).probs)


@pytest.fixture(scope="module")
def diabetes() -> list[np.ndarray]:
    return train_test_split(*load_diabetes(return_X_y=True), test_size=0.4, random_state=0)


@NOT_BETTER
def test_intervals_of_a_regression_cover_what_they_say(diabetes: list[np.ndarray]) -> None:
    X, X_test, y, y_test = diabetes
    regressor = StfRegressor(epochs=30, inference_epochs=5, random_state=0).fit(X, y)
    mean, std = regressor.predict(X_test, return_std=True)
    assert 0.84 < np.mean(np.abs(y_test - mean) < 1.645 * std) < 0.96
    assert regressor.score(X_test, y_test) > 0.35
    np.testing.assert_array_equal(mean, regressor.predict(X_test))
    found = regressor.predict_uncertainty(X_test)
    np.testing.assert_allclose(found.total, np.square(std), rtol=1e-9)
    np.testing.assert_allclose(found.total, found.aleatoric + found.epistemic)
    assert found.epistemic.min() > 0
    np.testing.assert_allclose(found.aleatoric, found.aleatoric[0])


def test_mean_and_standard_deviation_are_in_the_unit_of_the_targets(diabetes: list[np.ndarray]) -> None:
    X, X_test, y, _ = diabetes
    mean, std = StfRegressor(**FIXED).fit(X, y).predict(X_test, return_std=True)
    scaled = StfRegressor(**FIXED).fit(X, 1000 * y + 5e5)
    there, wider = scaled.predict(X_test, return_std=True)
    np.testing.assert_allclose(there, 1000 * mean + 5e5, rtol=1e-7)
    np.testing.assert_allclose(wider, 1000 * std, rtol=1e-6)
    assert 20 < std.mean() < 100


def test_several_columns_are_regressed_with_a_noise_each() -> None:
    X, _ = blobs(count=200)
    noise = np.random.default_rng(0).normal(size=(200, 2)) * [0.1, 30]
    Y = np.stack([X[:, 0], 100 * X[:, 1]], axis=1) + noise
    mean, std = StfRegressor(**{**FIXED, "epochs": 60}).fit(X, Y).predict(X, return_std=True)
    assert mean.shape == std.shape == (200, 2)
    assert np.corrcoef(mean[:, 0], Y[:, 0])[0, 1] > 0.9
    assert 20 < std[:, 1].mean() < 60
    assert std[:, 0].mean() < 0.6


@NOT_BETTER
def test_all_random_numbers_follow_from_the_random_state() -> None:
    X, y = blobs()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()

    def probabilities(state: Any) -> np.ndarray:
        return StfClassifier(**{**FIXED, "temperature": None, "random_state": state}).fit(X, y).predict_proba(X)

    same = [probabilities(3), probabilities(3)]
    states = [probabilities(np.random.RandomState(3)) for _ in range(2)]
    other = probabilities(4)
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(states[0], states[1])
    np.testing.assert_array_equal(states[0], same[0])
    assert np.abs(other - same[0]).max() > 1e-3
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_a_clone_of_a_fitted_estimator_has_its_parameters_alone() -> None:
    X, y = blobs()
    fitted = StfClassifier(mlp(), **FIXED, prior=stfbnn.Normal(std=0.5), posterior=stfbnn.MeanField()).fit(X, y)
    twin = clone(fitted)
    assert not hasattr(twin, "network_")
    assert twin.get_params().keys() == fitted.get_params().keys()
    assert twin.prior == fitted.prior
    np.testing.assert_array_equal(twin.fit(X, y).predict_proba(X), fitted.predict_proba(X))


@NOT_BETTER
def test_pipelines_searches_and_displays_take_the_estimators() -> None:
    X, y = blobs(classes=2)
    pipeline = make_pipeline(StandardScaler(), StfClassifier(**FIXED))
    search = GridSearchCV(
        pipeline, {"stfclassifier__hidden_layer_sizes": [(4,), 8], "stfclassifier__prior": ["rms", 1.0]}, cv=2
    )
    search.fit(X, y)
    assert search.best_score_ > 0.7
    assert search.best_estimator_[-1].network_.layer_name == "0"
    display = CalibrationDisplay.from_estimator(search, X, y, n_bins=4)
    assert len(display.prob_true) >= 2
    assert cross_val_score(StfRegressor(**FIXED), X, X[:, 0] - X[:, 1], cv=2).min() > 0.5


def test_classes_may_be_words() -> None:
    X, y = blobs()
    words = np.array(["pear", "apple", "fig"])[y]
    named, numbered = StfClassifier(**FIXED).fit(X, words), StfClassifier(**FIXED)
    assert named.classes_.tolist() == ["apple", "fig", "pear"]
    assert named.score(X, words) > 0.7
    order = np.searchsorted(named.classes_, ["pear", "apple", "fig"])
    np.testing.assert_array_equal(numbered.fit(X, order[y]).predict_proba(X), named.predict_proba(X))
    np.testing.assert_allclose(np.exp(named.predict_log_proba(X)), named.predict_proba(X))


class Convolutions(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        side = int(inputs**0.5)
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(outputs),
        )
        self.layers(torch.zeros(2, inputs))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)


def test_a_network_of_the_users_own_is_made_and_trained(digits: list[np.ndarray]) -> None:
    X, X_test, y, y_test = digits
    reader = StfClassifier(Convolutions, **{**FIXED, "epochs": 5}).fit(X, y)
    assert isinstance(reader.module_, Convolutions)
    assert reader.network_.layer_name == "layers.1"
    assert reader.score(X_test, y_test) > 0.7


def test_a_network_that_is_given_untrained_stays_as_it_is() -> None:
    X, y = blobs()
    own = mlp()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    fitted = StfClassifier(own, **FIXED).fit(X, y)
    assert fitted.module is own
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert not torch.equal(fitted.module_[0].weight, own[0].weight)


def test_a_trained_network_is_kept_bit_for_bit_and_predicts_as_in_the_library() -> None:
    x, y = classification(200)
    model = trained(mlp(), x, y)
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    X_val, y_val = (part.numpy() for part in classification(100, seed=1))
    estimator = StfClassifier(
        model, train_module=False, inference_epochs=2, batch_size=32, random_state=np.random.RandomState(0)
    )
    estimator.fit(x.numpy(), y.numpy(), X_val=X_val, y_val=y_val)
    assert estimator.module_ is model
    assert estimator.training_run_ is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [value.requires_grad for value in model.parameters()] == [False, True, True, True]

    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    batches = RowBatches(torch.utils.data.TensorDataset(x, y), 32, shuffle=True)
    bnn = stfbnn.bayesianize(model, x[:8])
    stfbnn.fit(bnn, batches, epochs=2, seed=seed, val_loader=loader(torch.tensor(X_val), torch.tensor(y_val)))
    expected = stfbnn.predict(bnn, x, seed=seed).probs
    np.testing.assert_allclose(estimator.predict_proba(x.numpy()), expected, rtol=1e-6)


@NOT_BETTER
def test_a_trained_network_of_unknown_data_warns_and_one_that_saw_the_rows_is_refused() -> None:
    x, y = classification(200)
    estimator = StfClassifier(trained(mlp(), x, y), train_module=False, **QUICK)
    with pytest.warns(UserWarning, match="nothing says what the trained network was trained on"):
        estimator.fit(*(part.numpy() for part in classification(100, seed=1)))
    model = stfbnn.train(mlp(), loader(x, y), epochs=2).model
    with pytest.raises(InputError, match="not held out"):
        StfClassifier(model, train_module=False, **QUICK).fit(x.numpy(), y.numpy())


@NOT_BETTER
def test_held_out_rows_are_those_of_the_user_or_a_share_and_none_where_nothing_is_chosen() -> None:
    X, y = blobs(count=100)
    X_val, y_val = blobs(seed=1)
    share = StfClassifier(**QUICK, validation_fraction=0.3).fit(X, y)
    assert share.run_.num_examples == 70
    assert len(share.run_.trials) > 1
    assert StfClassifier(**FIXED).fit(X, y).run_.num_examples == 100
    words = np.array(["b", "a", "c"])
    own = StfClassifier(**QUICK).fit(X, words[y], X_val=X_val, y_val=words[y_val])
    assert own.run_.num_examples == 100
    assert own.run_.trials
    with pytest.raises(InputError, match="not held out"):
        StfClassifier(**QUICK).fit(X, y, X_val=X[:30], y_val=y[:30])
    with pytest.raises(InputError, match=r"y_val holds the classes \[7\]"):
        StfClassifier(**QUICK).fit(X, y, X_val=X_val, y_val=np.where(y_val == 0, 7, y_val))


# With these the only random numbers are those of the posterior's draws, one for all rows.
ROWLESS: dict[str, Any] = {
    **FIXED,
    "batch_size": 10_000,
    "posterior": stfbnn.MeanField(initial_std=0.05),
    "engine": "bayes-by-backprop",
    "fit_options": {"estimator": "shared"},
    "inference_epochs": 10,
}


@pytest.mark.parametrize("estimator", [StfClassifier, StfRegressor])
def test_a_row_of_weight_two_counts_as_the_row_twice_and_one_of_weight_zero_not_at_all(estimator: Any) -> None:
    X, y = blobs(count=60)
    weights = np.random.default_rng(0).integers(0, 4, 60)
    weighted = estimator(**ROWLESS).fit(X, y, sample_weight=weights)
    repeated = estimator(**ROWLESS).fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))
    plain = estimator(**ROWLESS).fit(X, y)
    np.testing.assert_allclose(weighted.predict_uncertainty(X).total, repeated.predict_uncertainty(X).total, rtol=1e-3)
    assert np.abs(weighted.predict_uncertainty(X).total / plain.predict_uncertainty(X).total - 1).max() > 0.02
    ones = estimator(**FIXED).fit(X, y, sample_weight=np.minimum(weights, 1))
    there = weights > 0
    np.testing.assert_allclose(
        ones.predict_uncertainty(X).total, estimator(**FIXED).fit(X[there], y[there]).predict_uncertainty(X).total
    )


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"hidden_layer_sizes": (16, 0)}, "hidden_layer_sizes must be positive integers"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"inference_epochs": 2.5}, "inference_epochs must be a positive integer"),
        ({"samples": 0}, "samples must be a positive integer"),
        ({"batch_size": "all"}, "batch_size must be a positive integer"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1"),
        ({"standardize": "yes"}, "standardize must be True, False or"),
        ({"posterior": "wide"}, "posterior='wide' is not a known family"),
        ({"prior": -1.0}, "std must be positive"),
        ({"engine": "steam"}, "engine='steam' is not known"),
        ({"temperature": 0}, "temperatures must be positive"),
        ({"device": "abacus"}, "device='abacus' cannot be used here"),
        ({"layer": "fc9"}, "fc9"),
        ({"train_options": {"lr": 1.0}}, r"train_options has \['lr'\]"),
        ({"fit_options": {"epoch": 1}}, r"fit_options has \['epoch'\]"),
        ({"fit_options": {"likelihood": "gaussian"}}, "float targets"),
        ({"train_module": False}, "give it as module="),
        ({"module": 3}, "module must be a torch.nn.Module"),
        ({"module": lambda _inputs, _outputs: None}, "returned a NoneType"),
        (
            {"module": lambda inputs, _outputs: mlp(inputs, outputs=5)},
            r"outputs of shape \(8, 5\) for 8 rows, but y has 3 classes",
        ),
        (
            {"module": mlp(outputs=5), "train_module": False},
            r"outputs of shape \(8, 5\) for 8 rows, but y has 3 classes",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_parameter_is_refused_before_anything_is_trained(
    parameters: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stfbnn.estimators_sklearn.base.train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises((InputError, LayerError), match=says):
        StfClassifier(**{**FIXED, **parameters}).fit(*blobs())


def test_data_that_cannot_be_learned_from_are_refused() -> None:
    X, y = blobs()
    with pytest.raises(ValueError, match="one class"):
        StfClassifier(**QUICK).fit(X, np.zeros(len(X)))
    with pytest.raises(InputError, match="all 120 rows of X are equal"):
        StfRegressor(**QUICK).fit(np.ones_like(X), y)
    with pytest.raises(InputError, match="belong together"):
        StfClassifier(**QUICK).fit(X, y, X_val=X)
    for weights in (np.zeros(120), np.linspace(-1, 1, 120)):
        with pytest.raises(InputError, match="sample_weight must not be negative, and not zero for every row"):
            StfClassifier(**QUICK).fit(X, y, sample_weight=weights)
    with pytest.raises(InputError, match=r"sample_weight_val must be one number for each row, \(120,\)"):
        StfClassifier(**QUICK).fit(X, y, X_val=X, y_val=y, sample_weight_val=np.ones(5))


def test_a_fit_that_fails_leaves_no_half_of_an_older_one() -> None:
    X, y = blobs()
    classifier = StfClassifier(**FIXED).fit(X, y)
    with pytest.raises(InputError):
        classifier.set_params(engine="steam").fit(X, y + 5)
    with pytest.raises(ValueError, match="not fitted yet"):
        classifier.predict(X)
