"""A linear probe on features that somebody else made, and how sure it may be of itself.

Multinomial logistic regression with a ridge penalty, fitted by L-BFGS: one optimum, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Places = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""What C is chosen from."""
HOTTEST = 20.0
"""Largest temperature, and the inverse of the smallest."""


def fit_probe(features_ND: Array, label_N: Places, labels: int, c: float, start_LD: Array | None = None) -> Array:
    """Weights (labels, D + 1), the last column those of a constant, under which C times the balanced negative
    log-likelihood of N rows plus half the squared norm of the weights is least.

    The constant is penalised too, so that a label without a row has a finite weight. Each label weighs the same.
    """
    rows, width = features_ND.shape
    features_ND = _with_constant(features_ND)
    weight_N = _balance(label_N, labels)
    truth_NL = np.eye(labels)[label_N]

    def loss(flat: Array) -> tuple[float, Array]:
        weights_LD = flat.reshape(labels, width + 1)
        logps_NL = log_softmax(features_ND @ weights_LD.T, axis=1)
        slope_LD = c * ((np.exp(logps_NL) - truth_NL) * weight_N[:, None]).T @ features_ND + weights_LD
        value = -c * float(weight_N @ logps_NL[np.arange(rows), label_N]) + 0.5 * float((weights_LD**2).sum())
        return value / rows, slope_LD.ravel() / rows

    start_LD = np.zeros((labels, width + 1)) if start_LD is None else start_LD
    options = {"maxiter": 2_000, "maxfun": 4_000, "ftol": 1e-12, "gtol": 1e-7}
    found = minimize(loss, start_LD.ravel(), jac=True, method="L-BFGS-B", options=options)
    weights_LD: Array = found.x.reshape(labels, width + 1)
    return weights_LD


def choose_probe(
    train_ND: Array, train_N: Places, validation_MD: Array, validation_M: Places, labels: int
) -> tuple[Array, float]:
    """The weights, and the C of `STRENGTHS`, that the balanced likelihood of M validation rows is highest under."""
    best: tuple[float, Array, float] | None = None
    weights_LD: Array | None = None
    weight_M = _balance(validation_M, labels)
    for c in STRENGTHS:
        weights_LD = fit_probe(train_ND, train_N, labels, c, weights_LD)
        logps_ML = log_softmax(apply_probe(weights_LD, validation_MD), axis=1)
        loss = -float(weight_M @ logps_ML[np.arange(len(validation_M)), validation_M])
        if best is None or loss < best[0]:
            best = (loss, weights_LD, c)
    if best is None:
        raise ValueError("there is no C to choose from")
    return best[1], best[2]


def apply_probe(weights_LD: Array, features_ND: Array) -> Array:
    """Logits (N, labels)."""
    logits_NL: Array = _with_constant(features_ND) @ weights_LD.T
    return logits_NL


def fit_temperature(logits_NL: Array, label_N: Places) -> float:
    """What the logits are to be divided by, so that the labels of N rows are most likely (arXiv 1706.04599)."""
    found = minimize_scalar(
        lambda log_t: likelihood_loss(logits_NL / np.exp(log_t), label_N),
        bounds=(-np.log(HOTTEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def likelihood_loss(logits_NL: Array, label_N: Places) -> float:
    """Mean negative log-likelihood of the labels of N rows."""
    return -float(log_softmax(logits_NL, axis=1)[np.arange(len(label_N)), label_N].mean())


def _with_constant(features_ND: Array) -> Array:
    return np.hstack([features_ND, np.ones((len(features_ND), 1))])


def _balance(label_N: Places | Sequence[int], labels: int) -> Array:
    """A weight for each row, of mean 1, so that all labels that have rows weigh the same."""
    counts_L = np.bincount(label_N, minlength=labels)
    weight_N: Array = len(label_N) / (np.count_nonzero(counts_L) * counts_L[label_N])
    return weight_N
