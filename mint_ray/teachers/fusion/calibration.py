"""How good probabilities are, and how to make them honest; pure functions of logits and truths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15


def accuracy(logits_NL: Floats, truth_N: Ints) -> float:
    return float((logits_NL.argmax(axis=1) == truth_N).mean())


def balanced_accuracy(logits_NL: Floats, truth_N: Ints) -> float:
    """Mean over the labels that occur of the share of their records that is right."""
    right_N = logits_NL.argmax(axis=1) == truth_N
    return float(np.mean([right_N[truth_N == label].mean() for label in np.unique(truth_N)]))


def negative_log_likelihood(logits_NL: Floats, truth_N: Ints) -> float:
    return float(-log_softmax(logits_NL, axis=1)[np.arange(len(truth_N)), truth_N].mean())


def calibration_error(logits_NL: Floats, truth_N: Ints) -> float:
    """Expected calibration error over 15 bins of equal width (Guo et al., ICML 2017)."""
    probability_NL = np.exp(log_softmax(logits_NL, axis=1))
    sure_N, right_N = probability_NL.max(axis=1), probability_NL.argmax(axis=1) == truth_N
    bin_N = np.minimum((sure_N * BINS).astype(int), BINS - 1)
    gaps = [abs(sure_N[bin_N == b].sum() - right_N[bin_N == b].sum()) for b in np.unique(bin_N)]
    return float(sum(gaps) / len(truth_N))


def best_temperature(logits_NL: Floats, truth_N: Ints) -> float:
    """The number to divide logits by, 0.05 to 20, under which the truths are most likely; 1 where none is better."""

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits_NL / np.exp(log_temperature), truth_N)

    # convex in the inverse temperature, hence of one valley
    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0
