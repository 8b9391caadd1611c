"""Calibration of class probabilities, and classification metrics on the validation split.

Logits have shape (N, L): N records, L labels; the true label of each record is its index among the L.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, recall_score

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

MAX_TEMPERATURE = 20.0
"""Maximum temperature; the minimum is its inverse."""
NUM_BINS = 15


def accuracy(logits_NL: Floats, label_N: Indices) -> float:
    """Return the share of records whose most likely label is the true one."""
    return float(accuracy_score(label_N, logits_NL.argmax(axis=1)))


def balanced_accuracy(logits_NL: Floats, label_N: Indices) -> float:
    """Return the mean recall over the labels that occur."""
    # not balanced_accuracy_score: it gives the same number, and a warning for each label that is predicted, not true
    return float(recall_score(label_N, logits_NL.argmax(axis=1), labels=np.unique(label_N), average="macro"))


def negative_log_likelihood(logits_NL: Floats, label_N: Indices, weight_N: Floats | None = None) -> float:
    """Return the mean negative log-likelihood of the true labels, weighted by record if weights are given."""
    # not scikit-learn's log_loss: it clips probabilities, so that it is flat at the small temperatures of a fit
    logp_N = log_softmax(logits_NL, axis=1)[np.arange(len(label_N)), label_N]
    return -float(np.average(logp_N, weights=weight_N))


def expected_calibration_error(logits_NL: Floats, label_N: Indices) -> float:
    """Return the expected calibration error over 15 bins of equal width (Guo et al., ICML 2017)."""
    # scikit-learn has none
    probability_NL = np.exp(log_softmax(logits_NL, axis=1))
    confidence_N, correct_N = probability_NL.max(axis=1), probability_NL.argmax(axis=1) == label_N
    bin_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(confidence_N[bin_N == b].sum() - correct_N[bin_N == b].sum()) for b in np.unique(bin_N)]
    return float(sum(gaps) / len(label_N))


def fit_temperature(logits_NL: Floats, label_N: Indices) -> float:
    """Return the divisor of the logits, 1/20 to 20, that maximizes the likelihood of the labels (arXiv 1706.04599).

    Returns 1 if no other temperature is better.
    """

    # not CalibratedClassifierCV(method="temperature"): it calibrates a fitted scikit-learn classifier, not logits
    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits_NL / np.exp(log_temperature), label_N)

    # the loss is convex in the inverse temperature, so the minimum is the only one
    bound = np.log(MAX_TEMPERATURE)
    result = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(result.x)) if result.fun < loss(0.0) else 1.0
