"""scikit-learn's way: an estimator in a pipeline, tuned by a grid search, with calibrated probabilities."""

import numpy as np
from sklearn.datasets import load_diabetes, load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline

from stfbnn import StfClassifier, StfRegressor

# Digits through a noisy sensor.
images, labels = load_digits(return_X_y=True)
images = images + np.random.default_rng(0).normal(0, 5, images.shape)
X, X_test, y, y_test = train_test_split(images, labels, train_size=600, random_state=0, stratify=labels)

classifier = StfClassifier(epochs=20, inference_epochs=10, random_state=0)
search = GridSearchCV(make_pipeline(PCA(), classifier), {"pca__n_components": [15, 30]}, scoring="neg_log_loss", cv=2)
search.fit(X, y)
plain = make_pipeline(PCA(search.best_params_["pca__n_components"]), MLPClassifier(max_iter=500, random_state=0)).fit(
    X, y
)
for name, model in (("plain network", plain), ("Bayesian front", search)):
    probabilities = model.predict_proba(X_test)
    accuracy = np.mean(probabilities.argmax(1) == y_test)
    print(f"{name:14}  accuracy {accuracy:.1%}, NLL {log_loss(y_test, probabilities):.3f}")

chosen = search.best_estimator_[-1]
print(f"of {search.best_params_}: first layer {chosen.network_.layer_name!r}, T = {chosen.run_.temperature:g}")
unsure = chosen.predict_uncertainty(search.best_estimator_[:-1].transform(X_test))
print(f"nats of uncertainty: {unsure.total.mean():.2f}, of which {unsure.epistemic.mean():.2f} epistemic")

# A regression, with the standard deviation of every prediction in the unit of the target.
X, X_test, y, y_test = train_test_split(*load_diabetes(return_X_y=True), random_state=0)
mean, std = StfRegressor(random_state=0).fit(X, y).predict(X_test, return_std=True)
print(
    f"90 % intervals of about ±{1.645 * std.mean():.0f} cover {np.mean(abs(y_test - mean) < 1.645 * std):.0%} of the test"
)
