"""Classifier and regressor in scikit-learn's manner: arrays in, calibrated predictions out.

    classifier = StfClassifier(random_state=0).fit(X, y)
    classifier.predict_proba(X_test)
    mean, std = StfRegressor(random_state=0).fit(X, y).predict(X_test, return_std=True)

Both go by scikit-learn's contract for estimators, and so work in pipelines, grid searches and cross-validation.
"""

from stfbnn.estimators_sklearn.classifier import StfClassifier
from stfbnn.estimators_sklearn.regressor import StfRegressor

__all__ = ["StfClassifier", "StfRegressor"]
