"""Linear probe: multinomial logistic regression on precomputed features, fitted by scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_sample_weight

from mint_ray.teachers.calibration import Floats, Indices, negative_log_likelihood

INVERSE_REGULARIZATIONS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""Candidates for the inverse regularization strength (C of LogisticRegression)."""


def fit_probe(features_ND: Floats, label_N: Indices, num_labels: int, inverse_regularization: float) -> Floats:
    """Return the weights (num_labels, D + 1) of a probe for two labels or more; the last column is the intercept.

    They minimize `inverse_regularization` times the class-balanced negative log-likelihood of N records plus half the
    squared norm of the weights. The intercept is regularized too, so that a label without records has finite weights.
    """
    return _fit(_build_estimator(num_labels), features_ND, label_N, num_labels, inverse_regularization)


def choose_probe(
    train_ND: Floats, train_N: Indices, validation_MD: Floats, validation_M: Indices, num_labels: int
) -> tuple[Floats, float]:
    """Return the weights and the inverse regularization with the lowest class-balanced loss on M validation records.

    LogisticRegressionCV would score without class weights, and fit again on the validation records.
    """
    estimator = _build_estimator(num_labels, warm_start=True)
    weight_M = compute_sample_weight("balanced", validation_M)
    candidates = []
    for inverse_regularization in INVERSE_REGULARIZATIONS:
        weights_LD = _fit(estimator, train_ND, train_N, num_labels, inverse_regularization)
        loss = negative_log_likelihood(apply_probe(weights_LD, validation_MD), validation_M, weight_M)
        candidates.append((loss, inverse_regularization, weights_LD))
    _, inverse_regularization, weights_LD = min(candidates, key=lambda candidate: candidate[0])
    return weights_LD, inverse_regularization


def apply_probe(weights_LD: Floats, features_ND: Floats) -> Floats:
    """Return logits (N, num_labels)."""
    logits_NL: Floats = _with_constant(features_ND) @ weights_LD.T
    return logits_NL


def _build_estimator(num_labels: int, *, warm_start: bool = False) -> LogisticRegression:
    if num_labels < 2:
        raise ValueError(f"num_labels must be two or more, got {num_labels}")
    # the intercept is a feature, to be regularized
    return LogisticRegression(fit_intercept=False, max_iter=2_000, warm_start=warm_start)


def _fit(
    estimator: LogisticRegression,
    features_ND: Floats,
    label_N: Indices,
    num_labels: int,
    inverse_regularization: float,
) -> Floats:
    # a row of weight 0 for each label: scikit-learn gives weights to no other labels than those of its rows
    rows = np.vstack([_with_constant(features_ND), np.zeros((num_labels, features_ND.shape[1] + 1))])
    labels = np.concatenate([label_N, np.arange(num_labels)])
    weights = np.concatenate([compute_sample_weight("balanced", label_N), np.zeros(num_labels)])
    # for two labels scikit-learn fits their difference v, which has twice the squared norm of the two vectors -v/2, v/2
    c = inverse_regularization * (2 if num_labels == 2 else 1)
    # the tolerance is one of the loss divided by C, in which a large C hides the regularization
    estimator.set_params(C=c, tol=1e-7 / c)
    coefficients = estimator.fit(rows, labels, sample_weight=weights).coef_
    weights_LD: Floats = np.vstack([-coefficients, coefficients]) / 2 if num_labels == 2 else coefficients.copy()
    return weights_LD


def _with_constant(features_ND: Floats) -> Floats:
    return np.hstack([features_ND, np.ones((len(features_ND), 1))])
